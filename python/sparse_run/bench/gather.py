"""How fast this machine reads what is wanted, by length of the runs and share of them: what skipping weights can gain at
most. One load a line, next runs prefetched; the whole stream beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

RUNS = (64, 256, 512, 1024, 2048, 4096)
"""Bytes."""
DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class GatherResult:
    """GB of 10**9 wanted bytes a second; medians of `reps` measurements, taken in turns."""

    cpu: str
    isa: str
    threads: int
    reps: int
    stream_gb_per_s: float
    runs: list[int]
    densities: list[float]
    gb_per_s: list[list[float]]
    """[run][density]"""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench_memory(threads: int | None = None) -> tuple[Any, int]:
    """(a `_core.MemoryBench`, its threads): a gigabyte, or a quarter of the free memory where that is less.

    Raises BudgetError where there is no memory to measure."""
    from .. import _core
    from .machine import memory_bytes

    threads = threads or _core.default_threads()
    free = memory_bytes()[1]
    megabytes = 1024 if free is None else max(64, min(1024, free // 4_000_000))
    return _core.MemoryBench(threads, megabytes), threads


def selected_isa() -> str:
    """The instruction set whose kernels this process uses."""
    from .. import _core

    return next(str(entry["name"]) for entry in _core.isa_list() if entry["selected"])


def gather(
    threads: int | None = None,
    *,
    reps: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> GatherResult:
    """Measures every run length and density `reps` times, about ten seconds in all with the default.

    >>> gather(2).gb_per_s[-1][0]  # 4 KiB, all of them  # doctest: +SKIP
    31.5
    """
    from .. import _core

    memory, threads = bench_memory(threads)
    rates: dict[tuple[int, float], list[float]] = {(run, d): [] for run in RUNS for d in DENSITIES}
    for turn in range(reps):
        for run in RUNS:
            if progress is not None:
                progress("memory", turn * len(RUNS) + RUNS.index(run), reps * len(RUNS))
            for d in DENSITIES:
                rates[run, d].append(memory.gather(run, d))
    if progress is not None:
        progress("memory", reps * len(RUNS), reps * len(RUNS))
    return GatherResult(
        cpu=str(_core.cpu_info()["brand"]),
        isa=selected_isa(),
        threads=threads,
        reps=reps,
        stream_gb_per_s=statistics.median(_core.stream_gb_per_s(threads)),
        runs=list(RUNS),
        densities=list(DENSITIES),
        gb_per_s=[[statistics.median(rates[run, d]) for d in DENSITIES] for run in RUNS],
    )
