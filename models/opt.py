"""OPT: LayerNorm, learned positions, biases everywhere, ReLU without a gate. Its sources are Hugging Face directories only."""

from __future__ import annotations

from .common import ATTENTION, PLAIN_FFN, PRE_NORMS, Architecture, Decoder, in_layers
from .fields import Fields
from .usual import hf_activation

_LAYER = "model.decoder.layers.{i}."
_IN_LAYER = {
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}
NAMES = {
    "token_embd": "model.decoder.embed_tokens.weight",
    "position_embd": "model.decoder.embed_positions.weight",
    "output_norm": "model.decoder.final_layer_norm.weight",
    "output_norm.bias": "model.decoder.final_layer_norm.bias",
    "output": "lm_head.weight",
    **{f"layers.{{i}}.{role}": f"{_LAYER}{name}.weight" for role, name in _IN_LAYER.items()},
    **{f"layers.{{i}}.{role}.bias": f"{_LAYER}{name}.bias" for role, name in _IN_LAYER.items()},
}


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    n_embd, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1 << 14)
    fields.need_off("_remove_final_layer_norm")
    for key in ("do_layer_norm_before", "layer_norm_elementwise_affine"):
        if not fields.flag(key, True):
            raise fields.unsupported(key, "is false; this variant of OPT (350m) is not supported")
    if fields.integer("word_embed_proj_dim", n_embd) != n_embd:
        raise fields.unsupported("word_embed_proj_dim", f"is not hidden_size, {n_embd}; not supported")
    required: tuple[str, ...] = ("token_embd", "position_embd", "output_norm", "output_norm.bias")
    required += in_layers(*PRE_NORMS, *ATTENTION, *PLAIN_FFN) + in_layers(*PRE_NORMS, bias=True)
    if fields.flag("enable_bias", True):
        required += in_layers(*ATTENTION, *PLAIN_FFN, bias=True)
    config = {
        "n_layers": fields.integer("num_hidden_layers", high=1 << 12),
        "n_embd": n_embd,
        "n_heads": heads,
        "n_kv_heads": heads,
        "head_dim": max(1, n_embd // heads),
        "n_ff": fields.integer("ffn_dim"),
        "n_vocab": n_vocab,
        "n_ctx_train": fields.integer("max_position_embeddings", 2048, high=1 << 24),
        "norm": "layer",
        "norm_eps": 1e-5,
        **hf_activation(fields, "activation_function", "relu"),
        "ffn_gated": False,
        "rope_style": "none",
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
    }
    return Decoder(config, required, () if config["tied_embeddings"] else ("output",))


ARCHITECTURE = Architecture(
    name="opt",
    hf=("OPTForCausalLM",),
    hf_config=hf_config,
    hf_names=NAMES,
    hf_positions_offset=2,
    hf_renames={"decoder.": "model.decoder."},
)
