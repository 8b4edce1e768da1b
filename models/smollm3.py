"""SmolLM 3: Llama of which every fourth layer does not rotate queries and keys (NoPE)."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import every, gguf_decoder, hf_decoder, hf_window, hf_windows


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `smollm3.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="interleaved")
    return decoder.but(rope_layers=every(4, decoder.config["n_layers"]))


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json. In `no_rope_layers`, 1 stands for a layer that does rotate."""
    decoder = hf_decoder(fields, n_vocab, context=32768, theta=2000000.0, kv_heads=4, tied=True, bias_flags=True)
    layers = decoder.config["n_layers"]
    rotates = every(fields.integer("no_rope_layer_interval", 4), layers)
    if fields.has("no_rope_layers"):
        rotates = [bool(flag) for flag in fields.per_layer("no_rope_layers", layers)]
    window = hf_window(fields) if fields.flag("use_sliding_window", False) else None
    fields.has("sliding_window")  # means nothing unless it is used
    windows = hf_windows(fields, layers, window, [window is not None and not flag for flag in rotates])
    return decoder.but(rope_layers=rotates, window=windows)


ARCHITECTURE = Architecture(
    name="smollm3", gguf=("smollm3",), hf=("SmolLM3ForCausalLM",), gguf_config=gguf_config, hf_config=hf_config
)
