"""A low-rank predictor of which neurons (or heads) a token needs: its weights, what they predict, and how well.

logits = B (A h), h the normalised residual stream; index i is predicted where logits[i] > threshold[i]. A [rank, n_embd]
and B [n, rank] are int8 with one float32 scale a row; the threshold carries the bias that training found. A matrix whose
codes are all in -8 .. 7 is held and read in 4 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

POINTS = 256  # thresholds that a layer's curve is measured at


@dataclass
class Predictor:
    """a int8 [rank, n_embd], a_scale float32 [rank], b int8 [n, rank], b_scale float32 [n], threshold float32 [n]."""

    a: NDArray[np.int8]
    a_scale: NDArray[np.float32]
    b: NDArray[np.int8]
    b_scale: NDArray[np.float32]
    threshold: NDArray[np.float32]

    def logits(self, h: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [rows, n] of rows h [rows, n_embd]."""
        hidden = (h @ self.a.astype("float32").T) * self.a_scale
        out: NDArray[np.float32] = (hidden @ self.b.astype("float32").T) * self.b_scale
        return out

    def predict(self, h: NDArray[np.float32]) -> NDArray[np.bool_]:
        """What is predicted to be needed, [rows, n]."""
        out: NDArray[np.bool_] = self.logits(h) > self.threshold
        return out

    @property
    def nbytes(self) -> int:
        """As they are held: codes of up to 4 bits in half a byte."""
        codes = sum(m.nbytes // 2 if -8 <= m.min() and m.max() <= 7 else m.nbytes for m in (self.a, self.b))
        return codes + self.a_scale.nbytes + self.b_scale.nbytes + self.threshold.nbytes

    def arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """The arrays as a sparsity file names them."""
        return {
            f"{prefix}.a": self.a,
            f"{prefix}.a_scale": self.a_scale,
            f"{prefix}.b": self.b,
            f"{prefix}.b_scale": self.b_scale,
            f"{prefix}.threshold": self.threshold,
        }


def quantise(weights: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows as symmetric codes of so many bits and one scale each; a row of zeros has scale 0."""
    import numpy as np

    most = 2 ** (bits - 1) - 1
    scale = (np.abs(weights).max(1) / most).astype(np.float32)
    codes = np.rint(weights / np.where(scale > 0, scale, 1)[:, None])
    return np.clip(codes, -most, most).astype(np.int8), scale


def make(a: NDArray[np.float32], b: NDArray[np.float32], bias: NDArray[np.float32], bits: int = 8) -> Predictor:
    """From trained floats; the threshold is -bias, where the trained probability is one half. bits: of a weight."""
    import numpy as np

    codes_a, scale_a = quantise(a, bits)
    codes_b, scale_b = quantise(b, bits)
    return Predictor(codes_a, scale_a, codes_b, scale_b, np.ascontiguousarray(-bias, np.float32))


def read(
    arrays: Mapping[str, NDArray[Any]], layer: int, what: str, *, n_embd: int, n: int, where: str = "the sparsity file"
) -> Predictor | None:
    """The predictor of a layer's `what` ("neurons", "heads"), None where there is none. Raises ModelError where its arrays
    do not fit together, or not this model."""
    import numpy as np

    prefix = f"predictor.{layer}.{what}"
    found = {key: arrays.get(f"{prefix}.{key}") for key in ("a", "a_scale", "b", "b_scale", "threshold")}
    if all(value is None for value in found.values()):
        return None
    rank = len(found["a"]) if found["a"] is not None else 0
    wanted = {
        "a": ((rank, n_embd), np.int8),
        "a_scale": ((rank,), np.float32),
        "b": ((n, rank), np.int8),
        "b_scale": ((n,), np.float32),
        "threshold": ((n,), np.float32),
    }
    for key, (shape, dtype) in wanted.items():
        value = found[key]
        finite = value is not None and bool(np.isfinite(value).all())
        if value is None or value.shape != shape or value.dtype != dtype or not finite or not rank:
            kind = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise ModelError(
                f"{where}: {prefix}.{key} is {kind}, wanted finite {np.dtype(dtype).name} {list(shape)}; "
                "train it again with `sparse-run train-predictor`"
            )
    return Predictor(**{key: value for key, value in found.items() if value is not None})


@dataclass(frozen=True)
class Curve:
    """What a layer's predictor reaches at offsets added to its thresholds: recall (share of needed indices predicted, mean
    over rows) and density (share predicted), each [POINTS], offsets ascending, so that both fall."""

    offsets: NDArray[np.float64]
    recall: NDArray[np.float64]
    density: NDArray[np.float64]


def recall_of(predicted: NDArray[np.bool_], needed: NDArray[np.bool_]) -> float:
    """Mean over rows that need anything of the share of it that is predicted."""
    count = needed.sum(1)
    rows = count > 0
    if not rows.any():
        return 1.0
    return float(((predicted & needed).sum(1)[rows] / count[rows]).mean())


def curve(predictor: Predictor, h: NDArray[np.float32], needed: NDArray[np.bool_]) -> Curve:
    """Measured on rows that training did not see."""
    import numpy as np

    margin = predictor.logits(h) - predictor.threshold
    ordered = np.sort(margin, axis=None)
    at = np.linspace(0, ordered.size - 1, POINTS).astype(np.int64)
    offsets = np.unique(np.concatenate([[ordered[0] - 1.0], ordered[at].astype(np.float64)]))
    recalls, densities = [], []
    for offset in offsets:
        predicted = margin > offset
        recalls.append(recall_of(predicted, needed))
        densities.append(float(predicted.mean()))
    return Curve(offsets, np.asarray(recalls), np.asarray(densities))


def joint_offsets(curves: list[Curve], recall: float) -> list[float]:
    """One offset a layer so that the mean recall over the layers is at least `recall` at the least total density: all
    layers give up recall at the same price in density (a common price, found by bisection)."""
    import numpy as np

    def at(price: float) -> list[int]:
        """Of equal points the one that keeps most."""
        return [int(np.argmax(c.recall - price * c.density)) for c in curves]

    def mean(points: list[int]) -> float:
        return float(np.mean([c.recall[i] for c, i in zip(curves, points, strict=True)]))

    low, high = 0.0, 1.0
    while mean(at(high)) >= recall and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if mean(at(middle)) >= recall:
            low = middle
        else:
            high = middle
    return [float(c.offsets[i]) for c, i in zip(curves, at(low), strict=True)]


def previous_token(needed: NDArray[np.bool_], first: NDArray[np.bool_]) -> tuple[float, float]:
    """Recall and density of the trivial predictor: what the previous token needed. Rows that begin a chunk are left out."""
    import numpy as np

    rows = np.flatnonzero(~first)
    rows = rows[rows > 0]
    if not len(rows):
        return 0.0, 0.0
    before = needed[rows - 1]
    return recall_of(before, needed[rows]), float(before.mean())


def recall_at(c: Curve, density: float) -> float:
    """The recall of a curve where its density is as given, between points linear."""
    import numpy as np

    order = np.argsort(c.density, kind="stable")
    return float(np.interp(density, c.density[order], c.recall[order]))
