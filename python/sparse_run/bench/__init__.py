"""Speed of a model on this machine, with the memory traffic that explains it."""

from __future__ import annotations

from .speed import BenchResult, bench

__all__ = ["BenchResult", "bench"]
