"""Speed of a model on this machine, with the memory traffic that explains it."""

from __future__ import annotations

from .sparse import SparseBenchResult, bench_sparse
from .speed import BenchResult, bench

__all__ = ["BenchResult", "SparseBenchResult", "bench", "bench_sparse"]
