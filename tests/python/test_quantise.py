"""The quantiser: its search against brute force, what it does at the edges, and how bits are dealt out."""

from __future__ import annotations

import itertools
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run import _core
from sparse_run.convert.codes import Codes, Form
from sparse_run.convert.quantise import (
    Quantisation,
    QuantisedRows,
    Rounding,
    _Unit,
    deal,
    plan_forms,
    stored_bits,
)
from sparse_run.convert.rows import ArrayRows
from sparse_run.errors import ModelError, UsageError

BITS = {"q4": 4, "q5": 5, "q6": 6, "q8": 8}


def values_of(kind: str, group: int, result: tuple[Any, ...]) -> NDArray[np.float64]:
    """The stored weights, as models/format.md has it."""
    codes, scales, mins = result[:3]
    cols = codes.shape[1]

    def spread(part: NDArray[np.float16]) -> NDArray[np.float64]:
        return np.repeat(part.astype(np.float64), group, axis=1)[:, :cols]

    if mins is None:
        return (codes.astype(np.float64) - (1 << (BITS[kind] - 1))) * spread(scales)
    return codes.astype(np.float64) * spread(scales) + spread(mins)


def best_error(x: NDArray[Any], w: NDArray[Any], bits: int, has_min: bool) -> float:
    """Brute force over a dense grid of scales (and minima), in float64, scales not rounded to half."""
    top, bias = (1 << bits) - 1, 1 << (bits - 1)
    least = float((w * x * x).sum())
    if not has_min:
        for scale in np.abs(x).max() / bias * np.linspace(0.5, 1.6, 2000):
            for sign in (1, -1):
                u = np.clip(np.round(x / (sign * scale)) + bias, 0, top) - bias
                least = min(least, float((w * (sign * scale * u - x) ** 2).sum()))
        return least
    low, high = x.min(), x.max()
    for below, above in itertools.product(np.linspace(-0.1, 0.2, 40), repeat=2):
        start, end = low + below * (high - low), high - above * (high - low)
        scale = (end - start) / top
        u = np.clip(np.round((x - start) / scale), 0, top)
        least = min(least, float((w * (scale * u + start - x) ** 2).sum()))
    return least


def samples(name: str, rows: int, cols: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.normal(size=(rows, cols)),
        "heavy tails": rng.standard_t(3, size=(rows, cols)),
        "one-sided": rng.gamma(2.0, size=(rows, cols)) + 1.0,
        "tiny": rng.normal(size=(rows, cols)) * 1e-4,
    }[name]
    return x.astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("name", ["normal", "heavy tails", "one-sided", "tiny"])
@pytest.mark.parametrize(("kind", "has_min"), [("q4", False), ("q4", True), ("q5", False)])
def test_the_error_is_near_the_best_of_a_brute_force_search(
    kind: str, has_min: bool, name: str, weighted: bool
) -> None:
    x = samples(name, 6, 32, seed=3)
    w = np.random.default_rng(4).gamma(1.0, size=32).astype(np.float32) if weighted else np.ones(32, np.float32)
    result = _core.quantise_rows(x, kind, 32, has_min, w if weighted else None)
    got = (w * (values_of(kind, 32, result) - x) ** 2).sum()
    best = sum(best_error(row.astype(np.float64), w.astype(np.float64), BITS[kind], has_min) for row in x)
    assert got <= 1.06 * best
    assert result[3] == pytest.approx(got, rel=1e-3)
    assert result[4] == pytest.approx((w * x.astype(np.float64) ** 2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "has_min", "peer", "factor"),
    [("q4", False, "Q4_0", 0.92), ("q4", True, "Q4_1", 0.85), ("q5", False, "Q5_0", 0.92), ("q8", False, "Q8_0", 0.95)],
)
def test_less_is_lost_than_by_the_formats_that_round_without_a_search(
    kind: str, has_min: bool, peer: str, factor: float
) -> None:
    x = samples("normal", 64, 512, seed=5)
    got = ((values_of(kind, 32, _core.quantise_rows(x, kind, 32, has_min)) - x) ** 2).sum()
    peer_kind = gguf.GGMLQuantizationType[peer]
    theirs = ((gguf.quants.dequantize(gguf.quants.quantize(x, peer_kind), peer_kind) - x) ** 2).sum()
    assert got < factor * theirs


def test_important_columns_lose_less() -> None:
    x = samples("heavy tails", 64, 128, seed=6)
    w = np.where(np.arange(128) % 8 == 0, 30.0, 1.0).astype(np.float32)
    plain = (values_of("q4", 32, _core.quantise_rows(x, "q4", 32, False)) - x) ** 2
    spared = (values_of("q4", 32, _core.quantise_rows(x, "q4", 32, False, w)) - x) ** 2
    assert spared[:, ::8].sum() < 0.7 * plain[:, ::8].sum()
    assert (w * spared).sum() < (w * plain).sum()


