"""Offline half of CATS and CHESS: thresholds for |act(gate)| from quantiles, one for a layer or one for each neuron.

CATS (arXiv 2404.08763): t_l is the s-quantile of |act(gate)| over tokens and neurons of layer l.
CHESS (arXiv 2409.01366): neuron i's expected share of the output is g_i^2 E[u_i^2], u = up; tau_l is its s-quantile, and
t_i = sqrt(tau_l / E[u_i^2]).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import Error, UsageError
from ..common.calibration import Calibration
from ..common.layers import POINTS, Stream, quantile_table, threshold_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SITE = "G"
_VALUES = 1 << 22  # that a layer's quantiles are made from


class Fit(Calibration):
    """Levels of site G, the same in every layer."""

    METHOD: ClassVar[str] = "cats"
    ALLOCATIONS: ClassVar[tuple[str, ...]] = ("uniform",)

    _found: dict[str, NDArray[Any]] | None = None

    def check(self) -> None:
        """Raises UsageError where the model's FFN has no gate, or is stored by columns."""
        if not self.header.config.get("ffn_gated", True):
            raise UsageError(f"{self.METHOD} needs an FFN with a gate, which this model has not; use --method teal")
        self.header.need_neurons(self.METHOD)

    def statistics(self) -> dict[str, NDArray[Any]]:
        """"up": E[u^2] of every neuron [n_layers, n_ff]; "cats", "chess": quantiles of |g| and of |g| sqrt(E[u^2]),
        [n_layers, POINTS]."""
        if self._found is None:
            self._found = self.stage("gates", self.key(), self._make)
        return self._found

    def _make(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        layers, n_ff = self.header.n_layers, self.header.width(SITE)
        self.announce(1.5 * fit.size)
        stream = Stream(self.model, fit)
        up = np.zeros((layers, n_ff), np.float32)
        tables = {name: np.zeros((layers, POINTS), np.float32) for name in ("cats", "chess")}
        for layer in range(layers):
            size, square = self._rows(stream, layer)
            up[layer] = square
            tables["cats"][layer] = quantile_table(size)
            tables["chess"][layer] = quantile_table(size * np.sqrt(up[layer]))
            self.step(f"gates, layer {layer + 1} of {layers}", 1.5 * fit.size / layers)
        return {"up": up, **tables}

    def _rows(self, stream: Stream, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Takes the corpus through a layer: |act(gate)| of its tokens, or of a sample of them, and E[u^2] over all."""
        import numpy as np

        drop = self.options.dense_tokens
        sizes: list[NDArray[np.float32]] = []
        square = np.zeros(self.header.width(SITE))
        step = max(1, -(-stream.x.shape[0] * (stream.ctx - drop) * len(square) // _VALUES))
        for i in range(len(stream.x)):
            stream.x[i], taps = stream.run(layer, stream.x[i], taps=True)
            sizes.append(np.abs(taps["G"][drop + i % step :: step]))
            square += np.square(taps["U"][drop:], dtype=np.float64).sum(0)
        size = np.concatenate(sizes)
        if not np.isfinite(size).all() or not np.isfinite(square).all():
            raise Error(
                f"layer {layer}: gates or ups are not finite numbers; convert the model again with `sparse-run convert`"
            )
        return size, square / (stream.x.shape[0] * (stream.ctx - drop))

    def prepare(self, allocation: str) -> None:
        self.statistics()

    def thresholds_at(
        self, allocation: str, target: float
    ) -> tuple[dict[str, list[NDArray[np.float32] | None]], dict[str, list[float]]]:
        layers = self.header.n_layers
        if not target:
            return {SITE: [None] * layers}, {SITE: [0.0] * layers}
        return {SITE: [self.threshold(i, target) for i in range(layers)]}, {SITE: [target] * layers}

    def threshold(self, layer: int, level: float) -> NDArray[np.float32]:
        """Of a layer, [1]."""
        import numpy as np

        return np.full(1, threshold_at(self.statistics()["cats"][layer], level), np.float32)


class Chess(Fit):
    """CHESS: the same quantile of |g| sqrt(E[u^2]), so that neurons have thresholds of their own."""

    METHOD: ClassVar[str] = "chess"

    def threshold(self, layer: int, level: float) -> NDArray[np.float32]:
        """Of a layer's neurons, [n_ff]; a neuron whose up is always 0 is never kept."""
        import numpy as np

        found = self.statistics()
        root = np.sqrt(found["up"][layer])
        with np.errstate(divide="ignore", over="ignore"):
            t = np.float32(threshold_at(found["chess"][layer], level)) / root
        return np.where(root > 0, np.minimum(t, np.finfo(np.float32).max), np.finfo(np.float32).max).astype(np.float32)


FITS: dict[str, type[Calibration]] = {"cats": Fit, "chess": Chess}
