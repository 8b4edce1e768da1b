"""From what a prompt's tokens did to the neurons that decode: pure NumPy, used after each prompt and offline.

Two statistics over the rows z = act(gate) * up [tokens, n_ff] of a layer:

- griffin (arXiv 2404.01365): a_j = the Euclidean norm over tokens of z[:, j] / ||z[t, :]||, kept as its square;
- core (arXiv 2410.18311): a token's core is the largest TOKEN_SHARE of its positive values; a_j = in how many tokens' cores
  neuron j is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATISTICS = ("griffin", "core")
TOKEN_SHARE = 0.2  # of a token's positive values that are its core
ACTIVE_SHARE = 0.27  # of the neurons that are 1 in a passage's multi-hot vector (the paper's 3000 of 11008)
REFERENCE_DEPTH = 25 / 32  # of the layers: where passages are compared


@dataclass(frozen=True)
class Choice:
    """How the sets are chosen. density: share of neurons kept in a layer that is not protected. first, last: protected
    layers, which stay dense. min_prompt: with fewer tokens observed, decoding stays dense."""

    statistic: str = "griffin"
    density: float = 0.5
    first: int = 0
    last: int = 0
    min_prompt: int = 32

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise UsageError(f"statistic is {self.statistic!r}; it must be one of {', '.join(STATISTICS)}")
        if not 0 < self.density <= 1:
            raise UsageError(f"a density of {self.density:g} is outside 0..1; 0.5 keeps half of the neurons")
        if self.first < 0 or self.last < 0 or self.min_prompt < 1:
            raise UsageError("protected layers must be 0 or more, and min_prompt 1 or more")

    def protected(self, layer: int, n_layers: int) -> bool:
        return layer < self.first or layer >= n_layers - self.last

    def keep(self, n_ff: int) -> int:
        """Neurons kept of n_ff, at least one."""
        return max(1, min(n_ff, round(self.density * n_ff)))

    @classmethod
    def of(cls, options: dict[str, Any]) -> Choice:
        """The choice that a sparsity file's options say. Raises UsageError where one is impossible."""
        try:
            return cls(
                statistic=str(options.get("statistic", "griffin")),
                density=float(options["density"]),
                first=int(options.get("first", 0)),
                last=int(options.get("last", 0)),
                min_prompt=int(options.get("min_prompt", 32)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the sparsity file's options are damaged ({error}); make it again") from None


def griffin_squares(z: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squares of GRIFFIN's statistic for rows z [tokens, n_ff]; squares of two prompts add up. Rows of zeros count nothing."""
    import numpy as np

    square = np.square(z, dtype=np.float64)
    norms = square.sum(1, keepdims=True)
    out: NDArray[np.float64] = (square / np.where(norms > 0, norms, 1.0)).sum(0)
    return out


def core_counts(z: NDArray[np.float32], share: float = TOKEN_SHARE) -> NDArray[np.int64]:
    """In how many tokens' cores each neuron is: of row t the ceil(share * number of positive values) largest values, the
    lower index first where two are equal."""
    import numpy as np

    counts = np.zeros(z.shape[1], np.int64)
    for row in z:
        positive = int((row > 0).sum())
        limit = -(-positive * round(share * 1000) // 1000)
        counts[np.argsort(-row, kind="stable")[:limit]] += 1
    return counts


def top(statistic: NDArray[Any], keep: int) -> NDArray[np.int32]:
    """The `keep` neurons of the largest statistic [n_ff], ascending; of equal ones those with the lower index."""
    import numpy as np

    chosen = np.argsort(-np.asarray(statistic, np.float64), kind="stable")[:keep]
    return np.sort(chosen).astype(np.int32)


def choose(statistic: NDArray[Any], choice: Choice) -> list[NDArray[np.int32] | None]:
    """One ascending list a layer from a statistic [n_layers, n_ff]; None where the layer is protected, or where all
    neurons would be kept."""
    n_layers, n_ff = statistic.shape
    keep = choice.keep(n_ff)
    return [
        None if keep == n_ff or choice.protected(i, n_layers) else top(statistic[i], keep) for i in range(n_layers)
    ]


def reference_layer(n_layers: int) -> int:
    """The layer whose cores tell passages apart: 25 of 32 in the paper."""
    return min(n_layers - 1, round(REFERENCE_DEPTH * n_layers))


def multi_hot(counts: NDArray[Any]) -> NDArray[np.float32]:
    """A passage's vector [n_ff] from its core counts at the reference layer: 1 for the most frequent neurons."""
    import numpy as np

    out = np.zeros(len(counts), np.float32)
    out[top(counts, max(1, round(ACTIVE_SHARE * len(counts))))] = 1
    return out


def nearest(vector: NDArray[Any], centroids: NDArray[Any]) -> int:
    """The centroid [k, n_ff] closest to a vector; the first of equals."""
    import numpy as np

    return int(np.square(centroids.astype(np.float64) - vector).sum(1).argmin())
