"""Typed, checked access to a checkpoint's metadata, and the rule that nothing in it that might change the results is ignored.

A key that an architecture's file does not ask for must be known to be harmless, or hold a value that switches something off.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ..errors import ModelError, UnsupportedModelError

_Value = TypeVar("_Value")


class Fields:
    """Access to metadata that remembers what was asked for; `where` and the full key are in every message."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "", tensors: Collection[str] = ()) -> None:
        self.values, self.where, self.prefix = values, where, prefix
        self.tensors = tensors  # names of the checkpoint's tensors, where metadata alone do not tell
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._asked.add(key)
        return self.prefix + key in self.values and self.values[self.prefix + key] is not None

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(
            f"{self.where}: {self.prefix}{key} {problem}; the file is damaged or made by a faulty converter"
        )

    def unsupported(self, key: str, problem: str) -> UnsupportedModelError:
        """The error for a sound model that needs something which is not there."""
        return UnsupportedModelError(f"{self.where}: {self.prefix}{key} {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default; without a default, a missing key is an error."""
        if self.has(key):
            return self.values[self.prefix + key]
        if default is None:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 24) -> int:
        """An integer within [low, high]. A list whose entries are all equal counts as its entry."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, list):
            raise UnsupportedModelError(f"{self.where}: {self.prefix}{key} differs from layer to layer; not supported")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"is {short(value)}, not an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number above low (not equal) and up to high."""
        value = self.get(key, default)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or not low < value <= high:
            raise self.fail(key, f"is {short(value)}, not a number above {low:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"is {short(value)}, not a text")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self.values[self.prefix + key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.fail(key, f"is {short(value)}, not true or false")
        return value

    def numbers(self, key: str, count: int) -> list[float]:
        """A list of `count` finite numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(_positive(v) for v in value):
            raise self.fail(key, f"is {short(value)}, not a list of {count} numbers above 0")
        return [float(v) for v in value]

    def per_layer(self, key: str, layers: int) -> list[Any]:
        """A list with an entry for every layer; longer lists are cut."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) < layers:
            raise self.fail(key, f"is {short(value)}, not a list of {layers} entries")
        return value[:layers]

    def choice(self, key: str, choices: Mapping[str, _Value], default: str | None = None) -> _Value:
        """What one of the known texts stands for; any other is refused by name."""
        name = self.text(key, default)
        if name not in choices:
            raise self.unsupported(key, f"is {short(name)}, which is not supported (known: {', '.join(choices)})")
        return choices[name]

    def need_off(self, *keys: str) -> None:
        """Refuses keys that are there and switch something on."""
        for key in keys:
            if self.has(key) and not _is_off(self.get(key)):
                raise self.unsupported(key, f"is {short(self.get(key))}; this variant of the model is not supported")

    def refuse_unknown(self, harmless: Collection[str]) -> None:
        """Refuses a key that was not asked for, is not harmless (patterns), and does not hold the value of an absent thing."""
        for full, value in sorted(self.values.items()):
            key = full[len(self.prefix) :]
            known = not full.startswith(self.prefix) or key in self._asked or _is_off(value)
            if not known and not any(fnmatch.fnmatchcase(key, pattern) for pattern in harmless):
                raise self.unsupported(
                    key,
                    f"is {short(value)}, a setting that sparse-run does not know for this architecture; if it does not change "
                    "the results, take it out of the file and try again",
                )


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (int, float, str, list, dict)) and not value)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def short(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Keys of config.json that say nothing about the forward pass of a decoder, as patterns.
HARMLESS_HF: tuple[str, ...] = (
    "_*",
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "transformers.js_config",
    "torch_dtype",
    "dtype",
    "use_cache",
    "cache_implementation",
    "pretraining_tp",
    "initializer_*",
    "init_std",
    "*dropout*",
    "*_pdrop",
    "layerdrop",
    "*_token_id",
    "*_token_index",
    "is_decoder",
    "is_llama_config",
    "unsloth_*",
    "prefix",
    "tokenizer_class",
    "processor_class",
    "task_specific_params",
    "use_flash_attention*",
    "gradient_checkpointing",
    "attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "finetuning_task",
    "chunk_size_feed_forward",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "diversity_penalty",
    "length_penalty",
    "repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "max_window_layers",
    "quantization_config",
    "vocab_size",
)

# The same for the keys of a GGUF file below the architecture's name.
HARMLESS_GGUF: tuple[str, ...] = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.causal",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "expert_used_count",
)
