"""Quality of a model on texts."""

from __future__ import annotations

from .perplexity import PerplexityResult, perplexity
from .sparse import SparseResult, compare, compare_all

__all__ = ["PerplexityResult", "SparseResult", "compare", "compare_all", "perplexity"]
