"""Quality of a model on texts."""

from __future__ import annotations

from .perplexity import PerplexityResult, perplexity

__all__ = ["PerplexityResult", "perplexity"]
