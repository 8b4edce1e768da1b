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
BINS = 400  # that the time of a block is counted in
STEPS = 100  # shares of a block's time that are considered


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
    """The share of a product's dense time that each level of the grid saves: never less than a lower level (measurements that
    say so are averaged), and 0 where skipping is no faster, since such a product runs dense.

    densities, with ratios of the dense time at each."""
    import numpy as np

    from ...bench.breakeven import rising

    order = np.argsort(-densities)
    smooth = -np.asarray(rising((-np.asarray(ratios, np.float64)[order]).tolist()))
    out: NDArray[np.float64] = np.maximum(1 - np.interp(grid, 1 - densities[order], smooth), 0.0)
    out[0] = 0.0
    return out


def cheapest(cost: NDArray[np.float64], gain: NDArray[np.float64], goals: NDArray[np.float64]) -> NDArray[np.intp]:
    """The cheapest levels of one block that save at least each of the goals, as indices into the grid [goals, sites]; where
    no levels save that much, those that save most.

    cost, gain: of each site and level [sites, levels]; gains add up. Exact but for rounding gains down to a BIN of the goals'
    largest: a choice for each site, site after site, of the least cost at which each gain can be had."""
    import numpy as np

    top = float(goals.max())
    bins = np.minimum((gain / max(top, 1e-30) * BINS + 1e-6).astype(int), BINS)
    least = np.full(BINS + 1, np.inf)  # cost of saving at least so many bins with the sites so far
    least[0] = 0.0
    chosen: list[NDArray[np.intp]] = []
    wanted = np.arange(BINS + 1)
    for c, b in zip(cost, bins, strict=True):
        before = np.maximum(wanted[:, None] - b[None, :], 0)  # [bins, levels]: what the sites before must save
        total = least[before] + c[None, :]
        chosen.append(total.argmin(1))
        least = total.min(1)
    out = np.zeros((len(goals), len(cost)), np.intp)
    reachable = int(np.flatnonzero(np.isfinite(least)).max())
    for i, goal in enumerate(goals):
        need = min(int(np.ceil(goal / max(top, 1e-30) * BINS - 1e-6)), reachable)
        for k in range(len(cost) - 1, -1, -1):
            out[i, k] = chosen[k][need]
            need = max(0, need - int(bins[k, out[i, k]]))
    return out


def allocate(
    cost: NDArray[np.float64],
    gain: NDArray[np.float64],
    weights: NDArray[np.float64],
    grid: NDArray[np.float64],
    target: float,
) -> NDArray[np.float64]:
    """Levels [layers, sites] that skip about a share `target` of the weights [layers, sites]: in every block the cheapest that
    save a share of its time, the same share in all blocks.

    The same share, not the same price: errors of blocks' outputs say little about each other. With one price for all blocks
    the divergence at 15% of SmolLM2 was ten times that of equal shares.

    cost, gain: [layers, sites, levels of the grid]."""
    import numpy as np

    shares = np.linspace(0, 1, STEPS + 1)
    levels = np.zeros((len(shares), *weights.shape))
    for i in range(len(weights)):
        usable = np.where(np.isinf(cost[i]) | (weights[i, :, None] <= 0), -np.inf, gain[i])
        usable[:, 0] = 0.0
        most = float(usable.max(1).sum())
        if most > 0:
            limited = np.where(np.isfinite(usable), cost[i], np.inf)
            limited[:, 0] = 0.0
            levels[:, i] = grid[cheapest(limited, np.maximum(usable, 0.0), shares * most)]
    skipped = (levels * weights).sum((1, 2)) / max(float(weights.sum()), 1e-30)
    k = int(np.searchsorted(np.maximum.accumulate(skipped), target))
    if k in (0, len(shares)):
        end: NDArray[np.float64] = levels[min(k, len(shares) - 1)]
        return end
    # Between two shares: as many of the blocks as it takes to meet the target.
    steps = ((levels[k] - levels[k - 1]) * weights).sum(1).cumsum() / weights.sum()
    part: NDArray[np.float64] = levels[k - 1].copy()
    n = int(np.argmin(np.abs(np.concatenate([[0.0], steps]) - (target - skipped[k - 1]))))
    part[:n] = levels[k][:n]
    return part
