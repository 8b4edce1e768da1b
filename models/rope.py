"""Scalings of the rotary position embedding, resolved into divisors of the inverse frequencies and a factor on cos and sin.

The inverse frequencies are `theta ** (-2 i / dims)`, i < dims / 2; each is divided by its factor.
"""

from __future__ import annotations

import math

from ..errors import UnsupportedModelError
from .common import Fields


def yarn(
    dims: int, theta: float, factor: float, context: int, beta_fast: float = 32.0, beta_slow: float = 1.0
) -> list[float]:
    """YaRN (arXiv 2309.00071): fast dimensions keep their frequency, slow ones are interpolated, with a ramp between.
    `context` is the length before scaling. Returns the divisors."""

    def dimension(turns: float) -> float:
        return dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0, math.floor(dimension(beta_fast)))
    high = min(dims - 1, math.ceil(dimension(beta_slow)))
    factors = []
    for i in range(dims // 2):
        keep = 1.0 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
        factors.append(1.0 / (keep + (1.0 - keep) / factor))
    return factors


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cos and sin, which sharpens attention over the longer context."""
    return 1.0 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def llama3(dims: int, theta: float, factor: float, low_freq: float, high_freq: float, context: int) -> list[float]:
    """Llama 3.1: wavelengths above `context / low_freq` are interpolated, below `context / high_freq` kept, between them
    mixed. Returns the divisors."""
    factors = []
    for i in range(dims // 2):
        turns = context / (2 * math.pi * theta ** (2 * i / dims))
        keep = min(1.0, max(0.0, (turns - low_freq) / (high_freq - low_freq)))
        factors.append(1.0 / (keep + (1.0 - keep) / factor))
    return factors


def gguf_scaling(fields: Fields, dims: int, theta: float, context: int) -> tuple[list[float] | None, float]:
    """The scaling that a GGUF file's metadata ask for: divisors (None for none) and the factor on cos and sin. The divisors
    in a file's `rope_freqs` tensor come on top."""
    kind = fields.text("rope.scaling.type", "linear")
    # Old converters wrote only the factor of a linear scaling.
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None, 1.0
    if kind == "linear":
        return [factor] * (dims // 2), 1.0
    if kind == "yarn":
        original = fields.integer("rope.scaling.original_context_length", context)
        fast = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        slow = fields.number("rope.scaling.yarn_beta_slow", 1.0)
        return yarn(dims, theta, factor, original, fast, slow), yarn_mscale(factor) * attention
    raise UnsupportedModelError(
        f"{fields.where}: RoPE scaling {kind!r} is not supported for this architecture (linear and yarn are)"
    )


def hf_scaling(
    scaling: dict[str, object] | None, where: str, dims: int, theta: float, context: int
) -> tuple[list[float] | None, float]:
    """The same for `rope_scaling` of a Hugging Face config.json (`context` is `max_position_embeddings`)."""
    fields = Fields(scaling or {}, where, "")
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind == "default":
        return None, 1.0
    factor = fields.number("factor")
    if kind == "linear":
        return [factor] * (dims // 2), 1.0
    original = fields.integer("original_max_position_embeddings", context)
    if kind == "yarn":
        fast, slow = fields.number("beta_fast", 32.0), fields.number("beta_slow", 1.0)
        if not fields.flag("truncate", True):
            raise UnsupportedModelError(f"{where}: YaRN with unrounded limits is not supported")
        mscale = yarn_mscale(factor)
        if fields.has("mscale") and fields.has("mscale_all_dim"):
            mscale = yarn_mscale(factor, fields.number("mscale")) / yarn_mscale(factor, fields.number("mscale_all_dim"))
        return yarn(dims, theta, factor, original, fast, slow), fields.number("attention_factor", mscale)
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return llama3(dims, theta, factor, low, high, original), 1.0
    raise UnsupportedModelError(f"{where}: RoPE scaling {kind!r} is not supported (linear, llama3 and yarn are)")
