"""What allocations of levels share: how far a level may go, and levels along a greedy search's path."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_LEVEL = 0.9


def along_path(path: NDArray[np.float64], shares: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Levels on a greedy search's path [steps, n] where it skips `target` of the block's weight; between steps linear.

    shares: the block's skipped weight after each step, growing from 0."""
    import numpy as np

    return np.asarray([np.interp(target, shares, path[:, i]) for i in range(path.shape[1])])
