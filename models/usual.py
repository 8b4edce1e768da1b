"""The usual keys of a checkpoint's metadata, read once for all families; an architecture's file says what differs."""

from __future__ import annotations

from typing import Any

from .common import (
    ATTENTION,
    GATED_FFN,
    PLAIN_FFN,
    PRE_NORMS,
    Config,
    Decoder,
    in_layers,
)
from .fields import Fields
from .rope import SHORT_FACTORS, Rope, gguf_scaling, hf_rope

GLOBAL = ("token_embd", "output_norm")
GLOBAL_NORM_BIAS = ("output_norm.bias",)

# Names of activations in config.json: key and value in the packed model.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_pytorch": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "relu",
}


def hf_activation(fields: Fields, key: str = "hidden_act", default: str = "silu") -> Config:
    """The activation of a Hugging Face config.json in the packed model's keys."""
    name = fields.text(key, default)
    activation = fields.choice(key, _ACTIVATIONS, default)
    config: Config = {"activation": activation}
    if name == "fatrelu":
        threshold = fields.number("hidden_act_param", low=-1.0)
        if threshold > 0:
            config["activation_threshold"] = threshold
    return config


def refuse_experts(fields: Fields) -> None:
    """Mixtures of experts have the names of dense models here and there; refuse them by name."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "expert_count"):
        if fields.has(key) and fields.integer(key, low=0) > 0:
            raise fields.unsupported(key, "above 0: mixtures of experts are not supported; use a dense model")


def hf_decoder(
    fields: Fields,
    n_vocab: int,
    *,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    context: int = 2048,
    theta: float = 10000.0,
    partial: float = 1.0,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    gated: bool = True,
    norm: str = "rms",
    rope: Rope | None = None,
    bias_flags: bool = False,
    roles: tuple[str, ...] = (),
) -> Decoder:
    """What most of transformers' decoders write into config.json. Arguments are the family's defaults, for keys that a file
    may lack. `bias_flags`: the family has `attention_bias` and `mlp_bias`; `roles` are required beside the usual ones."""
    refuse_experts(fields)
    n_embd = fields.integer("hidden_size")
    n_heads = fields.integer("num_attention_heads", heads, high=1 << 14)
    kv_heads = fields.integer("num_key_value_heads", kv_heads or n_heads, high=1 << 14)
    head_dim = fields.integer("head_dim", head_dim or max(1, n_embd // n_heads), high=1 << 14)
    n_ctx = fields.integer("max_position_embeddings", context, high=1 << 30)
    if rope is None:
        rope = hf_rope(fields, head_dim, n_ctx, theta=theta, partial=partial)
    ffn = GATED_FFN if gated else PLAIN_FFN
    required = (*GLOBAL, *in_layers(*PRE_NORMS, *ATTENTION, *ffn), *roles)
    if norm == "layer":
        required += (*GLOBAL_NORM_BIAS, *in_layers(*PRE_NORMS, bias=True))
    if bias_flags and fields.flag("attention_bias", False):
        required += in_layers(*ATTENTION, bias=True)
    if bias_flags and fields.flag("mlp_bias", False):
        required += in_layers(*ffn, bias=True)
    config = {
        "n_layers": fields.integer("num_hidden_layers", high=1 << 12),
        "n_embd": n_embd,
        "n_heads": n_heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "n_ff": fields.integer("intermediate_size"),
        "n_vocab": n_vocab,
        "n_ctx_train": n_ctx,
        "norm": norm,
        "norm_eps": fields.number(*eps, high=1.0),
        **hf_activation(fields, *activation),
        "ffn_gated": gated,
        **rope_config(rope, "half"),
        "tied_embeddings": fields.flag("tie_word_embeddings", tied),
    }
    optional = () if config["tied_embeddings"] else ("output",)
    return Decoder(config, required, optional, rope.scaling)


def rope_config(rope: Rope, style: str) -> Config:
    """The rotation in the packed model's keys."""
    config: Config = {
        "rope_style": style,
        "rope_dims": rope.dims,
        "rope_theta": rope.theta,
        "rope_mscale": rope.scaling.mscale,
    }
    if rope.scaling.short_context is not None:
        config["rope_long_context"] = rope.scaling.short_context
    return config


