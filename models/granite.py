"""Granite 3: Llama with factors on embedding, attention scores, residual branches and logits."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `granite.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="interleaved")
    if fields.has("rope.scaling.finetuned") and not fields.flag("rope.scaling.finetuned"):
        decoder = decoder.but(rope_style="none")
    return decoder.but(
        embedding_scale=fields.number("embedding_scale", 1.0),
        residual_scale=fields.number("residual_scale", 1.0),
        attn_scale=fields.number("attention.scale", decoder.config["head_dim"] ** -0.5),
        logit_scale=1.0 / fields.number("logit_scale", 1.0),
    )


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    decoder = hf_decoder(fields, n_vocab, bias_flags=True)
    return decoder.but(
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        attn_scale=fields.number("attention_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
    )


ARCHITECTURE = Architecture(
    name="granite", gguf=("granite",), hf=("GraniteForCausalLM",), gguf_config=gguf_config, hf_config=hf_config
)
