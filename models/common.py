"""What architecture files share: typed access to a checkpoint's metadata, the tables of tensor names, checks of a config.

A *role* is a tensor of the checkpoint before anything is fused, named as in format.md: `token_embd`, `layers.3.attn_q`,
`layers.3.attn_q.bias`. In patterns, `{i}` stands for the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError, UnsupportedModelError

Config = dict[str, Any]


@dataclass(frozen=True)
class Decoder:
    """An architecture's answer about one checkpoint: config.json of the packed model, and divisors of the inverse RoPE
    frequencies [rope_dims / 2] where a scaling is used."""

    config: Config
    rope_factors: list[float] | None = None


@dataclass(frozen=True)
class Architecture:
    """Everything the converter must know of one family of models."""

    name: str
    # Names in `general.architecture` of GGUF and in `architectures` of a Hugging Face config.json.
    gguf: tuple[str, ...]
    hf: tuple[str, ...]
    # Metadata and number of tokens to the decoder's hyper-parameters.
    gguf_config: Callable[[Fields, int], Decoder]
    hf_config: Callable[[Fields, int], Decoder]
    # Role patterns that must be there, and that may be.
    required: tuple[str, ...]
    optional: tuple[str, ...]
    # Role pattern to the pattern of the tensor's name.
    gguf_names: Mapping[str, str]
    hf_names: Mapping[str, str]
    # Patterns of tensors that carry nothing the decoder needs.
    ignored: tuple[str, ...] = field(default=())


class Fields:
    """Typed, checked access to metadata; `where` and the full key are in every message."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.prefix + key in self.values and self.values[self.prefix + key] is not None

    def fail(self, key: str, problem: str) -> ModelError:
        return ModelError(
            f"{self.where}: {self.prefix}{key} {problem}; the file is damaged or made by a faulty converter"
        )

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
            raise self.fail(key, f"is {_short(value)}, not an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number above low (not equal) and up to high."""
        value = self.get(key, default)
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or not low < value <= high:
            raise self.fail(key, f"is {_short(value)}, not a number above {low:g}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"is {_short(value)}, not a text")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self.values[self.prefix + key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.fail(key, f"is {_short(value)}, not true or false")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_PER_LAYER_BOTH = {
    "attn_norm": ("attn_norm", "input_layernorm"),
    "attn_q": ("attn_q", "self_attn.q_proj"),
    "attn_k": ("attn_k", "self_attn.k_proj"),
    "attn_v": ("attn_v", "self_attn.v_proj"),
    "attn_o": ("attn_output", "self_attn.o_proj"),
    "ffn_norm": ("ffn_norm", "post_attention_layernorm"),
    "ffn_gate": ("ffn_gate", "mlp.gate_proj"),
    "ffn_up": ("ffn_up", "mlp.up_proj"),
    "ffn_down": ("ffn_down", "mlp.down_proj"),
}


def _names(column: int, layer: str, outer: dict[str, str]) -> dict[str, str]:
    table = dict(outer)
    for role, names in _PER_LAYER_BOTH.items():
        table[f"layers.{{i}}.{role}"] = f"{layer}.{names[column]}.weight"
        table[f"layers.{{i}}.{role}.bias"] = f"{layer}.{names[column]}.bias"
    return table


# The names that most architectures use; a file that differs in one overrides it: {**GGUF_NAMES, role: name}.
GGUF_NAMES: Mapping[str, str] = _names(
    0,
    "blk.{i}",
    {
        "token_embd": "token_embd.weight",
        "output": "output.weight",
        "output_norm": "output_norm.weight",
        "output_norm.bias": "output_norm.bias",
        "rope_factors": "rope_freqs.weight",
    },
)
HF_NAMES: Mapping[str, str] = _names(
    1,
    "model.layers.{i}",
    {
        "token_embd": "model.embed_tokens.weight",
        "output": "lm_head.weight",
        "output_norm": "model.norm.weight",
        "output_norm.bias": "model.norm.bias",
    },
)

GATED_DECODER: tuple[str, ...] = (
    "token_embd",
    "output_norm",
    *(f"layers.{{i}}.{role}" for role in _PER_LAYER_BOTH),
)
ATTENTION_BIASES: tuple[str, ...] = tuple(f"layers.{{i}}.attn_{part}.bias" for part in "qkvo")


def expected_shape(role: str, config: Config) -> tuple[int, ...]:
    """The shape [rows, cols] or [length] that a role's tensor must have."""
    d, ff, head = config["n_embd"], config["n_ff"], config["head_dim"]
    q, kv = config["n_heads"] * head, config["n_kv_heads"] * head
    name = role.split(".", 2)[2] if role.startswith("layers.") else role
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config["n_vocab"], d),
        "output": (config["n_vocab"], d),
        "position_embd": (config["n_ctx_train"], d),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_o": (d, q),
        "ffn_gate": (ff, d),
        "ffn_up": (ff, d),
        "ffn_down": (d, ff),
        "q_norm": (head,),
        "k_norm": (head,),
        "rope_factors": (config["rope_dims"] // 2,),
    }
    if name.endswith(("norm", "norm.bias")):
        return shapes.get(name, (d,))
    if name.endswith(".bias"):
        return shapes[name[: -len(".bias")]][:1]
    return shapes[name]


def check_config(config: Config, where: str) -> None:
    """Raises ModelError where hyper-parameters contradict each other."""

    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise ModelError(f"{where}: {problem}; the file is damaged or made by a faulty converter")

    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    need(heads % kv_heads == 0, f"{heads} attention heads cannot share {kv_heads} key-value heads")
    need(config["head_dim"] % 2 == 0, f"a head of {config['head_dim']} dimensions is not even")
    need(
        config["rope_dims"] % 2 == 0 and config["rope_dims"] <= config["head_dim"],
        f"{config['rope_dims']} rotated dimensions do not fit a head of {config['head_dim']}",
    )
