"""What layers see and which neurons and heads answer: rows for training, one layer of the model at a time.

The tokens are those the model wrote itself, sampled, and text; pushing them through a layer as blocks gives the bits that
decoding them one by one gave, so these are traces of generation, not of another computation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...neurons import gives_zeros
from ..common.layers import Stream

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core

ENERGY = 0.9  # of sum z^2 that the active neurons of a model without true zeros hold together
HEAD_SHARE = 0.5  # of the heads that count as needed: those of the largest output


def active_neurons(z: NDArray[np.float32], true_zeros: bool) -> NDArray[np.bool_]:
    """Which neurons z [tokens, n_ff] makes necessary: those not 0, or, without true zeros, the largest |z| that hold ENERGY
    of the row's energy together."""
    import numpy as np

    if true_zeros:
        return np.asarray(z != 0)
    energy = np.square(z, dtype=np.float64)
    order = np.argsort(-energy, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(energy, order, 1), 1)
    needed = (held < ENERGY * held[:, -1:]).sum(1) + 1  # the one that passes the share belongs to it
    out = np.zeros(z.shape, bool)
    np.put_along_axis(out, order, np.arange(z.shape[1]) < needed[:, None], 1)
    return out & (energy > 0)


def needed_heads(o: NDArray[np.float32], n_heads: int, share: float = HEAD_SHARE) -> NDArray[np.bool_]:
    """Which heads' outputs o [tokens, n_heads * head_dim] are the largest: share of them, at least one; of equals the first."""
    import numpy as np

    norms = np.square(o.reshape(len(o), n_heads, -1), dtype=np.float64).sum(2)
    keep = max(1, round(share * n_heads))
    out = np.zeros(norms.shape, bool)
    np.put_along_axis(out, np.argsort(-norms, axis=1, kind="stable")[:, :keep], True, 1)
    return out


def normalised(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of the residual stream at root mean square 1: what a predictor reads."""
    import numpy as np

    out: NDArray[np.float32] = (x / np.sqrt(np.square(x, dtype=np.float64).mean(1, keepdims=True) + 1e-12)).astype(
        np.float32
    )
    return out


@dataclass
class LayerTrace:
    """Rows of one layer, chunk after chunk, positions in order. x: the normalised stream before the layer's attention,
    [rows, n_embd]. before: the same one layer earlier, None in the first. active [rows, n_ff], heads [rows, n_heads].
    held: rows that training must not see (whole chunks). first: rows that begin a chunk, which have no previous token."""

    layer: int
    x: NDArray[np.float32]
    before: NDArray[np.float32] | None
    active: NDArray[np.bool_]
    heads: NDArray[np.bool_]
    held: NDArray[np.bool_]
    first: NDArray[np.bool_]


def traces(
    model: _core.Model,
    chunks: NDArray[np.int32],
    *,
    config: dict[str, Any],
    drop: int,
    held_chunks: NDArray[np.bool_],
) -> Iterator[LayerTrace]:
    """The layers' rows, layer after layer. drop: positions at the beginning of a chunk that are left out (they decode dense)."""
    import numpy as np

    stream = Stream(model, chunks)
    true_zeros, n_heads = gives_zeros(config), int(config["n_heads"])
    rows = chunks.shape[1] - drop
    held = np.repeat(held_chunks, rows)
    first = np.zeros(len(held), bool)
    first[::rows] = True
    before: NDArray[np.float32] | None = None
    for layer in range(int(config["n_layers"])):
        x = normalised(stream.x[:, drop:].reshape(-1, stream.x.shape[2]))
        active, heads = [], []
        for i in range(len(stream.x)):
            out, taps = stream.run(layer, stream.x[i], taps=True)
            stream.x[i] = out
            active.append(active_neurons(taps["Z"][drop:], true_zeros))
            heads.append(needed_heads(taps["O"][drop:], n_heads))
        yield LayerTrace(layer, x, before, np.concatenate(active), np.concatenate(heads), held, first)
        before = x
