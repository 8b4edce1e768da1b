"""Offline half of TEAL: thresholds from quantiles, and levels by one of three allocations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...packed_header import SITES, PackedHeader
from ..common import allocate, calibration
from ..common.layers import POINTS, Stream, quantile_table, threshold_at
from .sensitivity import Sensitivity, branch_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core
    from ...tokenizer import Tokenizer

SCORES = ("abs", "wina")
PROBE = 256  # positions of a chunk that error curves are measured on
CURVE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
GREEDY_STEP = 0.05
GROUPS = 6


@dataclass(frozen=True)
class Options(calibration.Options):
    """How to calibrate. score: "abs", an input's magnitude, or "wina", that times the norm of its column."""

    score: str = "abs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise UsageError(f"score is {self.score!r}; it must be one of {', '.join(SCORES)}")


class Fit(calibration.Calibration):
    """One calibration: statistics of every layer, and from them as many sparsity files as are asked for."""

    METHOD = "teal"
    ALLOCATIONS = ("global", "greedy", "uniform")
    LEVEL_ALLOCATION = "uniform"
    MAX_LEVEL = allocate.MAX_LEVEL
    options: Options

    def __init__(
        self,
        model: _core.Model,
        tokenizer: Tokenizer,
        header: PackedHeader,
        options: Options,
        *,
        text: str | None = None,
        tick: calibration.Tick | None = None,
    ) -> None:
        import numpy as np

        super().__init__(model, tokenizer, header, options, text=text, tick=tick)
        self._tables: NDArray[np.float32] | None = None
        self._curves: NDArray[np.float64] | None = None
        self._greedy: dict[str, NDArray[np.float64]] | None = None
        self._norms: dict[str, list[NDArray[np.float32]]] | None = None
        self.weights = np.asarray(
            [[header.site_bytes(s, i) * header.maskable(s, i) for s in SITES] for i in range(header.n_layers)],
            np.float64,
        )
        """Bytes that a layer and site can skip, [n_layers, 4]."""
        if not self.weights.any():
            raise UsageError(
                "this model's matrices are float: there are no columns to skip; sparsity needs a quantised model"
            )

    # Statistics of the layers

    def column_norms(self) -> dict[str, list[NDArray[np.float32]]]:
        """Norms of the columns that a site multiplies, by site and layer [width]; for the score |x| times norm."""
        if self._norms is None:
            from ..common.columns import column_norms

            self._norms = {
                site: [column_norms(self.header, site, i) for i in range(self.header.n_layers)] for site in SITES
            }
        return self._norms

    def tables(self) -> NDArray[np.float32]:
        """Quantiles of the score, [n_layers, 4, POINTS]."""
        if self._tables is None:
            self._tables = self.stage("quantiles", self.key(), self._make_tables)["tables"]
        return self._tables

    def _make_tables(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        layers = self.header.n_layers
        self.announce(1.5 * fit.size)
        stream = Stream(self.model, fit)
        tables = np.zeros((layers, len(SITES), POINTS), np.float32)
        for layer in range(layers):
            for site, values in stream.advance(self.options.dense_tokens).items():
                score = np.abs(values)
                if self.options.score == "wina":
                    score *= self.column_norms()[site][layer]
                tables[layer, SITES.index(site)] = quantile_table(score)
            self.step(f"thresholds, layer {layer + 1} of {layers}", 1.5 * fit.size / layers)
        return {"tables": tables}

    def thresholds(self, levels: NDArray[np.float64]) -> dict[str, list[NDArray[np.float32] | None]]:
        """Thresholds for levels [n_layers, 4]; NaN is dense, and so is what cannot be skipped."""
        import numpy as np

        tables = self.tables()
        out: dict[str, list[NDArray[np.float32] | None]] = {site: [None] * len(levels) for site in SITES}
        for k, site in enumerate(SITES):
            for i, level in enumerate(levels[:, k]):
                if math.isnan(level) or not self.weights[i, k]:
                    continue
                t = np.full(1, threshold_at(tables[i, k], float(level)), np.float32)
                if self.options.score == "wina" and t[0] > 0:
                    norms = self.column_norms()[site][i]
                    with np.errstate(divide="ignore", over="ignore"):
                        t = np.minimum(t / norms, np.finfo(np.float32).max).astype(np.float32)
                out[site][i] = t
        return out

    def plan(self, levels: NDArray[np.float64]) -> _core.Sparsity:
        from ... import _core

        return _core.Sparsity(self.model, self.thresholds(levels), dense_tokens=self.options.dense_tokens)

    def _alone(self, layer: int, levels: NDArray[np.float64]) -> _core.Sparsity:
        """A plan that masks one layer: levels [4]."""
        import numpy as np

        only = np.full_like(self.weights, np.nan)
        only[layer] = np.where(levels > 0, levels, np.nan)
        return self.plan(only)

    def _probes(self) -> list[int]:
        """The chunks that error curves are measured on: one of the model's own text, one of the other half."""
        return [0, len(self.chunks()[0]) - 1]

    def curves(self) -> NDArray[np.float64]:
        """Relative squared error of a layer's branch at CURVE_LEVELS of one site, [n_layers, 4, levels]."""
        if self._curves is None:
            self._curves = self.stage("curves", [*self.key(), PROBE, CURVE_LEVELS], self._make_curves)["curves"]
        return self._curves

    def _make_curves(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.tables()
        layers, probes = self.header.n_layers, self._probes()
        self.announce(len(CURVE_LEVELS) * len(SITES) * PROBE * len(probes))
        curves = np.zeros((layers, len(SITES), len(CURVE_LEVELS)))
        stream = Stream(self.model, fit[probes])
        for layer in range(layers):
            before = stream.x[:, :PROBE].copy()
            stream.advance(0)
            after = stream.x[:, :PROBE]
            for k in range(len(SITES)):
                if not self.weights[layer, k]:
                    continue
                for j, level in enumerate(CURVE_LEVELS):
                    plan = self._alone(layer, np.eye(len(SITES))[k] * level)
                    errors = [
                        branch_error(x, y, stream.run(layer, x, plan)[0], self.options.dense_tokens)
                        for x, y in zip(before, after, strict=True)
                    ]
                    curves[layer, k, j] = np.mean(errors)
            work = len(CURVE_LEVELS) * len(SITES) * PROBE * len(probes) / layers
            self.step(f"error curves, layer {layer + 1} of {layers}", work)
        return {"curves": curves}

    def kappas(self) -> NDArray[np.float64]:
        """KL divergence of the output per unit of a layer's error, [n_layers, 4]; equal within a group of layers."""

        def compute() -> dict[str, NDArray[Any]]:
            return {"kappas": self._make_kappas()}

        self.curves()
        return self.stage("kappas", [*self.key(), PROBE, CURVE_LEVELS, GROUPS], compute)["kappas"]

    def _make_kappas(self) -> NDArray[np.float64]:
        import numpy as np

        fit, _ = self.chunks()
        curves, layers = self.curves(), self.header.n_layers
        groups = np.array_split(np.arange(layers), min(GROUPS, layers))
        at = CURVE_LEVELS.index(0.5)
        work = 4.0 * PROBE
        self.announce(work * (len(groups) * len(SITES) + 1))
        picks = np.unique(np.linspace(0, len(fit) - 1, 4).astype(int))
        sensitivity = Sensitivity(self.model, fit[picks, :PROBE], self.n_vocab)
        self.step("sensitivity", work)
        kappas = np.zeros_like(self.weights)
        for group in groups:
            for k, site in enumerate(SITES):
                error = curves[group, k, at].sum()
                if error > 0:
                    levels = np.full_like(self.weights, np.nan)
                    levels[group, k] = CURVE_LEVELS[at]
                    kappas[group, k] = max(sensitivity.kl(self.plan(levels)), 1e-9) / error
                self.step(f"sensitivity, layers {group[0]} to {group[-1]}, site {site}", work)
        return kappas

    def greedy(self) -> dict[str, NDArray[np.float64]]:
        """Greedy paths within each block: "levels" [n_layers, steps, 4] and the bytes skipped, "shares" [n_layers, steps]."""
        if self._greedy is None:
            self._greedy = self.stage("greedy", [*self.key(), PROBE, GREEDY_STEP], self._make_greedy)
        return self._greedy

    def _make_greedy(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.tables()
        layers, probes = self.header.n_layers, self._probes()
        half = PROBE // 2
        sites = range(len(SITES))
        levels_of: list[list[NDArray[np.float64]]] = []
        work = 100.0 * half * len(probes)
        self.announce(work)
        stream = Stream(self.model, fit[probes])
        for layer in range(layers):
            before = stream.x[:, :half].copy()
            stream.advance(0)
            after = stream.x[:, :half]
            share = self.weights[layer] / max(1.0, self.weights[layer].sum())
            # A step of a small matrix would skip all of it at once: steps are capped and compared per byte.
            steps = np.minimum(GREEDY_STEP / np.maximum(share, 1e-9), 2 * GREEDY_STEP)
            now, error = np.zeros(len(SITES)), 0.0
            path = [now]
            while share.any() and (now * share).sum() < allocate.MAX_LEVEL - 1e-9:
                best: tuple[float, float, NDArray[np.float64]] | None = None
                for k in sites:
                    if not share[k] or now[k] >= allocate.MAX_LEVEL:
                        continue
                    tried = now.copy()
                    tried[k] = min(allocate.MAX_LEVEL, now[k] + steps[k])
                    plan = self._alone(layer, tried)
                    errors = [
                        branch_error(x, y, stream.run(layer, x, plan)[0], self.options.dense_tokens)
                        for x, y in zip(before, after, strict=True)
                    ]
                    mean = float(np.mean(errors))
                    cost = (mean - error) / (share[k] * (tried[k] - now[k]))
                    if best is None or cost < best[0]:
                        best = cost, mean, tried
                if best is None:
                    break
                _, error, now = best
                path.append(now)
            levels_of.append(path)
            self.step(f"greedy search, layer {layer + 1} of {layers}", work / layers)
        longest = max(len(path) for path in levels_of)
        levels = np.stack([np.stack([*path, *[path[-1]] * (longest - len(path))]) for path in levels_of])
        shares = (levels * (self.weights / np.maximum(self.weights.sum(1, keepdims=True), 1.0))[:, None]).sum(2)
        return {"levels": levels, "shares": shares}

    # Allocation

    def levels(self, allocation: str, target: float) -> NDArray[np.float64]:
        """Levels [n_layers, 4] that skip a share `target` of the bytes that can be skipped; NaN is dense."""
        import numpy as np

        if allocation == "uniform" or not target:
            return np.full_like(self.weights, target)
        if target > allocate.MAX_LEVEL:
            raise UsageError(f"a level of {target:g} is above {allocate.MAX_LEVEL}, the most that an allocation skips")
        if allocation == "greedy":
            paths = self.greedy()
            rows = [allocate.along_path(p, s, target) for p, s in zip(paths["levels"], paths["shares"], strict=True)]
            out = np.stack(rows)
        elif allocation == "global":
            measured = self.curves().reshape(-1, len(CURVE_LEVELS))
            kappas = self.kappas().reshape(-1, 1)
            points = np.asarray(CURVE_LEVELS)
            curves = kappas * np.stack([allocate.convex_curve(points, row) for row in measured])
            out = allocate.equal_marginal_cost(curves, self.weights.ravel(), target).reshape(self.weights.shape)
        else:
            raise UsageError(f"allocation is {allocation!r}; it must be one of {', '.join(self.ALLOCATIONS)}")
        # A mask that skips next to nothing costs more than it brings.
        return np.where(out < 0.02, np.nan, out)

    def thresholds_at(
        self, allocation: str, target: float
    ) -> tuple[dict[str, list[NDArray[np.float32] | None]], dict[str, list[float]]]:
        levels = self.levels(allocation, target)
        shares = {s: [0.0 if math.isnan(v) else round(float(v), 4) for v in levels[:, k]] for k, s in enumerate(SITES)}
        return self.thresholds(levels), shares

    def prepare(self, allocation: str) -> None:
        self.levels(allocation, 0.5)

    def name_of(self, allocation: str, level: float | None, budget: float | None) -> str:
        """ "uniform-0.50" for a level; "teal-1pct" for a budget."""
        score = "" if self.options.score == "abs" else f"-{self.options.score}"
        if budget is None:
            return level_name(level or 0.0, allocation) + score
        own = "" if allocation == self.ALLOCATIONS[0] else f"-{allocation}"
        return f"teal{own}{score}-{100 * budget:g}pct"


def level_name(level: float, allocation: str = "uniform") -> str:
    """The file's name for a level, such as "uniform-0.50"."""
    return f"{allocation}-{calibration.level_text(level)}"
