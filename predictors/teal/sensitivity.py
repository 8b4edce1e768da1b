"""What masks do to a layer and to the model's output: the measurements that levels come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import Error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core

_TOP = 1024  # tokens of a dense distribution that are kept apart; the others count as one event


def branch_error(x: NDArray[np.float32], dense: NDArray[np.float32], masked: NDArray[np.float32], drop: int) -> float:
    """Mean over positions from `drop` on of |masked - dense|^2 / |dense - x|^2: the error of what the layer adds to the
    stream x [n, n_embd], so that the few positions of huge activations count like all others."""
    import numpy as np

    error = np.square(masked[drop:] - dense[drop:], dtype=np.float64).sum(1)
    branch = np.square(dense[drop:] - x[drop:], dtype=np.float64).sum(1)
    return float((error / np.maximum(branch, 1e-30)).mean())


class Sensitivity:
    """Dense distributions of some chunks, and the KL divergence of masked runs from them, token by token.

    The divergence, not the perplexity: it is never negative and has far less noise, so few tokens suffice. Of a dense
    distribution the likeliest tokens are kept, which bounds the divergence from below by next to nothing."""

    def __init__(self, model: _core.Model, chunks: NDArray[np.int32], scored_from: int) -> None:
        """chunks [n, ctx]; positions from scored_from on are compared."""
        import numpy as np

        from ... import _core
        from ...eval.perplexity import log_softmax

        self._chunks, self._from = chunks, scored_from
        self._session = _core.Session(model, chunks.shape[1])
        self._dense: list[tuple[NDArray[np.intp], NDArray[np.float32]]] = []
        for chunk in chunks:
            p = log_softmax(self._logits(chunk))
            top = np.argpartition(p, -min(_TOP, p.shape[1] - 1), axis=1)[:, -_TOP:]
            self._dense.append((top, np.take_along_axis(p, top, axis=1)))

    def kl(self, plan: _core.Sparsity) -> NDArray[np.float64]:
        """Divergence in nats of every scored token, [n]."""
        import numpy as np

        from ...eval.perplexity import log_softmax

        self._session.set_sparsity(plan, mask_prefill=True)
        out: list[NDArray[np.float64]] = []
        for chunk, (top, p) in zip(self._chunks, self._dense, strict=True):
            q = np.take_along_axis(log_softmax(self._logits(chunk)), top, axis=1)
            rest_p, rest_q = (np.maximum(1 - np.exp(x).sum(1, dtype=np.float64), 1e-9) for x in (p, q))
            out.append((np.exp(p) * (p - q)).sum(1, dtype=np.float64) + rest_p * np.log(rest_p / rest_q))
        self._session.set_sparsity(None)
        found = np.concatenate(out)
        if not np.isfinite(found).all():
            raise Error("a masked run's logits are not finite numbers; convert the model again")
        return found

    def _logits(self, chunk: NDArray[np.int32]) -> NDArray[np.float32]:
        self._session.truncate(0)
        self._session.eval(chunk[: self._from])
        return self._session.eval_all(chunk[self._from :])
