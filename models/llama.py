"""Llama and what shares its graph: RMSNorm, rotary attention with grouped queries, gated feed-forward (SmolLM 2, TinyLlama,
ReluLLaMA, ProSparse).

GGUF stores the rows of q and k so that a rotated pair is adjacent (`interleaved`); transformers keeps the halves apart.
"""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder

SPARSE = "SparseLlamaForCausalLM"  # ProSparse; others use the name for other things


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `llama.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="interleaved")
    if fields.has("attention.sliding_window"):
        window = fields.integer("attention.sliding_window", low=0, high=1 << 30)
        decoder = decoder.but(window=[window] * decoder.config["n_layers"])
    return decoder


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    names = fields.get("architectures", [])
    if SPARSE in names and fields.text("hidden_act", "") != "fatrelu":
        raise fields.unsupported("architectures", f"is {SPARSE} without FATReLU, which is not supported")
    fields.need_off("rope_interleaved")
    return hf_decoder(fields, n_vocab, bias_flags=True)


ARCHITECTURE = Architecture(
    name="llama",
    gguf=("llama",),
    hf=("LlamaForCausalLM", SPARSE),
    gguf_config=gguf_config,
    hf_config=hf_config,
    ignored=("blk.{i}.attn_rot_embd.weight", "model.layers.{i}.self_attn.rotary_emb.inv_freq"),
)
