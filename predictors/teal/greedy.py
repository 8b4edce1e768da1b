"""Greedy levels within one block: step by step the site whose next step costs least error of the block's output per byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP = 0.05  # of a block's bytes, in one step
LARGEST_STEP = 0.1  # of one site's inputs: a step of a small matrix would skip all of it at once
UP_TO = 0.8  # share of a block's bytes at which a path ends


def path(
    error: Callable[[NDArray[np.float64]], float], shares: NDArray[np.float64], top: float
) -> tuple[list[NDArray[np.float64]], list[float]]:
    """Levels [sites] after every step, from none on, and the errors there.

    error: of the block's output at given levels. shares: of the block's bytes, by site; 0 for what cannot be skipped.
    A step's cost is measured again only where it is the cheapest by what was measured before: costs grow with the levels, so
    the others would not win (lazy greedy search), and a step takes about two measurements instead of four."""
    import numpy as np

    steps = np.where(shares > 0, np.minimum(STEP / np.maximum(shares, 1e-9), LARGEST_STEP), 0.0)
    now, reached = np.zeros(len(shares)), 0.0
    out, reached_at = [now], [reached]
    costs, errors_at, fresh = np.zeros(len(shares)), np.zeros(len(shares)), np.zeros(len(shares), bool)
    while float((now * shares).sum()) < UP_TO - 1e-9:
        open_sites = (shares > 0) & (now < top - 1e-9)
        if not open_sites.any():
            break
        k = int(np.argmin(np.where(open_sites, costs, np.inf)))
        tried = now.copy()
        tried[k] = min(top, now[k] + steps[k])
        if fresh[k]:
            now, reached = tried, float(errors_at[k])
            out.append(now)
            reached_at.append(reached)
            fresh[:] = False
        else:
            errors_at[k] = error(tried)
            costs[k] = (errors_at[k] - reached) / (shares[k] * (tried[k] - now[k]))
            fresh[k] = True
    return out, reached_at
