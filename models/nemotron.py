"""Nemotron 4 and Minitron: LayerNorm whose weights lack their 1, squared ReLU without a gate, half of each head rotated."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `nemotron.`."""
    return gguf_decoder(fields, n_vocab, rope_style="half", activation="relu2", gated=False, norm="layer")


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    for old, new in (("partial_rotary_percent", "partial_rotary_factor"), ("rope_percent", "partial_rotary_factor")):
        if fields.has(old) and not fields.has(new):
            fields.values = {**fields.values, new: fields.number(old)}
    return hf_decoder(
        fields,
        n_vocab,
        activation=("hidden_act", "relu2"),
        context=4096,
        partial=0.5,
        eps=("norm_eps", 1e-5),
        gated=False,
        norm="layer",
        bias_flags=True,
    )


ARCHITECTURE = Architecture(
    name="nemotron",
    gguf=("nemotron",),
    hf=("NemotronForCausalLM",),
    gguf_config=gguf_config,
    hf_config=hf_config,
    hf_norm_offset=1.0,
)
