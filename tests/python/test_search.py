"""Searches for a budget of perplexity and for levels that save time, on curves whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run.bench import breakeven
from sparse_run.eval.sparse import kl_divergence
from sparse_run.predictors.common.allocate import MAX_LEVEL
from sparse_run.predictors.common.calibration import Calibration
from sparse_run.predictors.teal import greedy, timed

Array = NDArray[np.float64]
GRID: Array = np.arange(0, MAX_LEVEL + timed.GRID / 2, timed.GRID)
DENSITIES = np.array([1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.1])
RATIOS = np.array([1.05, 1.06, 1.05, 1.02, 0.98, 0.9, 0.75, 0.5, 0.3])
"""Of the dense time at each density: nothing is won above 75%."""


class Curve(Calibration):
    """A calibration whose increase of perplexity is a function of the level."""

    METHOD = "curve"
    ALLOCATIONS = ("only",)

    def __init__(self, curve: Callable[[float], float]) -> None:
        self._increases: dict[tuple[str, float], float] = {}
        self.curve = curve

    def thresholds_at(self, allocation: str, target: float) -> tuple[Any, Any]:
        return {}, {"M": [target if self.curve(target) else 0.0]}

    def increase(self, allocation: str, target: float) -> float:
        return self._increases.setdefault((allocation, target), self.curve(target))


MEASURED = [0, 0.17, 0.195, 0.202, 0.208, 0.221, 0.271, 0.4, 0.5, 0.6, 0.9]  # TEAL on SmolLM2, on held-out C4
INCREASE = [0, 0.0025, 0.0073, 0.0096, 0.0117, 0.0225, 0.0499, 0.14, 0.36, 1.23, 50]


@pytest.mark.parametrize(
    ("curve", "most"),
    [
        (lambda t: float(np.interp(t, MEASURED, INCREASE)), 4),
        (lambda t: 0.027 * (t / 0.25) ** 3, 4),
        (lambda t: 0.47 * (t / 0.25) ** 1.8, 7),
        (lambda t: 0.05 * (t / 0.4) ** 6 - 0.003, 6),
    ],
)
def test_a_budget_is_found_in_few_measurements(curve: Callable[[float], float], most: int) -> None:
    for budget in (0.005, 0.01, 0.02, 0.05):
        fit = Curve(curve)
        level = fit.search("only", budget)
        assert 0 < curve(level) <= budget
        assert curve(level + 0.011) > budget, "no higher level would do"
        assert len(fit._increases) <= most
    before = len(fit._increases)
    fit.search("only", 0.05)
    assert len(fit._increases) == before, "what was measured is not measured again"


def test_a_budget_that_everything_or_nothing_meets() -> None:
    assert Curve(lambda t: 1e-9).search("only", 0.01) > MAX_LEVEL - 0.02
    assert Curve(lambda t: 1.0).search("only", 0.01) == 0.0


def test_levels_at_which_nothing_is_skipped_are_no_result() -> None:
    """Low levels are not worth skipping on the machine; the first that is may cost less than the budget or more."""
    jump = lambda t: 0.0 if t < 0.12 else 0.004 + 0.3 * (t - 0.12)
    for budget in (0.01, 0.02, 0.05):
        level = Curve(jump).search("only", budget)
        assert 0 < jump(level) <= budget < jump(level + 0.011)
    assert Curve(jump).search("only", 0.003) == 0.0


def test_budgets_share_measurements_and_are_ordered() -> None:
    fit = Curve(lambda t: float(np.interp(t, MEASURED, INCREASE)))
    found = [fit.search("only", budget) for budget in (0.005, 0.01, 0.02, 0.05)]
    assert found == sorted(found) and len(set(found)) == 4
    assert len(fit._increases) <= 12


def layers(n: int = 30) -> tuple[Array, Array]:
    """Costs of levels [n, 4, grid] from greedy searches on known errors, and weights [n, 4]."""
    shares = np.array([0.15, 0.1, 0.5, 0.25])
    cost = []
    for i in range(n):
        factor = np.array([1.0, 0.4, 3.0, 0.3]) * (1 + 0.05 * i)
        path, errors = greedy.path(lambda x, f=factor: float((f * x**3).sum()), shares, MAX_LEVEL)  # type: ignore[misc]
        cost.append(timed.costs(np.stack(path), np.asarray(errors), GRID))
    return np.stack(cost), np.tile(shares, (n, 1))


def test_costs_are_those_of_the_search() -> None:
    cost, _ = layers(2)
    for k, factor in enumerate((1.0, 0.4, 3.0, 0.3)):
        inside = np.isfinite(cost[0, k])
        assert inside[0] and cost[0, k, 0] == 0 and inside.sum() > 40
        assert np.allclose(cost[0, k, inside], factor * GRID[inside] ** 3, atol=0.02 * factor)
        assert (np.diff(cost[0, k, inside]) >= 0).all()


def test_saved_time_is_0_where_lists_cost_more_than_they_save() -> None:
    share = timed.saved(DENSITIES, RATIOS, GRID)
    assert share[0] == 0 and (share[GRID < 0.25 - 1e-9] == 0).all() and (np.diff(share) >= 0).all()
    assert share[50] == pytest.approx(0.25) and share[75] == pytest.approx(0.5)


def test_time_is_bought_where_it_is_cheapest() -> None:
    cost, weights = layers()
    share = timed.saved(DENSITIES, RATIOS, GRID)

    def outcome(gain: Array, target: float) -> tuple[Array, float, float]:
        levels = timed.allocate(cost, gain, weights, GRID, target)
        at = np.rint(levels / timed.GRID).astype(int)[:, :, None]
        assert (levels * weights).sum() / weights.sum() == pytest.approx(target, abs=0.02)
        spent = float(np.take_along_axis(cost, at, 2).sum())
        return levels, spent, float((weights * share[at[:, :, 0]]).sum())

    by_bytes = weights[:, :, None] * GRID
    by_time = weights[:, :, None] * share
    for target in (0.1, 0.2, 0.4):
        levels, spent, time = outcome(by_bytes, target)
        same_error = max((outcome(by_time, t)[1:] for t in np.arange(0.02, 0.6, 0.02)), key=lambda x: (x[0] <= spent) * x[1])
        assert same_error[0] <= spent and same_error[1] > 1.02 * time, "more time for the same error"
        assert levels[:, 3].mean() > levels[:, 2].mean(), "the cheap site gets more"
    levels, _, _ = outcome(by_time, 0.15)
    assert ((levels == 0) | (levels > 0.25)).all(), "no level at which nothing is saved"
    nothing = weights.copy()
    nothing[:, 2] = 0
    assert not timed.allocate(cost, by_time, nothing, GRID, 0.3)[:, 2].any()


def test_known_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_run import __version__

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert breakeven.known_gains("f", "avx2", 2) is None
    shape = breakeven.ShapeBreakEven(["A"], "q4", 32, True, 960, 576, 512, [1.0, 2.0], 0.9)
    other = breakeven.ShapeBreakEven(["M", "A"], "q4", 32, True, 3072, 576, 512, [0.9, 1.5], 0.8)
    made = breakeven.BreakEvenResult("cpu", "avx2", 2, "m", "f", 1, [1.0, 0.5], [other, shape], 0.8, __version__)
    monkeypatch.setattr(breakeven, "cache_path", lambda cpu=None: tmp_path / "kept.json")
    breakeven._keep(made)
    assert breakeven.known_gains("f", "avx2", 2) == {"A": ([1.0, 0.5], [0.9, 1.5]), "M": ([1.0, 0.5], [0.9, 1.5])}
    assert breakeven.known_gains("f", "avx2", 1) is None and breakeven.known_gains("g", "avx2", 2) is None
    (tmp_path / "kept.json").write_text((tmp_path / "kept.json").read_text("utf-8").replace('"gain"', '"gone"'), "utf-8")
    assert breakeven.known_gains("f", "avx2", 2) is None


def test_divergence_against_float64() -> None:
    rng = np.random.default_rng(3)
    x = (4 * rng.standard_normal((5, 3000))).astype(np.float32)
    for noise in (0.001, 0.1, 3.0):
        y = (x + noise * rng.standard_normal(x.shape)).astype(np.float32)
        p, q = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (x.astype(np.float64), y.astype(np.float64)))
        assert np.allclose(kl_divergence(x, y), (np.exp(p) * (p - q)).sum(1), rtol=1e-3, atol=3e-7)
    assert (kl_divergence(x, x) == 0).all()
    x[2, 5] = np.nan
    assert np.isnan(kl_divergence(x, y)[2]) and np.isfinite(kl_divergence(x, y)[1])
