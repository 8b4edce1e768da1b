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
    options: dict[str, Any] = {"n_vocab": n_vocab, "ctx": ctx, "chunks": chunks, "bos": bos, "progress": progress}
    return compare_all(model, tokens, [plan], **options)[0]


def compare_all(
    model: _core.Model,
    tokens: Sequence[int],
    plans: Sequence[_core.Sparsity | Skipping],
    *,
    n_vocab: int,
    ctx: int = 512,
    chunks: int | None = None,
    bos: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SparseResult]:
    """As `compare`, for several ways to skip: the dense run is made once."""
    import numpy as np

    from .. import _core

    ids = cut_chunks(tokens, ctx=ctx, chunks=chunks, bos=bos)
    rows = rows_at_a_time(n_vocab)
    dense = _core.Session(model, ctx)
    runs = [_Run(_core.Session(model, ctx), plan) for plan in plans]
    first = ctx // 2
    nll_dense: list[NDArray[np.float64]] = []
    start = time.perf_counter()
    for c, chunk in enumerate(ids):
        if progress is not None:
            progress("dense and sparse", c, len(ids))
        dense.truncate(0)
        dense.eval(chunk[:first])
        for run in runs:
            run.attached.prompt(chunk[:first])
        for begin in range(first, ctx - 1, rows):
            part = chunk[begin : min(begin + rows, ctx - 1)]
            targets = chunk[begin + 1 : begin + 1 + len(part)]
            logits = dense.eval_all(part)
            nll_dense.append(_finite(token_nlls(logits, targets), c, "dense"))
            for run in runs:
                run.add(part, targets, logits, c)
    if progress is not None:
        progress("dense and sparse", len(ids), len(ids))
    seconds = time.perf_counter() - start
    return [run.result(np.concatenate(nll_dense), ctx=ctx, chunks=len(ids), seconds=seconds) for run in runs]


class _Run:
    """One sparse run beside the dense one."""

    def __init__(self, session: _core.Session, plan: _core.Sparsity | Skipping) -> None:
        from ..skipping import Attached

        self.session = session
        self.attached = Attached(session, plan, blocks=True)
        session.density()
        self.nll: list[NDArray[np.float64]] = []
        self.kl: list[NDArray[np.float64]] = []
        self.same = 0

    def add(self, part: NDArray[np.int32], targets: NDArray[np.int32], dense: NDArray[np.float32], chunk: int) -> None:
        """Evaluates a part of a chunk, whose dense logits are known."""
        logits = self.attached.logits(part)
        self.nll.append(_finite(token_nlls(logits, targets), chunk, "sparse"))
        self.kl.append(kl_divergence(dense, logits))
        self.same += int((dense.argmax(1) == logits.argmax(1)).sum())

    def result(self, nll_dense: NDArray[np.float64], *, ctx: int, chunks: int, seconds: float) -> SparseResult:
        import numpy as np

        nll, kl = np.concatenate(self.nll), np.concatenate(self.kl)
        difference = nll - nll_dense
        factor = _exp(float(difference.mean()))
        return SparseResult(
            perplexity=_exp(float(nll.mean())),
            perplexity_dense=_exp(float(nll_dense.mean())),
            perplexity_increase=factor - 1,
            perplexity_increase_stderr=factor * float(difference.std()) / math.sqrt(len(difference)),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=self.same / len(kl),
            density=self.session.density(),
            nll=float(nll.mean()),
            tokens_scored=len(kl),
            ctx=ctx,
            chunks=chunks,
            seconds=seconds,
            token_nll=nll,
        )


def _finite(nll: NDArray[np.float64], chunk: int, which: str) -> NDArray[np.float64]:
    import numpy as np

    if not np.isfinite(nll).all():
        raise Error(f"chunk {chunk + 1}: the {which} run's logits are not finite numbers; convert the model again")
    return nll


def kl_divergence(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence, in nats, of the distributions of logits `sparse` from those of logits `dense`, row by row [n]."""
    import numpy as np

    p, q = log_softmax(dense), log_softmax(sparse)
    out: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(1, dtype=np.float64), 0.0)
    return out


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
