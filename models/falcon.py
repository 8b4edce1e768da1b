"""Falcon 7B, 40B, 180B and ReluFalcon: LayerNorm, attention and FFN side by side, GELU without a gate, and q, k, v fused,
key head by key head. The small models with ALiBi are not supported."""

from __future__ import annotations

from dataclasses import replace

from .common import PLAIN_FFN, Architecture, Config, Decoder, Fused, in_layers
from .fields import Fields
from .rope import hf_rope
from .usual import GLOBAL, GLOBAL_NORM_BIAS, gguf_decoder, hf_activation, rope_config

_LAYER = "transformer.h.{i}."
_IN_LAYER = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_o": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
    # One norm for both branches, or one for each; the names of the second case are those below.
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HF_NAMES = {
    "token_embd": "transformer.word_embeddings.weight",
    "output_norm": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output": "lm_head.weight",
    **{f"layers.{{i}}.{role}": f"{_LAYER}{name}.weight" for role, name in _IN_LAYER.items()},
    **{f"layers.{{i}}.{role}.bias": f"{_LAYER}{name}.bias" for role, name in _IN_LAYER.items()},
}
TWO_NORMS = {
    f"layers.{{i}}.{role}{suffix}": f"{_LAYER}{name}{suffix or '.weight'}"
    for role, name in (("attn_norm", "ln_attn"), ("ffn_norm", "ln_mlp"))
    for suffix in ("", ".bias")
}
# llama.cpp calls the norm before attention attn_norm_2 where there are two, and that before the FFN attn_norm.
GGUF_TWO_NORMS = {
    f"layers.{{i}}.{role}{suffix}": f"blk.{{i}}.{name}{suffix or '.weight'}"
    for role, name in (("attn_norm", "attn_norm_2"), ("ffn_norm", "attn_norm"))
    for suffix in ("", ".bias")
}
GGUF_FUSED = {"attn_qkv": Fused(("attn_q", "attn_k", "attn_v"))}
MATRICES = in_layers("attn_qkv", "attn_o", *PLAIN_FFN)


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `falcon.`. The rows of q, k and v follow each other there."""
    decoder = gguf_decoder(
        fields, n_vocab, rope_style="half", activation="gelu", gated=False, norm="layer", roles=MATRICES
    )
    two = "blk.0.attn_norm_2.weight" in fields.tensors
    names = GGUF_TWO_NORMS if two else {}
    return replace(_with_norms(decoder.but(parallel_block=True), two), names=names, fused=GGUF_FUSED)


def _with_norms(decoder: Decoder, two: bool) -> Decoder:
    norms = ("attn_norm", "ffn_norm") if two else ("attn_norm",)
    return decoder.but(required=(*in_layers(*norms), *in_layers(*norms, bias=True)))


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json, also with the keys of the first ones."""
    for old, new in (
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_head_kv", "num_kv_heads"),
    ):
        if fields.has(old) and not fields.has(new):
            fields.values = {**fields.values, new: fields.integer(old)}
    if fields.flag("alibi", False):
        raise fields.unsupported("alibi", "is true; Falcon with ALiBi (rw-1b, rw-7b) is not supported")
    n_embd, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    modern = fields.flag("new_decoder_architecture", False)
    multi_query, parallel = fields.flag("multi_query", True), fields.flag("parallel_attn", True)
    kv_heads = fields.integer("num_kv_heads", heads) if modern else 1 if multi_query else heads
    fields.has("num_kv_heads")
    head_dim = max(1, n_embd // heads)
    context = fields.integer("max_position_embeddings", 2048, high=1 << 30)
    rope = hf_rope(fields, head_dim, context)
    tied = fields.flag("tie_word_embeddings", True)
    config: Config = {
        "n_layers": fields.integer("num_hidden_layers", high=1 << 12),
        "n_embd": n_embd,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "n_ff": fields.integer("ffn_hidden_size", 4 * n_embd),
        "n_vocab": n_vocab,
        "n_ctx_train": context,
        "norm": "layer",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5, high=1.0),
        **hf_activation(fields, "activation", "gelu"),
        "ffn_gated": False,
        **rope_config(rope, "half"),
        "parallel_block": modern or parallel,
        "tied_embeddings": tied,
    }
    required = (*GLOBAL, *GLOBAL_NORM_BIAS, *MATRICES)
    if fields.flag("bias", False):
        required += tuple(role + ".bias" for role in MATRICES)
    decoder = Decoder(config, required, () if tied else ("output",), rope.scaling)
    two_norms = fields.integer("num_ln_in_parallel_attn", 2 if modern else 1) == 2
    if two_norms and not (modern and parallel):
        raise fields.unsupported("num_ln_in_parallel_attn", "is 2 without the new decoder; not supported")
    if modern and not parallel:
        raise fields.unsupported("parallel_attn", "is false with the new decoder; not supported")
    decoder = replace(decoder, names=TWO_NORMS if two_norms else {})
    return _with_norms(decoder, two_norms or not config["parallel_block"])


ARCHITECTURE = Architecture(
    name="falcon",
    gguf=("falcon",),
    hf=("FalconForCausalLM", "RWForCausalLM"),
    gguf_config=gguf_config,
    hf_config=hf_config,
    hf_names=HF_NAMES,
    fused={"attn_qkv": Fused(("attn_q", "attn_k", "attn_v"), by_kv_head=True)},
)
