"""Offline half of TEAL: thresholds from quantiles, and levels by one of three allocations."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...packed_header import SITES
from ..common import allocate, calibration
from ..common.columns import column_bytes, column_norms
from ..common.layers import POINTS, Stream, quantile_table, threshold_at
from . import greedy, shape, timed
from .sensitivity import Sensitivity, branch_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core

SCORES = ("abs", "wina")
PROBE = 192  # positions of a chunk that greedy searches look at
SENSED = (8, 256)  # chunks, and positions of each, that sensitivities are measured on
SCORED_FROM = 64  # of those positions
ANCHORS = (0.2, 0.45)  # levels at which sensitivities are measured
MIN_LEVEL = 0.05  # a mask that skips less costs more than it brings, on any machine
MOST_FLOOR = 0.5  # where a machine wants more than that, skipping does not pay at all


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
    ALLOCATIONS = ("global", "greedy", "uniform", "time")
    LEVEL_ALLOCATION = "uniform"
    MAX_LEVEL = allocate.MAX_LEVEL
    options: Options

    _tables: NDArray[np.float32] | None = None
    _greedy: dict[str, NDArray[np.float64]] | None = None
    _norms: dict[str, list[NDArray[np.float32]]] | None = None

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Bytes that a layer and site can skip, [n_layers, 4]."""
        import numpy as np

        header = self.header
        return np.asarray(
            [[column_bytes(header, s, i) * header.maskable(s, i) for s in SITES] for i in range(header.n_layers)],
            np.float64,
        )

    def check(self) -> None:
        """Raises UsageError where no matrix is quantised."""
        if not self.weights.any():
            raise UsageError(
                "this model's matrices are float: there are no columns to skip; sparsity needs a quantised model"
            )

    # Statistics of the layers

    def column_norms(self) -> dict[str, list[NDArray[np.float32]]]:
        """Norms of the columns that a site multiplies, by site and layer [width]; for the score |x| times norm."""
        if self._norms is None:
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

    def factors(self, anchor: float) -> NDArray[np.float64]:
        """Factors on the greedy levels [n_layers, 4] that sensitivities measured at the level `anchor` call for."""
        constants = [
            SENSED,
            SCORED_FROM,
            shape.RAISE,
            shape.DEPTHS,
            shape.POWER,
            shape.MAX_STEP,
            shape.SPREAD,
            MIN_LEVEL,
        ]
        key = [*self.key(), anchor, *constants]
        return self.stage("factors", key, lambda: self._make_factors(anchor))["factors"]

    def _make_factors(self, anchor: float) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.greedy()
        picks = np.unique(np.linspace(0, len(fit) - 1, SENSED[0]).astype(int))
        chunks = fit[picks, : SENSED[1]]
        runs = 1 + shape.runs(*self.weights.shape)
        self.announce(1.2 * chunks.size * runs)
        sensitivity: list[Sensitivity] = []
        kept: list[Path] = []

        def divergence(levels: NDArray[np.float64]) -> NDArray[np.float64]:
            def compute() -> dict[str, NDArray[Any]]:
                if not sensitivity:
                    sensitivity.append(Sensitivity(self.model, chunks, min(SCORED_FROM, chunks.shape[1] // 2)))
                    self.step("sensitivity", 1.2 * chunks.size)
                return {"kl": sensitivity[0].kl(self.plan(np.where(levels > 0, levels, np.nan)))}

            at = [*self.key(), SENSED, SCORED_FROM, hashlib.sha256(levels.tobytes()).hexdigest()]
            kept.append(self.stage_path("divergence", at))
            return self.stage("divergence", at, compute)["kl"]

        start = shape.rescaled(self._greedy_levels(anchor), self.weights, anchor, allocate.MAX_LEVEL)
        levels, measured = shape.fit_shape(
            divergence,
            self.weights,
            anchor,
            allocate.MAX_LEVEL,
            start,
            lambda what: self.step(what, 1.2 * chunks.size),
        )
        for path in kept:  # they only served an interrupted run
            path.unlink(missing_ok=True)
        return {"factors": np.where(start > 0, levels / np.maximum(start, 1e-9), 1.0), "divergences": measured}

    def greedy(self) -> dict[str, NDArray[np.float64]]:
        """Greedy paths within each block: "levels" [n_layers, steps, 4], and after each step [n_layers, steps] the bytes
        skipped, "shares", and the error of the block's output, "errors"."""
        if self._greedy is None:
            constants = [PROBE, greedy.STEP, greedy.LARGEST_STEP, greedy.UP_TO]
            self._greedy = self.stage("greedy", [*self.key(), *constants, "errors"], self._make_greedy)
        return self._greedy

    def _make_greedy(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.tables()
        layers = self.header.n_layers
        probes = [0, len(fit) - 1]  # one chunk of the model's own text, one of the other half
        paths: list[list[NDArray[np.float64]]] = []
        costs: list[list[float]] = []
        work = 60.0 * PROBE * len(probes)
        self.announce(work)
        stream = Stream(self.model, fit[probes, :PROBE])
        for layer in range(layers):
            before = stream.x.copy()
            stream.advance(0)
            after = stream.x

            def error(levels: NDArray[np.float64], layer: int = layer) -> float:
                plan = self._alone(layer, levels)
                errors = [
                    branch_error(x, y, stream.run(layer, x, plan)[0], self.options.dense_tokens)
                    for x, y in zip(before, after, strict=True)  # noqa: B023 - called within this turn of the loop
                ]
                return float(np.mean(errors))

            share = self.weights[layer] / max(1.0, self.weights[layer].sum())
            path, errors = greedy.path(error, share, allocate.MAX_LEVEL)
            paths.append(path)
            costs.append(errors)
            self.step(f"greedy search, layer {layer + 1} of {layers}", work / layers)
        longest = max(len(path) for path in paths)
        levels = np.stack([np.stack([*path, *[path[-1]] * (longest - len(path))]) for path in paths])
        shares = (levels * (self.weights / np.maximum(self.weights.sum(1, keepdims=True), 1.0))[:, None]).sum(2)
        errors_at = np.stack([np.asarray([*row, *[row[-1]] * (longest - len(row))]) for row in costs])
        return {"levels": levels, "shares": shares, "errors": errors_at}

    def _greedy_levels(self, target: float) -> NDArray[np.float64]:
        import numpy as np

        paths = self.greedy()
        rows = [allocate.along_path(p, s, target) for p, s in zip(paths["levels"], paths["shares"], strict=True)]
        return np.stack(rows)

    def _time_levels(self, target: float) -> NDArray[np.float64]:
        """Levels that save most time for their error, by the times that were measured on this machine for this model's
        shapes, else by bytes."""
        import numpy as np

        from ...bench.breakeven import known_gains

        grid = np.arange(0, allocate.MAX_LEVEL + timed.GRID / 2, timed.GRID)
        paths = self.greedy()
        cost = np.stack([timed.costs(p, e, grid) for p, e in zip(paths["levels"], paths["errors"], strict=True)])
        measured = known_gains(self.header.fingerprint, self.model.isa, self.model.threads) or {}
        gain = np.zeros_like(cost)
        for k, site in enumerate(SITES):
            share = grid
            if site in measured:
                densities, gains = measured[site]
                share = timed.saved(np.asarray(densities), 1 / np.asarray(gains), grid)
            gain[:, k] = self.weights[:, k, None] * share
        return timed.allocate(cost, gain, self.weights, grid, target)

    # Allocation

    def levels(self, allocation: str, target: float) -> NDArray[np.float64]:
        """Levels [n_layers, 4] that skip a share `target` of the bytes that can be skipped; NaN is dense. "global" leaves
        sites dense whose part of that is not worth skipping on this machine, and so skips less."""
        import numpy as np

        if allocation == "uniform" or not target:
            return np.full_like(self.weights, target)
        if target > allocate.MAX_LEVEL:
            raise UsageError(f"a level of {target:g} is above {allocate.MAX_LEVEL}, the most that an allocation skips")
        if allocation == "greedy":
            out = self._greedy_levels(target)
        elif allocation == "time":
            out = self._time_levels(target)
        elif allocation == "global":
            anchor = min(ANCHORS, key=lambda a: abs(math.log(a / target)))
            moved = self._greedy_levels(target) * self.factors(anchor)
            moved = shape.rescaled(moved, self.weights, target, allocate.MAX_LEVEL)
            out = shape.worthwhile(moved, self.weights, self.floors())
        else:
            raise UsageError(f"allocation is {allocation!r}; it must be one of {', '.join(self.ALLOCATIONS)}")
        return np.where(out < MIN_LEVEL, np.nan, out)

    def floors(self) -> NDArray[np.float64]:
        """By site, the lowest level that is worth skipping on this machine: above the density from which its products run
        dense (as `sparse-run bench --breakeven` measured it, else as the engine takes it to be) a mask costs quality and
        brings nothing."""
        import numpy as np

        from ... import _core
        from ...bench.breakeven import known_break_evens

        known = known_break_evens(self.header.fingerprint, self.model.isa, self.model.threads)
        plan = _core.Sparsity(self.model, {}, break_even=known)
        ends = [plan.break_even(site) for site in SITES]
        out: NDArray[np.float64] = np.clip(1 - np.asarray(ends), MIN_LEVEL, MOST_FLOOR)
        return out

    def notes(self, allocation: str) -> dict[str, Any]:
        return {"lowest_levels": self.floors().round(4).tolist()} if allocation == "global" else {}

    def thresholds_at(
        self, allocation: str, target: float
    ) -> tuple[dict[str, list[NDArray[np.float32] | None]], dict[str, list[float]]]:
        levels = self.levels(allocation, target)
        shares = {s: [0.0 if math.isnan(v) else round(float(v), 4) for v in levels[:, k]] for k, s in enumerate(SITES)}
        return self.thresholds(levels), shares

    def prepare(self, allocation: str) -> None:
        self.tables()
        if allocation != "uniform":
            self.greedy()

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
