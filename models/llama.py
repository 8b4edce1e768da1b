"""Llama and what shares its graph: RMSNorm, rotary attention with grouped queries, gated SiLU feed-forward.

GGUF stores the rows of q and k so that a rotated pair is adjacent (`interleaved`); transformers keeps the halves apart.
"""

from __future__ import annotations

from ..errors import UnsupportedModelError
from .common import (
    ATTENTION_BIASES,
    GATED_DECODER,
    GGUF_NAMES,
    HF_NAMES,
    Architecture,
    Config,
    Decoder,
    Fields,
)
from .rope import gguf_scaling, hf_scaling


def _refuse_experts(fields: Fields, key: str) -> None:
    if fields.has(key) and fields.integer(key, low=0) > 0:
        raise UnsupportedModelError(f"{fields.where}: mixtures of experts are not supported; use a dense model")


def _base(fields: Fields, n_vocab: int, head_dim: int, heads: int, kv_heads: int, n_embd: int) -> Config:
    return {
        "architecture": "llama",
        "n_embd": n_embd,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "n_vocab": n_vocab,
        "norm": "rms",
        "activation": "silu",
        "ffn_gated": True,
    }


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `llama.`."""
    _refuse_experts(fields, "expert_count")
    n_embd, heads = fields.integer("embedding_length"), fields.integer("attention.head_count", high=1 << 14)
    kv_heads = fields.integer("attention.head_count_kv", heads, high=1 << 14)
    head_dim = fields.integer("attention.key_length", max(1, n_embd // heads), high=1 << 14)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{fields.where}: keys and values of different lengths are not supported")
    rope_dims = fields.integer("rope.dimension_count", head_dim)
    theta = fields.number("rope.freq_base", 10000.0, low=1.0)
    context = fields.integer("context_length", high=1 << 30)
    layers = fields.integer("block_count", high=1 << 12)
    factors, mscale = gguf_scaling(fields, rope_dims, theta, context)
    config = {
        **_base(fields, n_vocab, head_dim, heads, kv_heads, n_embd),
        "n_layers": layers,
        "n_ff": fields.integer("feed_forward_length"),
        "n_ctx_train": context,
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon", high=1.0),
        "rope_style": "interleaved",
        "rope_dims": rope_dims,
        "rope_theta": theta,
        "rope_mscale": mscale,
    }
    if fields.has("attention.sliding_window"):
        config["window"] = [fields.integer("attention.sliding_window", low=0, high=1 << 30)] * layers
    return Decoder(config, factors)


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    _refuse_experts(fields, "num_local_experts")
    if fields.text("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(
            f"{fields.where}: activation {fields.text('hidden_act')!r} is not supported for Llama"
        )
    n_embd, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    kv_heads = fields.integer("num_key_value_heads", heads, high=1 << 14)
    head_dim = fields.integer("head_dim", max(1, n_embd // heads), high=1 << 14)
    context = fields.integer("max_position_embeddings", 2048, high=1 << 30)
    layers = fields.integer("num_hidden_layers", high=1 << 12)
    # Current files keep base and scaling together in rope_parameters; older ones apart.
    scaling = fields.get("rope_parameters", fields.get("rope_scaling", {}))
    if not isinstance(scaling, dict):
        raise fields.fail("rope_scaling", "is not an object")
    theta = Fields(scaling, fields.where).number("rope_theta", fields.number("rope_theta", 10000.0, low=1.0), low=1.0)
    factors, mscale = hf_scaling(scaling, fields.where, head_dim, theta, context)
    config = {
        **_base(fields, n_vocab, head_dim, heads, kv_heads, n_embd),
        "n_layers": layers,
        "n_ff": fields.integer("intermediate_size"),
        "n_ctx_train": context,
        "norm_eps": fields.number("rms_norm_eps", 1e-6, high=1.0),
        "rope_style": "half",
        "rope_dims": head_dim,
        "rope_theta": theta,
        "rope_mscale": mscale,
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
    }
    if fields.has("sliding_window"):
        config["window"] = [fields.integer("sliding_window", low=0, high=1 << 30)] * layers
    return Decoder(config, factors)


ARCHITECTURE = Architecture(
    name="llama",
    gguf=("llama",),
    hf=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf_config=gguf_config,
    hf_config=hf_config,
    required=GATED_DECODER,
    optional=("output", "rope_factors", *ATTENTION_BIASES),
    gguf_names=GGUF_NAMES,
    hf_names=HF_NAMES,
    ignored=("blk.{i}.attn_rot_embd.weight", "model.layers.{i}.self_attn.rotary_emb.inv_freq"),
)