def hf_windows(fields: Fields, layers: int, window: int | None, default: list[bool]) -> list[int]:
    """The window of every layer: `layer_types` says which layers have one, `default` where a file lacks it."""
    sliding = default
    if fields.has("layer_types"):
        kinds = fields.per_layer("layer_types", layers)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise fields.unsupported("layer_types", f"holds {kind!r}, which is not supported")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and window is None:
        raise fields.fail("sliding_window", "is missing")
    return [window or 0 if flag else 0 for flag in sliding]


def hf_window(fields: Fields, default: int | None = None) -> int | None:
    """`sliding_window`, None where it is null or missing."""
    return fields.integer("sliding_window", low=1, high=1 << 30) if fields.has("sliding_window") else default


def gguf_decoder(
    fields: Fields,
    n_vocab: int,
    *,
    rope_style: str,
    activation: str = "silu",
    gated: bool = True,
    norm: str = "rms",
    theta: float = 10000.0,
    roles: tuple[str, ...] | None = None,
    optional: tuple[str, ...] = (),
) -> Decoder:
    """What llama.cpp's converter writes for most decoders; `fields` has the prefix `ARCHITECTURE.`. GGUF has no flags for
    biases: they are there or not. `roles` replace the usual ones of a layer."""
    refuse_experts(fields)
    n_embd, n_heads = fields.integer("embedding_length"), fields.integer("attention.head_count", high=1 << 14)
    kv_heads = fields.integer("attention.head_count_kv", n_heads, high=1 << 14)
    head_dim = fields.integer("attention.key_length", max(1, n_embd // n_heads), high=1 << 14)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.unsupported("attention.value_length", "differs from that of keys; not supported")
    dims = fields.integer("rope.dimension_count", head_dim)
    base = fields.number("rope.freq_base", theta, low=1.0)
    context = fields.integer("context_length", high=1 << 30)
    scaling = gguf_scaling(fields, dims, base, context)
    ffn = GATED_FFN if gated else PLAIN_FFN
    if roles is None:
        roles = in_layers(*PRE_NORMS, *ATTENTION, *ffn)
    required: tuple[str, ...] = (*GLOBAL, *roles)
    if norm == "layer":
        required += (*GLOBAL_NORM_BIAS, *in_layers(*(n for n in PRE_NORMS if f"layers.{{i}}.{n}" in roles), bias=True))
    biases = tuple(role + ".bias" for role in roles if not role.endswith("norm"))
    eps = "attention.layer_norm_rms_epsilon" if norm == "rms" else "attention.layer_norm_epsilon"
    config: dict[str, Any] = {
        "n_layers": fields.integer("block_count", high=1 << 12),
        "n_embd": n_embd,
        "n_heads": n_heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_dim,
        "n_ff": fields.integer("feed_forward_length"),
        "n_vocab": n_vocab,
        "n_ctx_train": context,
        "norm": norm,
        "norm_eps": fields.number(eps, high=1.0),
        "activation": activation,
        "ffn_gated": gated,
        **rope_config(Rope(dims, base, scaling), rope_style),
    }
    optional = ("output", "rope_factors", *biases, *optional)
    if scaling.short_context is None:
        return Decoder(config, required, optional, scaling)
    required += ("rope_factors", "rope_factors_long")
    return Decoder(config, required, optional, scaling, names={"rope_factors": SHORT_FACTORS})


def gguf_windows(fields: Fields, layers: int, default: list[bool], window: int | None = None) -> list[int]:
    """The window of every layer; `default` says which layers have one where the file does not, `window` how long it is then."""
    if not fields.has("attention.sliding_window") and window is None:
        return [0] * layers
    size = fields.integer("attention.sliding_window", window, low=0, high=1 << 30)
    sliding = default
    if fields.has("attention.sliding_window_pattern"):
        value = fields.get("attention.sliding_window_pattern")
        if isinstance(value, list):
            sliding = [bool(flag) for flag in fields.per_layer("attention.sliding_window_pattern", layers)]
        else:
            period = fields.integer("attention.sliding_window_pattern")
            sliding = [(i + 1) % period != 0 for i in range(layers)]
    return [size if flag else 0 for flag in sliding]


def every(period: int, layers: int) -> list[bool]:
    """True for all layers but every `period`-th."""
    return [(i + 1) % period != 0 for i in range(layers)]
