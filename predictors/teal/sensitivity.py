"""What masks do to a layer and to the model's output, and how fast they make it: the measurements that levels come from."""

from __future__ import annotations

import math
import statistics
import time
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
        self._session.truncate(0)
        self._session.eval(chunk[: -self._rows])
        return _log_softmax(self._session.eval_all(chunk[-self._rows :]))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    x: NDArray[np.float32] = logits - logits.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return x


def token_nll(model: _core.Model, chunks: NDArray[np.int32], plan: _core.Sparsity | None, n_vocab: int) -> float:
    """Mean negative log-likelihood of the second halves of chunks [n, ctx], masked as decoding would be."""
    import numpy as np

    from ... import _core
    from ...eval.perplexity import rows_at_a_time

    ctx = chunks.shape[1]
    session = _core.Session(model, ctx)
    session.set_sparsity(plan, mask_prefill=plan is not None)
    rows, first, total = rows_at_a_time(n_vocab), ctx // 2, 0.0
    for chunk in chunks:
        session.truncate(0)
        session.eval(chunk[:first])
        for begin in range(first, ctx - 1, rows):
            part = chunk[begin : min(begin + rows, ctx - 1)]
            q = _log_softmax(session.eval_all(part))
            total -= float(q[np.arange(len(part)), chunk[begin + 1 : begin + 1 + len(part)]].sum(dtype=np.float64))
    if not math.isfinite(total):
        raise Error("the logits are not finite numbers, so there is no perplexity; convert the model again")
    return total / int(len(chunks) * (ctx - 1 - first))


def relative_increase(nll: float, dense: float) -> float:
    """Perplexity over dense perplexity, less one."""
    return math.exp(min(nll - dense, 700.0)) - 1


def speed(
    model: _core.Model,
    plan: _core.Sparsity,
    tokens: NDArray[np.int32],
    *,
    sparse_from: int,
    count: int = 24,
    rounds: int = 5,
) -> tuple[float, float]:
    """Median tokens a second of decoding given tokens [n], dense and sparse, measured in turns."""
    from ... import _core

    sessions = [_core.Session(model, len(tokens)), _core.Session(model, len(tokens))]
    sessions[1].set_sparsity(plan)
    begin = min(len(tokens) // 2, max(sparse_from, 16))
    for session in sessions:
        session.eval(tokens[:begin])
    count = max(1, min(count, (len(tokens) - begin) // rounds))
    rates: list[list[float]] = [[], []]
    for r in range(min(rounds, (len(tokens) - begin) // count)):
        part = tokens[begin + r * count : begin + (r + 1) * count]
        for session, found in zip(sessions, rates, strict=True):
            start = time.perf_counter()
            for i in range(len(part)):
                session.eval(part[i : i + 1])
            found.append(len(part) / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])
