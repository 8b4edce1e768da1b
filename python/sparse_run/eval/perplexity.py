"""Perplexity as llama.cpp's tool measures it: the text is cut into chunks of `ctx` tokens, each begins with BOS where the
model asks for it, and only the second half of a chunk is scored, where every token has at least half a chunk before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import Error, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .. import _core

# Logits held at a time: enough rows for the matrix-matrix kernels, bounded for vocabularies of a quarter million.
LOGIT_BYTES = 64 * 1024 * 1024
LOGIT_COPIES = 4  # the logits and what is made of them on the way to their likelihoods


@dataclass(frozen=True)
class PerplexityResult:
    """`perplexity` is exp(`nll`); `nll` is the mean negative log-likelihood of a scored token, in nats."""

    perplexity: float
    nll: float
    tokens_scored: int
    ctx: int
    chunks: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: _core.Model,
    tokens: Sequence[int],
    *,
    n_vocab: int,
    ctx: int = 512,
    chunks: int | None = None,
    bos: int | None = None,
    logit_bytes: int = LOGIT_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
) -> PerplexityResult:
    """Scores a text.

    Args:
        model: the core's model. tokens: ids of the whole text, BOS in front where the model asks for it.
        n_vocab: width of the logits.
        ctx: tokens of a chunk. chunks: how many at most; None scores all whole chunks.
        bos: id put in place of each chunk's first token; None leaves chunks as they are.
        logit_bytes: of logits held at a time; LOGIT_COPIES times this is allocated.
        progress: called as progress(what, done, total), counted in chunks.

    Raises:
        UsageError: `ctx` is too small or the text shorter than one chunk. Error: a logit is not a finite number.
    """
    from .. import _core

    ids = cut_chunks(tokens, ctx=ctx, chunks=chunks, bos=bos)
    count = len(ids)
    first = ctx // 2
    rows = rows_at_a_time(n_vocab, logit_bytes)
    session = _core.Session(model, ctx)
    nll, scored = 0.0, 0
    start = time.perf_counter()
    for c in range(count):
        if progress is not None:
            progress("perplexity", c, count)
        chunk = ids[c]
        session.truncate(0)
        session.eval(chunk[:first])
        for begin in range(first, ctx - 1, rows):  # the last token predicts nothing that is scored
            part = chunk[begin : min(begin + rows, ctx - 1)]
            logits = session.eval_all(part)
            nll += float(token_nlls(logits, chunk[begin + 1 : begin + 1 + len(part)]).sum())
            scored += len(part)
        if not math.isfinite(nll):
            raise Error(
                f"chunk {c + 1}: the logits are not finite numbers, so there is no perplexity; "
                "convert the model again with `sparse-run convert`"
            )
    if progress is not None:
        progress("perplexity", count, count)
    mean = nll / scored
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        nll=mean,
        tokens_scored=scored,
        ctx=ctx,
        chunks=count,
        seconds=time.perf_counter() - start,
    )


def cut_chunks(tokens: Sequence[int], *, ctx: int, chunks: int | None, bos: int | None) -> NDArray[np.int32]:
    """The tokens that are evaluated, [chunks, ctx]; arguments and errors as for `perplexity`."""
    import numpy as np

    if ctx < 4:
        raise UsageError(f"a context of {ctx} tokens is too small to score; use at least 4")
    if chunks is not None and chunks < 1:
        raise UsageError(f"the number of chunks must be at least 1, not {chunks}")
    count = len(tokens) // ctx if chunks is None else min(chunks, len(tokens) // ctx)
    if count == 0:
        raise UsageError(
            f"the text has only {len(tokens)} tokens, but one chunk needs {ctx}; use a longer text or a smaller --ctx"
        )
    ids = np.asarray(tokens[: count * ctx], dtype=np.int32).reshape(count, ctx)
    if bos is not None:
        ids[:, 0] = bos
    return ids


def rows_at_a_time(n_vocab: int, logit_bytes: int = LOGIT_BYTES) -> int:
    """How many rows of logits are computed together."""
    return max(1, min(256, logit_bytes // (4 * n_vocab)))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithms of the probabilities of rows of logits [n, n_vocab], float32 with sums in float64. NaN in gives NaN out."""
    import numpy as np

    x: NDArray[np.float32] = logits - logits.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return x


def token_nlls(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """-log softmax(logits[i])[targets[i]] of rows [n, n_vocab], in float64. NaN in gives NaN out."""
    import numpy as np

    top = logits.max(1, keepdims=True)
    sums = np.exp(logits - top).sum(1, dtype=np.float64)
    picked = logits[np.arange(len(targets)), targets].astype(np.float64)
    nlls: NDArray[np.float64] = top[:, 0] + np.log(sums) - picked
    return nlls
