"""How much each layer and site skips: levels from error curves and sensitivities at equal marginal cost, and from greedy
searches within a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_LEVEL = 0.9
STEP = 0.01


def convex_curve(levels: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error at 0, STEP ... MAX_LEVEL from measured points: between them a power law (errors grow like one), then the
    lower convex hull, so that marginal costs grow with the level and noise in a point does no harm."""
    import numpy as np

    grid = np.arange(round(MAX_LEVEL / STEP) + 1) * STEP
    floor = max(float(errors.max()) * 1e-9, 1e-30)
    fine = np.exp(np.interp(np.log(np.maximum(grid, STEP)), np.log(levels), np.log(np.maximum(errors, floor))))
    below = grid < levels[0]
    fine[below] = max(float(errors[0]), floor) * (grid[below] / levels[0]) ** 2.5
    hull: list[int] = []
    for i in range(len(grid)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (fine[b] - fine[a]) * (i - b) >= (fine[i] - fine[b]) * (b - a):
                hull.pop()
            else:
                break
        hull.append(i)
    curve: NDArray[np.float64] = np.interp(grid, grid[hull], fine[hull])
    return curve


def equal_marginal_cost(
    curves: NDArray[np.float64], weights: NDArray[np.float64], target: float
) -> NDArray[np.float64]:
    """Levels [n] that minimise the sum of costs where a share `target` of the weight is skipped.

    curves: cost [n, points] at 0, STEP ...; convex. weights: bytes [n], 0 for what cannot be skipped. The level of each is
    the largest whose marginal cost per byte is at most lambda; lambda is found by bisection.

    >>> import numpy as np
    >>> s = np.arange(91) * STEP
    >>> equal_marginal_cost(np.stack([s**2, 3 * s**2]), np.array([1.0, 1.0]), 0.3).round(2).tolist()
    [0.45, 0.15]
    """
    import numpy as np

    usable = weights > 0
    total = weights.sum()
    marginal = np.diff(curves, axis=1) / np.where(usable, weights, 1.0)[:, None]

    def at(lam: float) -> NDArray[np.float64]:
        # Within a step the marginal cost is taken as linear, so that levels move smoothly with lambda.
        out = np.zeros(len(curves))
        for i in np.flatnonzero(usable):
            m = marginal[i]
            centres = (np.arange(len(m)) + 0.5) * STEP
            out[i] = np.interp(lam, np.maximum.accumulate(m), centres, left=0.0, right=MAX_LEVEL)
        return out

    positive = marginal[usable]
    low, high = 0.0, float(positive.max()) * 2 + 1e-30
    tiny = max(float(positive[positive > 0].min()) if (positive > 0).any() else 1e-30, 1e-30) / 2
    if target <= 0:
        return np.zeros(len(curves))
    low = tiny
    for _ in range(80):
        middle = float(np.sqrt(low * high))
        if (at(middle) * weights).sum() / total < target:
            low = middle
        else:
            high = middle
    return at(high)


def along_path(path: NDArray[np.float64], shares: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Levels on a greedy search's path [steps, n] where it skips `target` of the block's weight; between steps linear.

    shares: the block's skipped weight after each step, growing from 0."""
    import numpy as np

    return np.asarray([np.interp(target, shares, path[:, i]) for i in range(path.shape[1])])
