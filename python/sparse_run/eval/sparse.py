"""What sparsity costs: perplexity, KL divergence and agreement with the dense run of the same tokens.

Scored as sparse decoding computes it: every position past the plan's dense tokens goes through the masks (`mask_prefill`
gives the bits of sparse decoding), and the positions that count are those that perplexity counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Error
from .perplexity import cut_chunks, rows_at_a_time

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .. import _core


@dataclass(frozen=True)
class SparseResult:
    """`perplexity` is the sparse run's; KL is of the sparse distribution from the dense one, in nats a token."""

    perplexity: float
    perplexity_dense: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    """Share of tokens for which both runs would choose the same one greedily."""
    density: dict[str, float]
    """Share of columns read by site, of the positions past the dense tokens; "body": share of the layers' bytes."""
    nll: float
    tokens_scored: int
    ctx: int
    chunks: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    model: _core.Model,
    tokens: Sequence[int],
    plan: _core.Sparsity,
    *,
    n_vocab: int,
    ctx: int = 512,
    chunks: int | None = None,
    bos: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SparseResult:
    """Runs a text dense and sparse; arguments and errors as for `perplexity`."""
    import numpy as np

    from .. import _core

    ids = cut_chunks(tokens, ctx=ctx, chunks=chunks, bos=bos)
    rows = rows_at_a_time(n_vocab)
    dense, sparse = _core.Session(model, ctx), _core.Session(model, ctx)
    sparse.set_sparsity(plan, mask_prefill=True)
    sparse.density()
    first = ctx // 2
    nll_dense = nll_sparse = 0.0
    divergences: list[float] = []
    same = 0
    start = time.perf_counter()
    for c, chunk in enumerate(ids):
        if progress is not None:
            progress("dense and sparse", c, len(ids))
        for session in (dense, sparse):
            session.truncate(0)
            session.eval(chunk[:first])
        for begin in range(first, ctx - 1, rows):
            part = chunk[begin : min(begin + rows, ctx - 1)]
            targets = chunk[begin + 1 : begin + 1 + len(part)]
            pair = zip(dense.eval_all(part), sparse.eval_all(part), targets, strict=True)
            for row_dense, row_sparse, target in pair:
                p, q = log_softmax(row_dense), log_softmax(row_sparse)
                nll_dense -= float(p[target])
                nll_sparse -= float(q[target])
                divergences.append(max(0.0, float((np.exp(p) * (p - q)).sum())))
                same += int(row_dense.argmax() == row_sparse.argmax())
        if not math.isfinite(nll_dense) or not math.isfinite(nll_sparse):
            which = "dense" if not math.isfinite(nll_dense) else "sparse"
            raise Error(f"chunk {c + 1}: the {which} run's logits are not finite numbers; convert the model again")
    if progress is not None:
        progress("dense and sparse", len(ids), len(ids))
    count = len(divergences)
    return SparseResult(
        perplexity=_exp(nll_sparse / count),
        perplexity_dense=_exp(nll_dense / count),
        kl_mean=float(np.mean(divergences)),
        kl_p99=float(np.quantile(divergences, 0.99)),
        top1_agreement=same / count,
        density=sparse.density(),
        nll=nll_sparse / count,
        tokens_scored=count,
        ctx=ctx,
        chunks=len(ids),
        seconds=time.perf_counter() - start,
    )


def log_softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithms of the probabilities of one row of logits, in float64."""
    import numpy as np

    x = row.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    return x


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
