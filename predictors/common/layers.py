"""Activations layer by layer: the residual stream of the whole corpus is held and pushed through one layer after the other,
so that any model needs the memory of one layer's activations only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import Error
from ...packed_header import SITES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core

BLOCK = 256  # rows that run_layer takes at a time
POINTS = 1001  # of a quantile table: level 0, 0.001 ... 1
_SAMPLES = 1 << 19  # values that a quantile table is made from; more do not move it


class Stream:
    """Chunks of tokens before a layer, `x` [chunks, ctx, n_embd]; `advance` takes them through it."""

    def __init__(self, model: _core.Model, chunks: NDArray[np.int32]) -> None:
        import numpy as np

        from ... import _core

        self.ctx = chunks.shape[1]
        self._session = _core.Session(model, self.ctx)
        self.x = np.stack([self._session.embed(chunk) for chunk in chunks])
        self.layer = 0

    def run(
        self, layer: int, x: NDArray[np.float32], plan: _core.Sparsity | None = None, taps: bool = False
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """The beginning of a chunk [n <= ctx, n_embd] through one layer: the stream after it, and its sites' inputs."""
        import numpy as np

        self._session.set_sparsity(plan, mask_prefill=plan is not None)
        outs, tapped = [], []
        for pos in range(0, len(x), BLOCK):
            out, tap = self._session.run_layer(layer, pos, x[pos : pos + BLOCK], taps=taps)
            outs.append(out)
            tapped.append(tap)
        joined = {site: np.concatenate([tap[site] for tap in tapped]) for site in tapped[0]} if taps else {}
        return np.concatenate(outs), joined

    def advance(self, drop: int) -> dict[str, NDArray[np.float32]]:
        """Takes all chunks through the layer, dense; returns the inputs of its sites, [n, width], without the first `drop`
        positions of every chunk. Raises Error where one is not finite."""
        import numpy as np

        rows: dict[str, list[NDArray[np.float32]]] = {site: [] for site in SITES}
        for i in range(len(self.x)):
            out, taps = self.run(self.layer, self.x[i], taps=True)
            self.x[i] = out
            for site in SITES:
                keep = taps[site][drop:]
                # A sample of rows is enough, and bounded for wide models.
                step = max(1, len(self.x) * keep.size // _SAMPLES)
                rows[site].append(keep[i % step :: step])
        self.layer += 1
        found = {site: np.concatenate(parts) for site, parts in rows.items() if parts}
        for site, values in found.items():
            if not np.isfinite(values).all():
                raise Error(
                    f"layer {self.layer - 1}: activations at site {site} are not finite numbers; "
                    "convert the model again with `sparse-run convert`"
                )
        return found


def quantile_table(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """POINTS quantiles of the scores: entry k is the threshold that a share k / (POINTS - 1) does not exceed."""
    import numpy as np

    ordered = np.sort(scores, axis=None)
    at = np.linspace(0, ordered.size, POINTS).astype(np.int64) - 1
    table: NDArray[np.float32] = ordered[np.maximum(at, 0)]
    table[0] = 0.0
    return table


def threshold_at(table: NDArray[np.float32], level: float) -> float:
    """The threshold of a level 0..1, between the table's points linear."""
    import numpy as np

    return float(np.interp(level * (POINTS - 1), np.arange(POINTS), table))
