"""Gemma 2: Gemma with norms after the branches too, capped scores and logits, and a window on every other layer."""

from __future__ import annotations

from .common import ATTENTION, GATED_FFN, GGUF_NAMES, HF_NAMES, POST_NORMS, PRE_NORMS, Architecture, Decoder, in_layers
from .fields import Fields
from .gemma import embedding_scale
from .usual import every, gguf_decoder, gguf_windows, hf_decoder, hf_window, hf_windows

GGUF_ROLES = in_layers(*PRE_NORMS, *POST_NORMS, *ATTENTION, *GATED_FFN)
# The norm before the FFN has the name that Llama gives it, which here is that of the norm after attention.
GEMMA_HF_NAMES = {**HF_NAMES, "layers.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm.weight"}


def gguf_attention_scale(decoder: Decoder, n_layers_of_27b: int) -> float:
    """The largest models of Gemma 2 and 3 scale queries by their share of the width; the files do not say so."""
    config = decoder.config
    large = config["n_layers"] == n_layers_of_27b
    scale: float = (config["n_embd"] / config["n_heads"] if large else config["head_dim"]) ** -0.5
    return scale


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `gemma2.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="half", activation="gelu_tanh", roles=GGUF_ROLES)
    layers = decoder.config["n_layers"]
    return decoder.but(
        embedding_scale=embedding_scale(decoder),
        attn_scale=gguf_attention_scale(decoder, 46),
        attn_softcap=fields.number("attn_logit_softcapping", 50.0),
        logit_softcap=fields.number("final_logit_softcapping", 30.0),
        window=gguf_windows(fields, layers, every(2, layers), 4096),
    )


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    fields.need_off("use_bidirectional_attention")
    for key in ("hidden_act", "cache_implementation"):
        fields.has(key)  # hidden_activation is what counts
    decoder = hf_decoder(
        fields,
        n_vocab,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        context=8192,
        heads=8,
        kv_heads=4,
        head_dim=256,
        tied=True,
        bias_flags=True,
        roles=in_layers(*POST_NORMS),
    )
    layers = decoder.config["n_layers"]
    window = hf_window(fields, None if "sliding_window" in fields.values else 4096)
    return decoder.but(
        embedding_scale=embedding_scale(decoder),
        attn_scale=fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attn_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        window=hf_windows(fields, layers, window, every(2, layers)),
    )


def _cap(fields: Fields, key: str, missing: float) -> float:
    if key in fields.values and not fields.has(key):
        return 0.0  # null switches it off
    return fields.number(key, missing)


ARCHITECTURE = Architecture(
    name="gemma2",
    gguf=("gemma2",),
    hf=("Gemma2ForCausalLM",),
    gguf_config=gguf_config,
    hf_config=hf_config,
    gguf_names=GGUF_NAMES,
    hf_names=GEMMA_HF_NAMES,
    hf_norm_offset=1.0,
)
