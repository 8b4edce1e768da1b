"""Qwen 2 and 2.5: Llama with biases on q, k and v, and an optional window on the upper layers."""

from __future__ import annotations

from .common import Architecture, Decoder, in_layers
from .fields import Fields
from .usual import gguf_decoder, hf_decoder, hf_window, hf_windows


def hf_upper_windows(fields: Fields, layers: int) -> list[int]:
    """Windows as Qwen 2 and 3 have them: where they are used at all, on the layers from `max_window_layers` on."""
    used = fields.flag("use_sliding_window", False)
    window = hf_window(fields, 4096) if used else None
    first = fields.integer("max_window_layers", 28, low=0)
    return hf_windows(fields, layers, window, [window is not None and i >= first for i in range(layers)])


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `qwen2.`."""
    return gguf_decoder(fields, n_vocab, rope_style="half")


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    roles = in_layers("attn_q", "attn_k", "attn_v", bias=True)
    decoder = hf_decoder(fields, n_vocab, context=32768, roles=roles)
    return decoder.but(window=hf_upper_windows(fields, decoder.config["n_layers"]))


ARCHITECTURE = Architecture(
    name="qwen2", gguf=("qwen2",), hf=("Qwen2ForCausalLM",), gguf_config=gguf_config, hf_config=hf_config
)
