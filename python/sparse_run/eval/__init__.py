"""Quality of a model on texts."""

from __future__ import annotations

from .perplexity import PerplexityResult, perplexity
from .sparse import SparseResult, compare

__all__ = ["PerplexityResult", "SparseResult", "compare", "perplexity"]
