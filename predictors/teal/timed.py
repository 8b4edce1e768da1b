"""Levels that buy time: where a step's error is small for the time that it saves on this machine, not for its bytes.

Products with few columns left out take as long as dense ones, so that a budget of perplexity that is spread thinly over all
matrices buys bytes and no time. What a level saves is read off the times that `sparse-run bench --breakeven` measured for the
shapes of this model; what it costs, off the greedy searches' steps. Where nothing was measured, bytes stand for time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRID = 0.01  # between levels that are considered


def costs(path: NDArray[np.float64], errors: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each level of a site alone adds to the error of its block, [sites, levels of the grid]: the sum of the steps that
    a greedy search took at that site, with everything else masked as it then was. Infinite beyond the search's end.

    path: levels after each step [steps, sites]; errors [steps]."""
    import numpy as np

    out = np.full((path.shape[1], len(grid)), np.inf)
    steps, added = np.diff(path, axis=0), np.maximum(np.diff(errors), 0.0)
    for k in range(path.shape[1]):
        moved = steps[:, k] > 1e-12
        at = np.concatenate([[0.0], path[1:][moved, k]])
        # A step's slope is at least that of the steps before it: what noise there is should not make a level look free.
        slopes = np.maximum.accumulate(added[moved] / steps[moved, k]) if moved.any() else np.zeros(0)
        total = np.concatenate([[0.0], np.cumsum(slopes * np.diff(at))])
        reached = grid <= at[-1] + 1e-9
        out[k, reached] = np.interp(grid[reached], at, total)
    return out


def saved(densities: NDArray[np.float64], ratios: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of a product's dense time that each level of the grid saves: never less than a lower level, and 0 where
    skipping is no faster, since such a product runs dense. densities, with ratios of the dense time at each."""
    import numpy as np

    order = np.argsort(densities)
    ratio = np.interp(1 - grid, densities[order], ratios[order])
    out: NDArray[np.float64] = np.maximum.accumulate(np.maximum(1 - ratio, 0.0))
    out[0] = 0.0
    return out


def allocate(
    cost: NDArray[np.float64],
    gain: NDArray[np.float64],
    weights: NDArray[np.float64],
    grid: NDArray[np.float64],
    target: float,
) -> NDArray[np.float64]:
    """Levels [layers, sites] that skip a share `target` of the weights [layers, sites], such that the time saved is the most
    for its error: every site of every layer has the level at which gain - price * cost is largest, with one price for all.

    cost, gain: [layers, sites, levels of the grid]. Levels jump where time does, so that the last ones are scaled a little
    to meet the target."""
    import numpy as np

    total = weights.sum()

    def at(price: float) -> NDArray[np.float64]:
        worth = np.where(np.isinf(cost), -np.inf, gain - price * np.where(np.isinf(cost), 0.0, cost))
        out: NDArray[np.float64] = np.where(weights > 0, grid[worth.argmax(2)], 0.0)
        return out

    low, high = 1e-12, 1e12  # prices: a low one skips much
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (at(middle) * weights).sum() > target * total else (low, middle)
    more, less = at(low), at(high)  # on both sides of the target, one jump apart
    have = float((less * weights).sum() / total)
    room = float(((more - less) * weights).sum() / total)
    if room <= 0:
        return less
    # Of what jumps at this price, as many as are needed, cheapest in error for its bytes first; in part, the last.
    order = np.flatnonzero(more > less)
    index = np.rint(more / grid[1]).astype(int)
    spent = np.take_along_axis(cost, index[:, :, None], 2)[:, :, 0] / np.maximum(more * weights, 1e-30)
    out = less.copy()
    for i in order[np.argsort(spent.flat[order])]:
        step = float((more.flat[i] - less.flat[i]) * weights.flat[i] / total)
        if have + step > target + 1e-12:
            break
        out.flat[i], have = more.flat[i], have + step
    return out