@pytest.mark.parametrize("has_min", [False, True])
@pytest.mark.parametrize("kind", list(BITS))
@pytest.mark.parametrize("cols", [1, 16, 31, 33, 100])
def test_widths_that_are_no_whole_groups(kind: str, has_min: bool, cols: int) -> None:
    x = samples("normal", 3, cols, seed=7)
    result = _core.quantise_rows(x, kind, 32, has_min)
    assert result[0].shape == (3, cols) and result[1].shape == (3, -(-cols // 32))
    assert int(result[0].max()) < 1 << BITS[kind]
    error = np.abs(values_of(kind, 32, result) - x).max()
    assert error <= 1.3 * np.abs(x).max() / (1 << (BITS[kind] - 1))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = samples("normal", 9, 70, seed=8)
    whole = _core.quantise_rows(x, "q5", 32, True)
    part = _core.quantise_rows(np.ascontiguousarray(x[4:6]), "q5", 32, True)
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert a is not None and b is not None
        np.testing.assert_array_equal(a[4:6], b)


@pytest.mark.parametrize("has_min", [False, True])
def test_zeros_and_constants_are_exact_and_columns_without_input_are_still_rounded(has_min: bool) -> None:
    x = np.zeros((2, 64), np.float32)
    x[0, 32:] = 0.75
    np.testing.assert_array_equal(values_of("q4", 32, _core.quantise_rows(x, "q4", 32, has_min)), x)
    x = samples("normal", 4, 64, seed=9)
    w = np.zeros(64, np.float32)
    w[:32] = 1.0
    result = _core.quantise_rows(x, "q4", 32, has_min, w)
    errors = np.abs(values_of("q4", 32, result) - x)
    assert errors[:, 32:].max() < 0.4, "columns that were never used in calibration may be used later"
    assert result[4] == pytest.approx((x[:, :32].astype(np.float64) ** 2).sum(), rel=1e-5)


def test_arguments_are_checked() -> None:
    x = np.zeros((2, 64), np.float32)
    for arguments in [
        (x, "f16", 32, False, None),
        (x, "q4", 24, False, None),
        (x, "q4", 256, False, None),
        (x, "q4", 32, False, np.ones(63, np.float32)),
        (x.astype(np.float64), "q4", 32, False, None),
        (x[:0], "q4", 32, False, None),
        (x[0], "q4", 32, False, None),
    ]:
        with pytest.raises(UsageError):
            _core.quantise_rows(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [64, 128])
def test_larger_groups_are_stored_as_several_of_32(group: int) -> None:
    x = samples("normal", 4, 300, seed=10)
    rows = QuantisedRows(ArrayRows(x), Form("q4"), group).read(0, 4)
    assert isinstance(rows, Codes)
    assert rows.scales.shape == (4, 10)
    each = group // 32
    np.testing.assert_array_equal(rows.scales, np.repeat(rows.scales[:, ::each], each, axis=1)[:, :10])
    expected = values_of("q4", group, _core.quantise_rows(x, "q4", group, False))
    np.testing.assert_allclose(rows.dequantise(), expected, rtol=1e-6)


@pytest.mark.parametrize("form", [Form("q4"), Form("q4", has_min=True), Form("f16")], ids=str)
def test_weights_beyond_a_half_are_refused_by_name(form: Form) -> None:
    x = samples("normal", 2, 64, seed=11)
    x[1, 3] = 4e6
    with pytest.raises(ModelError, match="layers.0.attn_q .*too large.*without --bits"):
        QuantisedRows(ArrayRows(x), form, 32, name="layers.0.attn_q").read(0, 2)


def test_a_quantisation_says_what_it_supports() -> None:
    for arguments in [(3,), (7,), (4, 16), (4, 48), (0, 32, 4.0), (0, 32, 9.0)]:
        with pytest.raises(UsageError):
            Quantisation(*arguments)  # type: ignore[arg-type]


def model_roles(seed: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> ArrayRows:
        return ArrayRows(rng.normal(size=(rows, cols)).astype(np.float32))

    roles: dict[str, Any] = {"token_embd": matrix(256, 64), "output_norm": np.ones(64, np.float32)}
    for i in range(2):
        for name, shape in {
            "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_o": (64, 64),
            "ffn_gate": (128, 64), "ffn_up": (128, 64), "ffn_down": (64, 128),
        }.items():  # fmt: skip
            roles[f"layers.{i}.{name}"] = matrix(*shape)
    return roles


def test_fixed_bits_hold_in_the_layers_but_values_embedding_and_head_keep_six() -> None:
    forms = plan_forms(model_roles(), Quantisation(4))
    assert set(forms) == {role for role in model_roles() if role != "output_norm"}
    assert forms.pop("token_embd") == Form("q6")
    assert forms.pop("layers.0.attn_v") == forms.pop("layers.1.attn_v") == Form("q6")
    assert set(forms.values()) == {Form("q4")}, "normal weights gain too little from minima"
    assert set(plan_forms(model_roles(), Quantisation(8)).values()) == {Form("q8")}


def test_minima_are_chosen_where_weights_are_one_sided() -> None:
    roles = model_roles()
    x = np.random.default_rng(13).uniform(1.0, 2.0, (64, 64)).astype(np.float32)
    roles["layers.1.attn_o"] = ArrayRows(x)
    forms = plan_forms(roles, Quantisation(4))
    assert forms["layers.1.attn_o"] == Form("q4", has_min=True)
    assert forms["layers.0.attn_o"] == Form("q4")


def test_sixteen_bits_keep_bfloat16_and_make_the_rest_half() -> None:
    roles = model_roles()
    roles["layers.0.attn_q"].form = Form("bf16")
    forms = plan_forms(roles, Quantisation(16))
    assert forms["layers.0.attn_q"] == Form("bf16")
    assert forms["layers.0.attn_k"] == Form("f16")


@pytest.mark.parametrize("target", [4.5, 4.8, 5.3, 6.5, 8.5])
def test_auto_spends_no_more_than_it_may_and_nearly_all_of_it(target: float) -> None:
    roles = model_roles()
    forms = plan_forms(roles, Quantisation(0, target_bpw=target))
    sizes = {role: data.rows * data.cols for role, data in roles.items() if role in forms}
    bpw = sum(stored_bits(forms[role]) * size for role, size in sizes.items()) / sum(sizes.values())
    assert target - 0.35 < bpw <= target
    assert forms["layers.0.ffn_gate"] == forms["layers.0.ffn_up"], "stored as one matrix"


def test_auto_gives_bits_to_what_counts() -> None:
    roles = model_roles()
    weights = dict.fromkeys(["layers.1.ffn_down", "layers.0.attn_o"], 50.0)
    forms = plan_forms(roles, Quantisation(0, target_bpw=4.8), weights=weights)
    assert forms["layers.1.ffn_down"].bits > forms["layers.0.ffn_down"].bits
    assert forms["layers.0.attn_o"].bits > forms["layers.1.attn_o"].bits


def test_dealing_is_as_good_as_trying_every_combination() -> None:
    rng = np.random.default_rng(14)
    choices = [Form("q4"), Form("q4", has_min=True), Form("q5"), Form("q6"), Form("q8")]
    for _ in range(20):
        units = []
        for i in range(4):
            unit = _Unit(f"u{i}", [], float(rng.gamma(1.0)), params=1000)
            errors = np.sort(rng.gamma(1.0, size=len(choices)))[::-1]
            unit.errors = dict(zip(choices, map(float, errors), strict=True))
            units.append(unit)
        target = float(rng.uniform(4.6, 8.0))

        def cost(forms: dict[str, Form]) -> float:
            return sum(stored_bits(form) for form in forms.values()) / 4

        def loss(forms: dict[str, Form], units: list[_Unit] = units) -> float:
            return sum(unit.weight * unit.errors[forms[unit.name]] for unit in units)

        got = deal(units, target)
        assert cost(got) <= target + 1e-9
        every = (dict(zip(("u0", "u1", "u2", "u3"), picks, strict=True)) for picks in itertools.product(choices, repeat=4))
        best = min(loss(forms) for forms in every if cost(forms) <= target)
        # Greedy along convex hulls is optimal up to the last step that no longer fits.
        largest_step = max(unit.weight * (unit.errors[choices[0]] - unit.errors[choices[-1]]) for unit in units)
        assert loss(got) <= best + largest_step + 1e-12


def test_rounding_is_applied_to_matrices_only() -> None:
    roles = model_roles()
    rounded = Rounding(Quantisation(5)).apply(roles)
    assert rounded["output_norm"] is roles["output_norm"]
    read = rounded["layers.0.ffn_down"].read(3, 7)
    assert isinstance(read, Codes) and read.form.kind == "q5"
    x = roles["layers.0.ffn_down"].values[3:7]
    assert ((read.dequantise() - x) ** 2).sum() < 0.003 * (x**2).sum()
