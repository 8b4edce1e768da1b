"""Bamboo and TurboSparse-Mistral: Mistral with a ReLU on gate and on up (dReLU), about nine of ten neurons exactly zero."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import hf_decoder, hf_window


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    decoder = hf_decoder(fields, n_vocab, activation=("hidden_act", "relu"), context=4096 * 32, kv_heads=8)
    if decoder.config["activation"] != "relu":
        raise fields.unsupported("hidden_act", f"is {fields.text('hidden_act')!r}; Bamboo is supported with relu")
    window = hf_window(fields, None if "sliding_window" in fields.values else 4096)
    return decoder.but(up_relu=True, window=[window or 0] * decoder.config["n_layers"])


ARCHITECTURE = Architecture(name="bamboo", hf=("BambooForCausalLM",), hf_config=hf_config)
