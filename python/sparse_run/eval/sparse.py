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
from .perplexity import cut_chunks, rows_at_a_time

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
    ids = cut_chunks(tokens, ctx=ctx, chunks=chunks, bos=bos)
    runs = Comparison(model, plans, n_vocab=n_vocab, ctx=ctx)
    found: list[list[Scores]] = []
    start = time.perf_counter()
    for c, chunk in enumerate(ids):
        if progress is not None:
            progress("dense and sparse", c, len(ids))
        found.append(runs.chunk(chunk, c))
    if progress is not None:
        progress("dense and sparse", len(ids), len(ids))
    seconds = time.perf_counter() - start
    densities = runs.densities()
    return [
        joined(list(scores), density, ctx=ctx, seconds=seconds)
        for scores, density in zip(zip(*found, strict=True), densities, strict=True)
    ]


@dataclass(frozen=True)
class Scores:
    """The scored tokens of one chunk, token by token [n]: likelihoods of the dense and of a sparse run, and how these
    differ."""

    nll_dense: NDArray[np.float64]
    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    same: int
    """For how many tokens both runs have the same first choice."""


class Comparison:
    """Several ways to skip, beside one dense run of the same chunks."""

    def __init__(
        self, model: _core.Model, plans: Sequence[_core.Sparsity | Skipping], *, n_vocab: int, ctx: int = 512
    ) -> None:
        from .. import _core
        from ..skipping import Attached

        self._dense = _core.Session(model, ctx)
        self._sessions = [_core.Session(model, ctx) for _ in plans]
        self._runs = [Attached(s, plan, blocks=True) for s, plan in zip(self._sessions, plans, strict=True)]
        self._rows, self._ctx = rows_at_a_time(n_vocab), ctx
        self.densities()

    def chunk(self, ids: NDArray[np.int32], number: int = 0) -> list[Scores]:
        """Scores of the second half of a chunk [ctx], one for each plan. number: of the chunk, for what errors say. Raises
        Error where a logit is not a finite number."""
        import numpy as np

        first = self._ctx // 2
        self._dense.truncate(0)
        self._dense.eval(ids[:first])
        for run in self._runs:
            run.prompt(ids[:first])
        nll_dense: list[NDArray[np.float64]] = []
        found: list[list[tuple[NDArray[np.float64], NDArray[np.float64], int]]] = [[] for _ in self._runs]
        for begin in range(first, self._ctx - 1, self._rows):
            part = ids[begin : min(begin + self._rows, self._ctx - 1)]
            targets = ids[begin + 1 : begin + 1 + len(part)]
            dense = _Distributions(self._dense.eval_all(part))
            nll_dense.append(_finite(dense.nll(targets), number, "dense"))
            for run, parts in zip(self._runs, found, strict=True):
                sparse = _Distributions(run.logits(part))
                nll = _finite(sparse.nll(targets), number, "sparse")
                parts.append((nll, dense.kl(sparse), int((dense.first == sparse.first).sum())))
        return [
            Scores(
                np.concatenate(nll_dense),
                np.concatenate([p[0] for p in parts]),
                np.concatenate([p[1] for p in parts]),
                sum(p[2] for p in parts),
            )
            for parts in found
        ]

    def densities(self) -> list[dict[str, float]]:
        """Shares read since the last call, one for each plan; see `Session.density`."""
        return [session.density() for session in self._sessions]


def joined(scores: Sequence[Scores], density: dict[str, float], *, ctx: int, seconds: float = 0.0) -> SparseResult:
    """The figures of several chunks."""
    import numpy as np

    nll, kl = np.concatenate([s.nll for s in scores]), np.concatenate([s.kl for s in scores])
    nll_dense = np.concatenate([s.nll_dense for s in scores])
    difference = nll - nll_dense
    factor = _exp(float(difference.mean()))
    return SparseResult(
        perplexity=_exp(float(nll.mean())),
        perplexity_dense=_exp(float(nll_dense.mean())),
        perplexity_increase=factor - 1,
        perplexity_increase_stderr=factor * float(difference.std()) / math.sqrt(len(difference)),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=sum(s.same for s in scores) / len(kl),
        density=density,
        nll=float(nll.mean()),
        tokens_scored=len(kl),
        ctx=ctx,
        chunks=len(scores),
        seconds=seconds,
        token_nll=nll,
    )


class _Distributions:
    """Rows of logits [n, n_vocab], and what is asked of the distributions that they stand for. Row by row, since a row fits
    into a core's cache and several of a vocabulary of a quarter million do not. NaN in gives NaN out."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        import numpy as np

        n, width = logits.shape
        self.logits = logits
        self.first = np.empty(n, np.intp)
        """The likeliest token of each row."""
        self._log_sum = np.empty(n, np.float64)
        self._buffer = np.empty(width, np.float32)
        for i, row in enumerate(logits):
            self.first[i] = row.argmax()
            top = row[self.first[i]]
            np.exp(np.subtract(row, top, out=self._buffer), out=self._buffer)
            self._log_sum[i] = float(top) + np.log(self._buffer.sum(dtype=np.float64))

    def nll(self, targets: NDArray[np.int32]) -> NDArray[np.float64]:
        """Negative log-likelihoods of one token a row, [n]."""
        import numpy as np

        found: NDArray[np.float64] = self._log_sum - self.logits[np.arange(len(targets)), targets].astype(np.float64)
        return found

    def kl(self, other: _Distributions) -> NDArray[np.float64]:
        """Divergence of others from these, row by row in nats [n]: sum of p (x - y), less the difference of the log sums;
        0 where the logits are the same."""
        import numpy as np

        out = np.empty(len(self.logits), np.float64)
        p = self._buffer
        difference = np.empty_like(p)
        for i, (x, y) in enumerate(zip(self.logits, other.logits, strict=True)):
            np.exp(np.subtract(x, np.float32(self._log_sum[i]), out=p), out=p)
            np.multiply(np.subtract(x, y, out=difference), p, out=difference)
            total = p.sum(dtype=np.float64)  # next to 1: the rounding of the log sum cancels
            out[i] = difference.sum(dtype=np.float64) / total - (self._log_sum[i] - other._log_sum[i])
        return np.maximum(out, 0.0)


def _finite(nll: NDArray[np.float64], chunk: int, which: str) -> NDArray[np.float64]:
    import numpy as np

    if not np.isfinite(nll).all():
        raise Error(f"chunk {chunk + 1}: the {which} run's logits are not finite numbers; convert the model again")
    return nll


def kl_divergence(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence, in nats, of the distributions of logits `sparse` from those of logits `dense`, row by row [n]."""
    return _Distributions(dense).kl(_Distributions(sparse))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
