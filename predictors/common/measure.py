"""What masks do to a model's output, and how fast they make it: the measurements that levels and budgets come from."""

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
    from ...skipping import Skipping


def token_nll(
    model: _core.Model, chunks: NDArray[np.int32], plan: _core.Sparsity | Skipping | None, n_vocab: int
) -> NDArray[np.float64]:
    """Negative log-likelihood of every token of the second halves of chunks [n, ctx], masked as decoding would be."""
    import numpy as np

    from ... import _core
    from ...eval.perplexity import rows_at_a_time, token_nlls
    from ...skipping import Attached

    ctx = chunks.shape[1]
    session = _core.Session(model, ctx)
    attached = Attached(session, plan, blocks=True)
    rows, first = rows_at_a_time(n_vocab), ctx // 2
    out: list[NDArray[np.float64]] = []
    for chunk in chunks:
        attached.prompt(chunk[:first])
        for begin in range(first, ctx - 1, rows):
            part = chunk[begin : min(begin + rows, ctx - 1)]
            out.append(token_nlls(attached.logits(part), chunk[begin + 1 : begin + 1 + len(part)]))
    found = np.concatenate(out)
    if not np.isfinite(found).all():
        raise Error("the logits are not finite numbers, so there is no perplexity; convert the model again")
    return found


def relative_increase(nll: float, dense: float) -> float:
    """Perplexity over dense perplexity, less one."""
    return math.exp(min(nll - dense, 700.0)) - 1


def speed(
    model: _core.Model,
    plan: _core.Sparsity | Skipping,
    tokens: NDArray[np.int32],
    *,
    sparse_from: int,
    count: int = 24,
    rounds: int = 5,
) -> tuple[float, float]:
    """Median tokens a second of decoding given tokens [n], dense and sparse, measured in turns."""
    from ... import _core
    from ...skipping import Attached

    sessions = [_core.Session(model, len(tokens)), _core.Session(model, len(tokens))]
    attached = Attached(sessions[1], plan)
    begin = min(len(tokens) // 2, max(sparse_from, 16))
    sessions[0].eval(tokens[:begin])
    attached.prompt(tokens[:begin])
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
