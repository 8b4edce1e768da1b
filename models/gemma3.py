"""Gemma 3: Gemma 2 without caps on scores, with norms on every head of q and k, and two bases of rotation: windowed layers
have a small one, every sixth layer sees everything. Of the models that also see images, the text part is taken."""

from __future__ import annotations

from dataclasses import replace

from .common import QK_NORMS, Architecture, Decoder, in_layers
from .fields import Fields
from .gemma import embedding_scale
from .gemma2 import GEMMA_HF_NAMES, GGUF_ROLES, gguf_attention_scale
from .rope import hf_rope
from .usual import every, gguf_decoder, gguf_windows, hf_decoder, hf_window, hf_windows

LOCAL_THETA, GLOBAL_THETA = 10000.0, 1000000.0


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `gemma3.`."""
    roles = (*GGUF_ROLES, *in_layers(*QK_NORMS))
    decoder = gguf_decoder(fields, n_vocab, rope_style="half", activation="gelu_tanh", theta=GLOBAL_THETA, roles=roles)
    layers = decoder.config["n_layers"]
    decoder = decoder.but(
        embedding_scale=embedding_scale(decoder),
        attn_scale=gguf_attention_scale(decoder, 62),
        logit_softcap=fields.number("final_logit_softcapping", low=-1.0)
        if fields.has("final_logit_softcapping")
        else 0.0,
        rope_theta_local=fields.number("rope.freq_base_swa", LOCAL_THETA, low=1.0),
        window=gguf_windows(fields, layers, every(6, layers)),
    )
    return replace(decoder, local_rope=True)


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json, or from the `text_config` of one; that may lack what is default."""
    fields.need_off("use_bidirectional_attention", "attn_logit_softcapping")
    for key in ("hidden_act", "cache_implementation"):
        fields.has(key)  # hidden_activation is what counts
    head_dim = fields.integer("head_dim", 256, high=1 << 14)
    context = fields.integer("max_position_embeddings", 131072, high=1 << 30)
    rope = hf_rope(fields, head_dim, context, theta=GLOBAL_THETA, layers="full_attention")
    local = hf_rope(
        fields,
        head_dim,
        context,
        theta=LOCAL_THETA,
        layers="sliding_attention",
        old_theta="rope_local_base_freq",
        scaled=False,
    )
    if local.scaling.factors is not None or local.dims != rope.dims:
        raise fields.unsupported("rope_parameters", "scales the windowed layers; not supported")
    decoder = hf_decoder(
        fields,
        n_vocab,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        context=131072,
        heads=8,
        kv_heads=4,
        head_dim=256,
        tied=True,
        rope=rope,
        bias_flags=True,
        roles=in_layers("post_attn_norm", "post_ffn_norm", *QK_NORMS),
    )
    layers = decoder.config["n_layers"]
    window = hf_window(fields, None if "sliding_window" in fields.values else 4096)
    period = fields.integer("_sliding_window_pattern", fields.integer("sliding_window_pattern", 6))
    decoder = decoder.but(
        embedding_scale=embedding_scale(decoder),
        attn_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_softcap=fields.number("final_logit_softcapping") if fields.has("final_logit_softcapping") else 0.0,
        rope_theta_local=local.theta,
        window=hf_windows(fields, layers, window, every(period, layers)),
    )
    return replace(decoder, local_rope=True)


ARCHITECTURE = Architecture(
    name="gemma3",
    gguf=("gemma3",),
    hf=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf_config=gguf_config,
    hf_config=hf_config,
    hf_names=GEMMA_HF_NAMES,
    hf_norm_offset=1.0,
    hf_nested="text_config",
    hf_vocabulary=262208,
    hf_renames={
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
    },
    ignored=("vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*", "model.multi_modal_projector.*"),
)
