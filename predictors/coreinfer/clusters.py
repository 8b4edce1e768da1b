"""Groups of passages that use the same neurons: k-means on multi-hot vectors, and the neurons that each group needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .selection import Choice, multi_hot, reference_layer, top

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEED = 42
MOST, LEAST = 10, 4  # clusters tried, and the fewest that are used
_ROUNDS = 100
_STARTS = 8  # one start may leave a group parted and two joined


def kmeans(
    points: NDArray[np.float32], k: int, seed: int = SEED
) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
    """The best of some runs of Lloyd's algorithm from k-means++ starts: centroids [k, width], each point's cluster, and the
    sum of squared distances. The same points and seed give the same clusters; k is at most the number of points."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return min((_lloyd(points, k, rng) for _ in range(_STARTS)), key=lambda run: run[2])


def _lloyd(
    points: NDArray[np.float32], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
    import numpy as np

    norms = np.square(points, dtype=np.float64).sum(1)
    width = points.astype(np.float64)

    def distances(centroids: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = np.maximum(norms[:, None] - 2 * width @ centroids.T + np.square(centroids).sum(1), 0.0)
        return out

    centroids = width[[int(rng.integers(len(points)))]]
    while len(centroids) < k:
        d = distances(centroids).min(1)
        total = d.sum()
        at = int(rng.choice(len(points), p=d / total)) if total > 0 else int(rng.integers(len(points)))
        centroids = np.concatenate([centroids, width[[at]]])
    assigned = np.full(len(points), -1, np.int64)
    for _ in range(_ROUNDS):
        d = distances(centroids)
        now = d.argmin(1)
        for empty in np.setdiff1d(np.arange(k), now):  # its place is taken by the point that fits worst
            now[d[np.arange(len(now)), now].argmax()] = empty
            d[now == empty] = 0.0
        if (now == assigned).all():
            break
        assigned = now
        centroids = np.stack([width[assigned == c].mean(0) for c in range(k)])
    error = float(distances(centroids)[np.arange(len(points)), assigned].sum())
    return centroids.astype(np.float32), assigned, error


def elbow(errors: list[float]) -> int:
    """How many clusters (index + 1): where the falling curve of errors is farthest below its chord."""
    import numpy as np

    if len(errors) < 3 or errors[0] <= 0:
        return len(errors)
    y = np.asarray(errors) / errors[0]
    x = np.linspace(0, 1, len(y))
    chord = y[0] + (y[-1] - y[0]) * x
    return int((chord - y).argmax()) + 1


def make(counts: NDArray[np.float32], choice: Choice, seed: int = SEED) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Clusters of passages from their core counts [passages, n_layers, n_ff]: centroids [k, n_ff] of the multi-hot
    vectors, and the neurons to keep by cluster and layer, ascending, [k, n_layers, keep]."""
    import numpy as np

    passages, n_layers, n_ff = counts.shape
    at = reference_layer(n_layers)
    vectors = np.stack([multi_hot(c[at]) for c in counts])
    most = min(MOST, passages)
    k = max(min(LEAST, most), elbow([kmeans(vectors, n, seed)[2] for n in range(1, most + 1)]))
    centroids, assigned, _ = kmeans(vectors, k, seed)
    keep = choice.keep(n_ff)
    lists = [
        [top(counts[assigned == c, layer].sum(0, dtype=np.float64), keep) for layer in range(n_layers)] for c in range(k)
    ]
    return centroids, np.asarray(lists, np.int32)
