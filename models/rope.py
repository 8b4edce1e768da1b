"""Scalings of the rotary position embedding, resolved into divisors of the inverse frequencies and a factor on cos and sin.

The inverse frequencies are `theta ** (-2 i / dims)`, i < dims / 2; each is divided by its factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError
from .fields import Fields

# LongRoPE's divisors in GGUF files.
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Scaling:
    """`factors` [dims / 2] divide the inverse frequencies (None for none), `mscale` is the factor on cos and sin. LongRoPE:
    contexts longer than `short_context` have `long_factors` instead, which are the checkpoint's tensors where None."""

    factors: list[float] | None = None
    mscale: float = 1.0
    short_context: int | None = None
    long_factors: list[float] | None = None


@dataclass(frozen=True)
class Rope:
    """All about the rotation of one kind of layers."""

    dims: int
    theta: float
    scaling: Scaling


def yarn(
    dims: int,
    theta: float,
    factor: float,
    context: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    rounded: bool = True,
) -> list[float]:
    """YaRN (arXiv 2309.00071): fast dimensions keep their frequency, slow ones are interpolated, with a ramp between.
    `context` is the length before scaling. Returns the divisors."""

    def dimension(turns: float) -> float:
        return dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(dims - 1, high)
    factors = []
    for i in range(dims // 2):
        keep = 1.0 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        factors.append(1.0 / (keep + (1.0 - keep) / factor))
    return factors


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cos and sin, which sharpens attention over the longer context."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def longrope_mscale(factor: float, context: int) -> float:
    """LongRoPE's factor on cos and sin; `context` is the length before scaling."""
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0


def llama3(dims: int, theta: float, factor: float, low_freq: float, high_freq: float, context: int) -> list[float]:
    """Llama 3.1: wavelengths above `context / low_freq` are interpolated, below `context / high_freq` kept, between them
    mixed. Returns the divisors."""
    factors = []
    for i in range(dims // 2):
        turns = context / (2 * math.pi * theta ** (2 * i / dims))
        keep = min(1.0, max(0.0, (turns - low_freq) / (high_freq - low_freq)))
        factors.append(1.0 / (keep + (1.0 - keep) / factor))
    return factors


def gguf_scaling(fields: Fields, dims: int, theta: float, context: int) -> Scaling:
    """The scaling that a GGUF file's metadata ask for. The divisors in a file's `rope_freqs` tensor come on top; those of
    LongRoPE lie in `rope_factors_short` and `rope_factors_long`, and Phi-3's converters tell of it by these alone."""
    kind = fields.text("rope.scaling.type", "linear")
    # Old converters wrote only the factor of a linear scaling.
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    original = fields.integer("rope.scaling.original_context_length", context, high=1 << 30)
    if kind == "longrope" or LONG_FACTORS in fields.tensors:
        return Scaling(None, attention, original)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return Scaling(None, attention)
    if kind == "linear":
        return Scaling([factor] * (dims // 2), attention)
    if kind == "yarn":
        if fields.has("rope.scaling.yarn_ext_factor") and fields.number("rope.scaling.yarn_ext_factor", low=-2) > 0:
            mix = fields.number("rope.scaling.yarn_ext_factor")
            if mix != 1.0:
                raise fields.unsupported("rope.scaling.yarn_ext_factor", f"is {mix:g}; only 1 is supported")
        attention *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
        fast = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = fields.number("rope.scaling.yarn_beta_slow", 1.0)
        return Scaling(yarn(dims, theta, factor, original, fast, slow), yarn_mscale(factor) * attention)
    raise UnsupportedModelError(
        f"{fields.where}: RoPE scaling {kind!r} is not supported for this architecture (linear, longrope and yarn are)"
    )


def hf_rope(
    fields: Fields,
    head_dim: int,
    context: int,
    *,
    theta: float = 10000.0,
    partial: float = 1.0,
    layers: str | None = None,
    old_theta: str = "rope_theta",
    scaled: bool = True,
) -> Rope:
    """The rotation that a Hugging Face config.json asks for; `context` is `max_position_embeddings`, `theta` and `partial`
    the family's defaults. Where layers rotate differently, `layers` names the kind that is asked for, `old_theta` its base in
    older files, and `scaled` says whether their `rope_scaling` is meant for it."""
    # Current files keep everything together in rope_parameters, perhaps for each kind of layer; older ones apart.
    values = fields.get("rope_parameters", {})
    if not isinstance(values, dict):
        raise fields.fail("rope_parameters", "is not an object")
    kinds = [value for value in values.values() if isinstance(value, dict)]
    if layers is not None and kinds:
        values = values.get(layers) or {}
    elif kinds:
        raise fields.unsupported("rope_parameters", "differs from layer to layer; not supported for this architecture")
    older = fields.get("rope_scaling", {})
    if not isinstance(older, dict):
        raise fields.fail("rope_scaling", "is not an object")
    if scaled and older:
        values = older if layers is None else {**values, **older}
    inner = Fields(values, fields.where)
    theta = inner.number("rope_theta", fields.number(old_theta, theta, low=1.0), low=1.0)
    part = inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", partial, high=1.0), high=1.0)
    dims = int(head_dim * part)
    original = fields.integer("original_max_position_embeddings", context, high=1 << 30)
    scaling = hf_scaling(values, fields.where, dims, theta, context, original)
    return Rope(dims, theta, scaling)


# Keys of a scaling that may stand beside kinds which do not use them.
_SCALING_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def hf_scaling(
    values: dict[str, Any], where: str, dims: int, theta: float, context: int, original: int | None = None
) -> Scaling:
    """The scaling in `rope_parameters` or `rope_scaling` of a Hugging Face config.json; `original` is the length before it
    where the file says that outside."""
    fields = Fields(values, where)
    kind = fields.text("rope_type", fields.text("type", "default"))
    before = fields.integer("original_max_position_embeddings", original or context, high=1 << 30)
    scaling = _hf_scaling(fields, kind, dims, theta, context, before)
    fields.refuse_unknown(_SCALING_KEYS)
    return scaling


def _hf_scaling(fields: Fields, kind: str, dims: int, theta: float, context: int, original: int) -> Scaling:
    if kind == "default":
        return Scaling()
    if kind in ("longrope", "su"):
        long_factors = fields.numbers("long_factor", dims // 2)
        factor = fields.number("factor", context / original)
        mscale = fields.number("attention_factor", longrope_mscale(factor, original))
        return Scaling(fields.numbers("short_factor", dims // 2), mscale, original, long_factors)
    factor = fields.number("factor")
    if kind == "linear":
        return Scaling([factor] * (dims // 2))
    if kind == "yarn":
        fast, slow = fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0)
        mscale = yarn_mscale(factor)
        if fields.has("mscale") and fields.has("mscale_all_dim"):
            mscale = yarn_mscale(factor, fields.number("mscale")) / yarn_mscale(factor, fields.number("mscale_all_dim"))
        factors = yarn(dims, theta, factor, original, fast, slow, fields.flag("truncate", True))
        return Scaling(factors, fields.number("attention_factor", mscale))
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return Scaling(llama3(dims, theta, factor, low, high, original))
    raise fields.unsupported(
        "rope_type", f"is {kind!r}, which is not supported (linear, llama3, longrope and yarn are)"
    )
