"""Gemma 1: Llama with GELU, a factor on the embedding and norms whose weights lack their 1. Gemma 2 and 3 build on it."""

from __future__ import annotations

import math

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder


def embedding_scale(decoder: Decoder) -> float:
    """All Gemmas multiply embeddings by the root of their width."""
    return math.sqrt(decoder.config["n_embd"])


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `gemma.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="half", activation="gelu_tanh")
    return decoder.but(embedding_scale=embedding_scale(decoder))


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json. The `gelu` of the official files means its tanh form."""
    fields.need_off("use_bidirectional_attention")
    key = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    fields.has("hidden_act")  # beside hidden_activation it means nothing
    decoder = hf_decoder(
        fields,
        n_vocab,
        activation=(key, "gelu_pytorch_tanh"),
        context=8192,
        heads=16,
        kv_heads=16,
        head_dim=256,
        tied=True,
        bias_flags=True,
    )
    if decoder.config["activation"] == "gelu":
        decoder = decoder.but(activation="gelu_tanh")
    return decoder.but(embedding_scale=embedding_scale(decoder))


ARCHITECTURE = Architecture(
    name="gemma",
    gguf=("gemma",),
    hf=("GemmaForCausalLM",),
    gguf_config=gguf_config,
    hf_config=hf_config,
    hf_norm_offset=1.0,
)
