"""What masks do to a layer and to the model's output: the measurements that levels come from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...errors import Error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core

_HELD_BYTES = 256 * 1024 * 1024


def branch_error(x: NDArray[np.float32], dense: NDArray[np.float32], masked: NDArray[np.float32], drop: int) -> float:
    """Mean over positions from `drop` on of |masked - dense|^2 / |dense - x|^2: the error of what the layer adds to the
    stream x [n, n_embd], so that the few positions of huge activations count like all others."""
    import numpy as np

    error = np.square(masked[drop:] - dense[drop:], dtype=np.float64).sum(1)
    branch = np.square(dense[drop:] - x[drop:], dtype=np.float64).sum(1)
    return float((error / np.maximum(branch, 1e-30)).mean())


class Sensitivity:
    """Dense distributions of some chunks, and the KL divergence of masked runs from them.

    The divergence, not the perplexity: it is never negative and has far less noise, so few tokens suffice."""

    def __init__(self, model: _core.Model, chunks: NDArray[np.int32], n_vocab: int) -> None:
        from ... import _core

        self._chunks = chunks
        self._session = _core.Session(model, chunks.shape[1])
        self._rows = max(1, min(chunks.shape[1] // 2, _HELD_BYTES // (4 * n_vocab * len(chunks))))
        self._dense = [self._log_probabilities(chunk) for chunk in chunks]

    def kl(self, plan: _core.Sparsity) -> float:
        """Mean divergence in nats a token."""
        import numpy as np

        self._session.set_sparsity(plan, mask_prefill=True)
        total = 0.0
        for chunk, p in zip(self._chunks, self._dense, strict=True):
            q = self._log_probabilities(chunk)
            total += float((np.exp(p) * (p - q)).sum(1, dtype=np.float64).mean())
        self._session.set_sparsity(None)
        if not math.isfinite(total):
            raise Error("a masked run's logits are not finite numbers; convert the model again")
        return total / len(self._chunks)

    def _log_probabilities(self, chunk: NDArray[np.int32]) -> NDArray[np.float32]:
        from ...eval.perplexity import log_softmax

        self._session.truncate(0)
        self._session.eval(chunk[: -self._rows])
        return log_softmax(self._session.eval_all(chunk[-self._rows :]))
