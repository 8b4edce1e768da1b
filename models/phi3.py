"""Phi-3, Phi-3.5 and Phi-4: Llama whose checkpoints fuse q, k, v and gate, up, with a window and LongRoPE on some models.

LongRoPE has two sets of factors: one for contexts up to that before scaling, one for longer ones.
"""

from __future__ import annotations

from dataclasses import replace

from .common import Architecture, Decoder, Fused, in_layers
from .fields import Fields
from .rope import hf_rope
from .usual import GLOBAL, gguf_decoder, hf_decoder, hf_window

FUSED = {
    "attn_qkv": Fused(("attn_q", "attn_k", "attn_v")),
    "ffn_gate_up": Fused(("ffn_gate", "ffn_up")),
}
ROLES = in_layers("attn_norm", "attn_qkv", "attn_o", "ffn_norm", "ffn_gate_up", "ffn_down")


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `phi3.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="half", roles=ROLES)
    window = fields.integer("attention.sliding_window", 0, low=0, high=1 << 30)
    return decoder.but(window=[window] * decoder.config["n_layers"])


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json. The `su` and `yarn` of older files are LongRoPE."""
    values = dict(fields.values)
    for key in ("rope_scaling", "rope_parameters"):
        scaling = values.get(key)
        if isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) in ("su", "yarn"):
            values[key] = {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": "longrope"}
    n_embd, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    context = fields.integer("max_position_embeddings", 4096, high=1 << 30)
    for key in (
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    ):
        fields.has(key)
    rope = hf_rope(Fields(values, fields.where), max(1, n_embd // heads), context)
    decoder = hf_decoder(fields, n_vocab, context=4096, eps=("rms_norm_eps", 1e-5), rope=rope)
    window = hf_window(fields) or 0
    return replace(decoder, required=(*GLOBAL, *ROLES)).but(window=[window] * decoder.config["n_layers"])


ARCHITECTURE = Architecture(
    name="phi3",
    gguf=("phi3",),
    hf=("Phi3ForCausalLM",),
    gguf_config=gguf_config,
    hf_config=hf_config,
    fused=FUSED,
)
