"""How the next token is chosen: one set of options for the Python API, the command line and whatever comes later."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from . import _core


@dataclass(frozen=True)
class Sampling:
    """Sampling options, in llama.cpp's meaning and with its defaults.

    temperature: 0 takes the most likely token (greedy); larger is more varied.
    top_k: keep the k most likely tokens, 0 = all.
    top_p: keep the most likely tokens whose probabilities sum to p, 1 = all.
    min_p: keep tokens at least this fraction as likely as the likeliest, 0 = all.
    repeat_penalty: divides the logits of recent tokens, 1 = off.
    repeat_last_n: how many recent tokens that looks at, 0 = none, -1 = the whole context.
    seed: -1 takes a fresh one each time.

    >>> Sampling(temperature=0).temperature
    0
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise UsageError(f"{field.name} is a number, not {value!r}")

        def check(name: str, value: float, sound: bool, wanted: str) -> None:
            if not math.isfinite(value) or not sound:
                raise UsageError(f"{name} is {value}; it must be {wanted}")

        check("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all tokens) or a number up to 2^31 - 1")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        check("repeat_penalty", self.repeat_penalty, self.repeat_penalty > 0, "above 0 (1 = off)")
        check(
            "repeat_last_n",
            self.repeat_last_n,
            -1 <= self.repeat_last_n < 2**31,
            "-1 (the whole context) or a number up to 2^31 - 1",
        )
        check("seed", self.seed, -1 <= self.seed < 2**63, "-1 (a fresh one) or a number from 0 to 2^63 - 1")

    def sampler(self, n_ctx: int) -> _core.Sampler:
        """A new sampler of the core with these options, for a context of `n_ctx` tokens."""
        from . import _core

        return _core.Sampler(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=n_ctx if self.repeat_last_n < 0 else self.repeat_last_n,
            seed=self.seed,
        )
