"""MiniCPM 1 and 2 (also ProSparse-MiniCPM and the models of the Sparsing Law): Llama with factors on embedding, residual
branches and logits."""

from __future__ import annotations

import math

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `minicpm.`. Old files lack the factors, which were the
    same for all models then."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="interleaved")
    config = decoder.config
    return decoder.but(
        embedding_scale=fields.number("embedding_scale", 12.0),
        residual_scale=fields.number("residual_scale", 1.4 / math.sqrt(config["n_layers"])),
        logit_scale=1.0 / fields.number("logit_scale", config["n_embd"] / 256.0),
    )


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    decoder = hf_decoder(fields, n_vocab, tied=True, bias_flags=True)
    config = decoder.config
    return decoder.but(
        embedding_scale=fields.number("scale_emb", 1.0),
        residual_scale=fields.number("scale_depth", 1.0) / math.sqrt(config["n_layers"]),
        logit_scale=fields.number("dim_model_base", 1.0) / config["n_embd"],
    )


ARCHITECTURE = Architecture(
    name="minicpm",
    gguf=("minicpm",),
    hf=("MiniCPMForCausalLM",),
    gguf_config=gguf_config,
    hf_config=hf_config,
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)
