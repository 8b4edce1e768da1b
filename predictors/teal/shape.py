"""Cross-layer levels by measured sensitivity: how levels should differ by depth and site at a level of the whole model.

Sensitivities hold where they are measured. What masks do adds up badly: a threshold also removes what earlier masks left
behind as small errors, so that a site masked alone looks up to several times dearer, against the others, than it is when
everything else is masked as well. Hence each site and each depth is raised from the levels in question (those of the greedy
search), not from dense; levels then move towards equal marginal cost per byte, and stay moved only where the divergence that
is then measured is lower beyond its noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RAISE = 0.25  # of a group's levels
DEPTHS = 6
POWER = 3.0  # divergence grows about so with the level
MAX_STEP = 1.6  # factor on a group's levels
SPREAD = 0.5  # marginal costs differ by about this much, relatively: what noise is shrunk towards


def groups_of(layers: int, sites: int) -> list[tuple[NDArray[np.bool_], int]]:
    """Masks [layers, sites] of what is raised together, each with its axis: all layers at one site (1), then layers of one
    depth at all sites (0)."""
    import numpy as np

    out: list[tuple[NDArray[np.bool_], int]] = []
    for k in range(sites):
        mask = np.zeros((layers, sites), bool)
        mask[:, k] = True
        out.append((mask, 1))
    for part in np.array_split(np.arange(layers), min(DEPTHS, layers)):
        mask = np.zeros((layers, sites), bool)
        mask[part] = True
        out.append((mask, 0))
    return out


def runs(layers: int, sites: int) -> int:
    """How many divergences `fit_shape` measures."""
    return 2 + len(groups_of(layers, sites))


def rescaled(
    shape: NDArray[np.float64], weights: NDArray[np.float64], target: float, top: float
) -> NDArray[np.float64]:
    """shape * t, at most `top`, with t such that a share `target` of the weights is skipped."""
    import numpy as np

    low, high = 0.0, 1.0
    total = weights.sum()

    def share(t: float) -> float:
        return float((np.minimum(shape * t, top) * weights).sum() / total)

    while share(high) < target and high < 1e9:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < target else (low, middle)
    out: NDArray[np.float64] = np.minimum(shape * high, top)
    return out


def worthwhile(
    levels: NDArray[np.float64], weights: NDArray[np.float64], floors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The levels, 0 at sites where they are below the site's floor on average: such products run dense on the machine, so
    that masking their inputs would cost quality for nothing. What they would have skipped is not asked of the others.

    Whole sites, never single layers: levels that differ from layer to layer by whether they are above a floor cost ten times
    the divergence. floors: [sites]."""
    import numpy as np

    held = weights.sum(0)
    mean = (levels * weights).sum(0) / np.maximum(held, 1e-30)
    return np.where((held > 0) & (mean >= floors), levels, 0.0)


def steps(
    increases: NDArray[np.float64], errors: NDArray[np.float64], skipped: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Factors on the levels of groups [n], from measured increases of the divergence, their standard errors, and the bytes
    skipped more for them (0: nothing to skip there, factor 1).

    Costs per byte are shrunk towards their mean by their noise; where cost grows like the level to the POWER, factors
    cost ** (-1 / (POWER - 1)) make marginal costs equal."""
    import numpy as np

    usable = skipped > 0
    out = np.ones(len(skipped))
    if not usable.any() or increases[usable].sum() <= 0:
        return out
    mean = float(increases[usable].sum() / skipped[usable].sum())
    prior = (SPREAD * mean) ** 2
    trust = prior / (prior + np.square(errors[usable] / skipped[usable]))
    costs = np.maximum(mean + trust * (increases[usable] / skipped[usable] - mean), 0.1 * mean)
    out[usable] = np.clip((costs / mean) ** (-1 / (POWER - 1)), 1 / MAX_STEP, MAX_STEP)
    return out


def fit_shape(
    kl: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    weights: NDArray[np.float64],
    target: float,
    top: float,
    start: NDArray[np.float64],
    tick: Callable[[str], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Levels [layers, sites] that skip a share `target` of weights [layers, sites] at a low divergence, and the mean
    divergences [2] of the start and of the levels that were tried against it.

    kl: divergences token by token at given levels."""
    import numpy as np

    levels = rescaled(start, weights, target, top)
    base = kl(levels)
    tick(f"sensitivity at {target:.0%}")
    groups = groups_of(*weights.shape)
    increases, errors, skipped = (np.zeros(len(groups)) for _ in range(3))
    for i, (mask, _) in enumerate(groups):
        raised = np.where(mask, np.minimum(levels * (1 + RAISE), top), levels)
        skipped[i] = ((raised - levels) * weights).sum()
        if skipped[i] > 0:
            difference = kl(raised) - base
            increases[i], errors[i] = difference.mean(), difference.std() / len(difference) ** 0.5
        tick(f"sensitivity at {target:.0%}, {i + 1} of {len(groups)}")
    moved = levels.copy()
    axes = np.asarray([axis for _, axis in groups])
    for axis in (0, 1):
        of_axis = axes == axis
        found = steps(increases[of_axis], errors[of_axis], skipped[of_axis])
        for (mask, _), factor in zip([group for group in groups if group[1] == axis], found, strict=True):
            moved[mask] *= factor
    moved = rescaled(moved, weights, target, top)
    difference = kl(moved) - base
    tick(f"sensitivity at {target:.0%}, result")
    better = difference.mean() < -difference.std() / len(difference) ** 0.5
    return moved if better else levels, np.asarray([base.mean(), base.mean() + difference.mean()])
