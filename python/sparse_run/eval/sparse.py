"""What sparsity costs: perplexity, KL divergence and agreement with the dense run of the same tokens.

Scored as sparse decoding computes it: every position past the plan's dense tokens goes through the masks (`mask_prefill`
gives the bits of sparse decoding), and the positions that count are those that perplexity counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import Error
from .perplexity import cut_chunks, log_softmax, rows_at_a_time, token_nlls

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .. import _core
    from ..skipping import Skipping


@dataclass(frozen=True)
class SparseResult:
    """`perplexity` is the sparse run's; KL is of the sparse distribution from the dense one, in nats a token."""

    perplexity: float
    perplexity_dense: float
    perplexity_increase: float
    """perplexity / perplexity_dense - 1."""
    perplexity_increase_stderr: float
    """Its standard error, from the differences of the two runs token by token."""
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
    token_nll: NDArray[np.float64] = field(repr=False)
    """Negative log-likelihood of every scored token in the sparse run, for comparing two runs of the same text."""

    def as_dict(self) -> dict[str, Any]:
        """All but `token_nll`."""
        return {key: value for key, value in vars(self).items() if key != "token_nll"}


def compare(
    model: _core.Model,
    tokens: Sequence[int],
    plan: _core.Sparsity | Skipping,
    *,
    n_vocab: int,
    ctx: int = 512,
    chunks: int | None = None,
    bos: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> SparseResult:
    """Runs a text dense and sparse; arguments and errors as for `perplexity`. Where what is skipped is chosen from a prompt,
    the first half of each chunk is that prompt, read dense, and what counts are the tokens after it."""
    import numpy as np

    from .. import _core
    from ..skipping import Attached

    ids = cut_chunks(tokens, ctx=ctx, chunks=chunks, bos=bos)
    rows = rows_at_a_time(n_vocab)
    dense, sparse = _core.Session(model, ctx), _core.Session(model, ctx)
    attached = Attached(sparse, plan, blocks=True)
    sparse.density()
    first = ctx // 2
    pairs: list[NDArray[np.float64]] = []
    divergences: list[NDArray[np.float64]] = []
    same = 0
    start = time.perf_counter()
    for c, chunk in enumerate(ids):
        if progress is not None:
            progress("dense and sparse", c, len(ids))
        dense.truncate(0)
        dense.eval(chunk[:first])
        attached.prompt(chunk[:first])
        for begin in range(first, ctx - 1, rows):
            part = chunk[begin : min(begin + rows, ctx - 1)]
            targets = chunk[begin + 1 : begin + 1 + len(part)]
            rows_dense, rows_sparse = dense.eval_all(part), attached.logits(part)
            pairs.append(np.stack([token_nlls(rows_dense, targets), token_nlls(rows_sparse, targets)]))
            if not np.isfinite(pairs[-1]).all():
                which = "sparse" if np.isfinite(pairs[-1][0]).all() else "dense"
                raise Error(f"chunk {c + 1}: the {which} run's logits are not finite numbers; convert the model again")
            same += int((rows_dense.argmax(1) == rows_sparse.argmax(1)).sum())
            divergences.append(kl_divergence(rows_dense, rows_sparse))
    if progress is not None:
        progress("dense and sparse", len(ids), len(ids))
    nll_dense, nll_sparse = np.concatenate(pairs, axis=1)
    kl = np.concatenate(divergences)
    difference = nll_sparse - nll_dense
    factor = _exp(float(difference.mean()))
    return SparseResult(
        perplexity=_exp(float(nll_sparse.mean())),
        perplexity_dense=_exp(float(nll_dense.mean())),
        perplexity_increase=factor - 1,
        perplexity_increase_stderr=factor * float(difference.std()) / math.sqrt(len(difference)),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=same / len(kl),
        density=sparse.density(),
        nll=float(nll_sparse.mean()),
        tokens_scored=len(kl),
        ctx=ctx,
        chunks=len(ids),
        seconds=time.perf_counter() - start,
        token_nll=nll_sparse,
    )


def kl_divergence(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence, in nats, of the distributions of logits `sparse` from those of logits `dense`, row by row [n]."""
    import numpy as np

    p, q = log_softmax(dense), log_softmax(sparse)
    out: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(1, dtype=np.float64), 0.0)
    return out


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
