"""Levels by measured cost, on costs whose answer is known: the greedy search within a block and the shapes across layers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run.predictors.common.allocate import MAX_LEVEL, along_path
from sparse_run.predictors.teal import greedy, shape

Array = NDArray[np.float64]


def test_greedy_takes_the_cheapest_step_each_time() -> None:
    """Against a search that measures every step of every site every time, on convex costs with an interaction."""
    shares = np.array([0.15, 0.1, 0.5, 0.25])
    factor = np.array([1.0, 0.2, 3.0, 0.4])
    calls = 0

    def error(levels: Array) -> float:
        nonlocal calls
        calls += 1
        return float((factor * levels**2.5).sum() + 0.05 * levels.sum() ** 2)

    found, errors = greedy.path(error, shares, MAX_LEVEL)
    assert errors == [error(levels) for levels in found]
    calls -= len(found)
    lazy, steps = calls, np.minimum(greedy.STEP / shares, greedy.LARGEST_STEP)
    now = np.zeros(4)
    expected = [now]
    while (now * shares).sum() < greedy.UP_TO - 1e-9:
        tries = []
        for k in range(4):
            if now[k] < MAX_LEVEL - 1e-9:
                tried = now.copy()
                tried[k] = min(MAX_LEVEL, now[k] + steps[k])
                tries.append(((error(tried) - error(now)) / (shares[k] * (tried[k] - now[k])), k, tried))
        now = min(tries, key=lambda t: t[:2])[2]
        expected.append(now)
    assert len(found) == len(expected) and np.allclose(found, expected)
    assert lazy < 2.5 * len(found), "most steps are not measured again"
    assert (np.diff((np.stack(found) * shares).sum(1)) > 0).all()


def test_greedy_leaves_out_what_cannot_be_skipped() -> None:
    found, _ = greedy.path(lambda levels: float((levels**2).sum()), np.array([0.5, 0.0, 0.5, 0.0]), MAX_LEVEL)
    assert not found[-1][[1, 3]].any() and (found[-1][[0, 2]] >= 0.79).all()
    assert len(greedy.path(lambda levels: 0.0, np.zeros(4), MAX_LEVEL)[0]) == 1


def test_along_path() -> None:
    path = np.array([[0.0, 0.0], [0.2, 0.0], [0.2, 0.4]])
    assert np.allclose(along_path(path, np.array([0.0, 0.1, 0.3]), 0.2), [0.2, 0.2])


def test_groups_are_sites_and_depths() -> None:
    for layers in (1, 2, 18, 30):
        groups = shape.groups_of(layers, 4)
        for axis in (0, 1):
            assert (sum(mask.astype(int) for mask, of in groups if of == axis) == 1).all()
        assert shape.runs(layers, 4) == 2 + 4 + min(6, layers)


def test_rescaled_meets_the_target() -> None:
    weights = np.array([[1.0, 2.0], [3.0, 0.0]])
    for target in (0.05, 0.4, 0.8):
        levels = shape.rescaled(np.array([[1.0, 3.0], [0.5, 2.0]]), weights, target, 0.9)
        assert (levels * weights).sum() / weights.sum() == pytest.approx(target, abs=1e-6)
        assert levels.max() <= 0.9
    assert shape.rescaled(np.ones((2, 2)), weights, 0.95, 0.9).max() == 0.9, "no more than the most"


def test_sites_that_run_dense_are_given_up() -> None:
    weights = np.tile([0.15, 0.1, 0.5, 0.25], (10, 1))
    levels = np.tile([0.2, 0.25, 0.1, 0.4], (10, 1)) * np.linspace(0.9, 1.1, 10)[:, None]
    assert (shape.worthwhile(levels, weights, np.zeros(4)) == levels).all()
    found = shape.worthwhile(levels, weights, np.array([0.46, 0.24, 0.11, 0.1]))
    assert not found[:, [0, 2]].any(), "a site below its floor goes as a whole, though some layers are above it"
    assert (found[:, [1, 3]] == levels[:, [1, 3]]).all(), "and the others skip no more for it"
    assert not shape.worthwhile(levels, weights, np.full(4, 0.5)).any(), "too little for any site"
    weights[:, 3] = 0
    assert not shape.worthwhile(levels, weights, np.zeros(4))[:, 3].any(), "nothing to skip there"


def test_noisy_costs_are_shrunk_towards_their_mean() -> None:
    skipped = np.array([1.0, 1.0, 1.0, 0.0])
    increases = np.array([1.0, 4.0, 1.0, 0.0])
    exact = shape.steps(increases, np.full(4, 1e-6), skipped)
    assert np.allclose(exact, [2**0.5, 0.5**0.5, 2**0.5, 1.0], atol=0.01)
    noisy = shape.steps(increases, np.full(4, 1e3), skipped)
    assert np.allclose(noisy, 1.0, atol=0.01)
    assert (shape.steps(np.array([-1.0, -2.0]), np.ones(2), np.ones(2)) == 1).all(), "no information, no step"
    assert shape.steps(np.array([100.0, 0.001]), np.zeros(2), np.ones(2)).tolist() == pytest.approx(
        [0.707, 1.6], abs=0.01
    )


@pytest.mark.parametrize("noise", [0.0, 0.1, 3.0])
def test_shape_finds_what_is_cheap_and_never_loses(noise: float) -> None:
    """Costs with an interaction: from equal levels on, most of the possible gain is found; with much noise in every token the
    start is kept."""
    rng = np.random.default_rng(0)
    weights = np.tile([0.15, 0.1, 0.5, 0.25], (12, 1))
    cost = np.tile([0.6, 0.4, 2.0, 0.3], (12, 1)) * weights
    cost[:2] *= 3.0
    tokens = rng.standard_normal((2000, 12, 4)) * noise

    def kl(levels: Array) -> Array:
        parts = cost * levels**3
        mean = parts.sum() - 0.3 * np.sqrt(parts[:, 2].sum() * parts[:, 0].sum())
        out: Array = mean * (1 + (tokens * levels).sum((1, 2)))
        return out

    uniform = np.full_like(weights, 0.3)
    levels, measured = shape.fit_shape(kl, weights, 0.3, MAX_LEVEL, uniform, lambda _: None)
    assert (levels * weights).sum() / weights.sum() == pytest.approx(0.3, abs=1e-6)
    assert kl(levels).mean() <= kl(uniform).mean() == pytest.approx(measured[0])
    if noise == 0:
        lagrange = shape.rescaled((cost / weights) ** -0.5, weights, 0.3, MAX_LEVEL)
        assert measured[0] - measured[1] > 0.7 * (measured[0] - kl(lagrange).mean())
        assert levels[5, 3] > 1.5 * levels[5, 2] and levels[0, 2] < levels[5, 2]


def test_shape_keeps_the_start_where_moving_is_no_better() -> None:
    def kl(levels: Array) -> Array:
        out: Array = (levels**3).sum() * (1 + np.zeros(100)) + 10 * np.abs(levels - 0.3).sum() * (np.ptp(levels) > 0.2)
        return out

    start = np.full((12, 4), 0.3)
    weights = np.tile([0.1, 0.1, 3.0, 0.3], (12, 1))
    levels, measured = shape.fit_shape(kl, weights, 0.3, MAX_LEVEL, start, lambda _: None)
    assert np.allclose(levels, start) and measured[1] > measured[0]
