"""Decoding with and without sparsity, measured in turns in one process, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .. import _core
    from ..sparsity import SparsityFile

_OPENING = 32  # tokens before the first measured one


@dataclass(frozen=True)
class SparseBenchResult:
    """Decode rates in tokens per second, one a repetition; both decode the same tokens, which the model made itself (random
    ones would give masks that no text gives)."""

    sparsity: str
    decode_dense_tokens_per_s: list[float]
    decode_sparse_tokens_per_s: list[float]
    decode_dense_median: float
    decode_sparse_median: float
    sparse_ratio: float
    """Median of the repetitions' sparse over dense rate."""
    density: dict[str, float]
    sparse_memory: dict[str, Any] | None = None
    """Under a memory budget: what it was divided into, and what reading cost while decoding sparsely."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def context_for(sparse_from: int, opening: int, gen: int, reps: int) -> int:
    """Tokens that each of the two sessions holds."""
    return _OPENING + opening + sparse_from + gen * reps + 1


def bench_sparse(
    model: _core.Model,
    file: SparsityFile,
    opening: list[int],
    *,
    gen: int = 64,
    reps: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> SparseBenchResult:
    """Measures an opened model. opening: at least one token that the text begins with. gen: tokens decoded a repetition."""
    import numpy as np

    from .. import _core
    from ..memory import summary
    from ..skipping import Attached, bind
    from .speed import COUNTERS

    skipping = bind(file, model)
    n_ctx = context_for(skipping.sparse_from, len(opening), gen, reps)
    dense, sparse = _core.Session(model, n_ctx), _core.Session(model, n_ctx)
    attached = Attached(sparse, skipping)
    sampler = _core.Sampler(temperature=0.8, seed=0)
    dense.eval(np.asarray(opening, dtype=np.int32))
    begin = max(_OPENING, skipping.sparse_from, len(opening))
    while dense.n_past < begin + gen * reps:
        dense.step(sampler)
    text = np.asarray(dense.tokens, dtype=np.int32)
    dense.truncate(0)
    dense.eval(text[:begin])
    attached.prompt(text[:begin])
    sparse.density()
    rates: tuple[list[float], list[float]] = ([], [])
    counted = dict.fromkeys(COUNTERS, 0.0)
    for r in range(reps):
        if progress is not None:
            progress("decode, dense and sparse", r, reps)
        single = [text[i : i + 1] for i in range(begin + r * gen, begin + (r + 1) * gen)]
        # Who goes first changes, so that neither always finds the caches as the other left them.
        for which in (0, 1) if r % 2 == 0 else (1, 0):
            session = (dense, sparse)[which]
            before = model.memory()
            start = time.perf_counter()
            for one in single:
                session.eval(one)
            rates[which].append(gen / (time.perf_counter() - start))
            after = model.memory()
            for key in COUNTERS if which else ():
                counted[key] += after[key] - before[key]
    if progress is not None:
        progress("decode, dense and sparse", reps, reps)
    return SparseBenchResult(
        sparsity=file.name,
        decode_dense_tokens_per_s=rates[0],
        decode_sparse_tokens_per_s=rates[1],
        decode_dense_median=statistics.median(rates[0]),
        decode_sparse_median=statistics.median(rates[1]),
        sparse_ratio=statistics.median([s / d for d, s in zip(*rates, strict=True)]),
        density=sparse.density(),
        sparse_memory=summary({**after, **counted}) if after["budget_bytes"] else None,
    )
