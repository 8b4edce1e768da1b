"""Tensor types: every block format against the gguf package, every exact change of kind, every panel against format.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run import _core
from sparse_run.convert.codes import SUPERBLOCK, Codes, Form, common_form
from sparse_run.convert.layout import MOST_ROWS, Linear, choose_panel_rows, choose_tall_rows, round_up
from sparse_run.convert.quant_types import TENSOR_TYPES, TensorType
from sparse_run.errors import ModelError

TYPES = {t.name: t for t in TENSOR_TYPES.values()}
EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"]
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
# Where the halves lie in a block.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
FORMS = [
    Form(kind, group, has_min) for kind in ("q4", "q5", "q6", "q8") for group in (32, 16) for has_min in (False, True)
]
PRODUCTS = [replace(form, products=True) for form in FORMS]


def random_blocks(kind: TensorType, rows: int, blocks: int, seed: int, low: float = 1e-4) -> NDArray[np.uint8]:
    """Rows of random bits with finite halves of both signs: every code, scale and sign occurs."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * blocks, kind.block_bytes), np.uint8)
    for at in HALVES.get(kind.name, (0,)):
        half = rng.uniform(low, 100 * low, rows * blocks) * rng.choice([-1, 1], rows * blocks)
        data[:, at : at + 2] = half.astype(np.float16).reshape(-1, 1).view(np.uint8)
    return data.reshape(rows, -1)


def reference(kind: TensorType, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
    return values


def unpacked(rows: Codes) -> NDArray[np.float32]:
    """The weights after a round through the packed layout."""
    f = rows.form
    n, cols = rows.codes.shape
    packed = _core.pack_panel(f.kind, rows.codes, rows.scales, rows.mins, f.group, rows.units, rows.min_units)
    return _core.unpack_panel(f.kind, packed, n, cols, f.group, f.has_min, SUPERBLOCK if f.products else 0)


@pytest.mark.parametrize("name", EXACT)
def test_32_weight_types_are_exact_through_the_packed_layout(name: str) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, 128, 5, seed=1)
    rows = kind.decode(data)
    assert isinstance(rows, Codes)
    assert rows.form == kind.form
    np.testing.assert_array_equal(rows.dequantise(), reference(kind, data))
    np.testing.assert_array_equal(unpacked(rows), reference(kind, data))


@pytest.mark.parametrize("low", [1e-4, 2e-7], ids=["normal", "subnormal"])
@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_are_exact_and_plain_differs_only_by_the_rounding_of_scales_to_half(name: str, low: float) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, 64, 3, seed=2, low=low)
    products = kind.decode(data)
    assert isinstance(products, Codes) and products.form == kind.form and products.form.products
    expected, rows = reference(kind, data), products.plain
    # With minima the reference rounds scale * u and then the sum, the core the sum alone.
    rounding = 0 if rows.mins is None else np.abs(expected).max() * 2.0**-22
    np.testing.assert_allclose(unpacked(products), expected, rtol=0, atol=rounding)
    assert rows.form == kind.form.plain
    got = unpacked(rows)
    # Half has 11 bits: scale * u and min are each off by at most 2^-11 of themselves.
    scales = np.repeat(np.abs(rows.scales.astype(np.float32)), rows.form.group, axis=1)
    bound = scales * 2.0 ** (rows.form.bits - 11)
    if rows.mins is not None:
        bound += np.repeat(np.abs(rows.mins.astype(np.float32)), rows.form.group, axis=1) * 2.0**-11
    assert (np.abs(got - expected) <= bound + 1e-12).all()
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.abs(got).max() > 0


@pytest.mark.parametrize("name", K_TYPES)
def test_a_product_that_no_half_holds_is_exact_in_panels_and_refused_elsewhere(name: str) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, 64, 1, seed=7, low=600)  # up to 60000, times the integers
    rows = kind.decode(data)
    assert isinstance(rows, Codes) and rows.finite and np.isfinite(unpacked(rows)).all()
    with pytest.raises(ModelError, match="does not fit into 16 bits"):
        rows.to(kind.form.plain)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_types_are_exact_through_the_packed_layout(name: str) -> None:
    kind = TYPES[name]
    values = np.random.default_rng(3).normal(size=(50, 37)).astype(np.float32)
    data = {
        "F32": values.view(np.uint8),
        "F16": values.astype(np.float16).view(np.uint8),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8),
    }[name]
    got = kind.decode(data)
    assert isinstance(got, np.ndarray)
    expected = (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if name == "BF16" else reference(kind, data)
    np.testing.assert_array_equal(got, expected)
    packed = _core.pack_panel_float(kind.form.kind, got)
    np.testing.assert_array_equal(_core.unpack_panel(kind.form.kind, packed, 50, 37, 32, False), expected)


@pytest.mark.parametrize("name", EXACT + K_TYPES)
def test_decoding_slices_equals_decoding_at_once(name: str) -> None:
    kind = TYPES[name]
    data = random_blocks(kind, 12, 2, seed=4)
    whole, part = kind.decode(data), kind.decode(np.ascontiguousarray(data[5:9]))
    assert isinstance(whole, Codes) and isinstance(part, Codes)
    np.testing.assert_array_equal(whole.dequantise()[5:9], part.dequantise())


def random_codes(form: Form, rows: int, cols: int, seed: int) -> Codes:
    rng = np.random.default_rng(seed)
    groups, blocks = -(-cols // form.group), -(-cols // SUPERBLOCK)
    if form.products:
        integers = [rng.integers(-128, 128, (rows, groups), np.int8) for _ in range(2)]
        halves = [rng.normal(size=(rows, blocks)).astype(np.float16) for _ in range(2)]
        if not form.has_min:
            return Codes(form, rng.integers(0, 1 << form.bits, (rows, cols), np.uint8), integers[0], None, halves[0])
        return Codes(form, rng.integers(0, 1 << form.bits, (rows, cols), np.uint8), *integers, *halves)
    return Codes(
        form,
        rng.integers(0, 1 << form.bits, (rows, cols), np.uint8),
        rng.normal(size=(rows, groups)).astype(np.float16),
        rng.normal(size=(rows, groups)).astype(np.float16) if form.has_min else None,
    )


@pytest.mark.parametrize("old", FORMS, ids=str)
def test_promotion_to_any_larger_form_keeps_every_weight(old: Form) -> None:
    rows = random_codes(old, 7, 96, seed=5)
    expected = rows.dequantise()
    promoted = 0
    for new in FORMS:
        if new.bits < old.bits or new.group > old.group or (old.has_min and not new.has_min):
            if new != old:
                with pytest.raises(ValueError, match="exactly"):
                    rows.to(new)
            continue
        got = rows.to(new)
        assert got.form == new
        assert int(got.codes.max()) < 1 << new.bits
        # scale * u + min is rounded once more than scale * (u - bias) where a minimum was added.
        np.testing.assert_allclose(got.dequantise(), expected, rtol=0, atol=1e-6 if new.has_min else 0)
        promoted += 1
    assert promoted >= 1


def test_common_form_is_the_smallest_that_holds_both() -> None:
    assert common_form(Form("q4"), Form("q4")) == Form("q4")
    assert common_form(Form("q4", has_min=True), Form("q6", group=16)) == Form("q6", 16, True)
    assert common_form(Form("q8"), Form("q5")) == Form("q8")
    assert common_form(Form("f16"), Form("f16")) == Form("f16")
    assert common_form(Form("f16"), Form("bf16")) == Form("f32")
    assert common_form(Form("q4"), Form("f16")) == Form("f32")
    q4_k, q6_k = TYPES["Q4_K"].form, TYPES["Q6_K"].form
    assert common_form(q4_k, q4_k) == q4_k
    assert common_form(q4_k, q6_k) == Form("q6", 16, True)


def format_md_panel(rows: Codes) -> NDArray[np.uint8]:
    """A quantised panel packed the slow way, sentence by sentence as models/format.md has it."""
    f = rows.form
    n_rows, n_cols = round_up(rows.codes.shape[0], 64), round_up(rows.codes.shape[1], 32)

    def pad(a: NDArray[Any], cols: int) -> NDArray[Any]:
        return np.pad(a, ((0, n_rows - a.shape[0]), (0, cols - a.shape[1])))

    codes = pad(rows.codes, n_cols)
    scales = pad(rows.scales, n_cols // f.group)
    mins = None if rows.mins is None else pad(rows.mins, n_cols // f.group)
    out = bytearray()
    for block in range(-(-n_cols // 256) if f.products else 0):
        for units in (rows.units, rows.min_units):
            if units is not None:
                out += pad(units, -(-n_cols // 256))[:, block].tobytes()
    for slab in range(n_cols // 32):
        groups = range(slab * 32 // f.group, (slab + 1) * 32 // f.group)
        for part in (scales, mins):
            if part is not None:
                for g in groups:
                    out += part[:, g].tobytes()
        for col in range(32 * slab, 32 * slab + 32):
            tiles = codes[:, col].reshape(-1, 64).astype(int)
            if f.kind == "q8":
                out += bytes(tiles.ravel().tolist())
                continue
            for tile in tiles:
                out += bytes((tile[i] & 15) | (tile[i + 32] & 15) << 4 for i in range(32))
            if f.kind == "q5":
                for tile in tiles:
                    out += bytes(sum((tile[8 * k + i] >> 4) << k for k in range(8)) for i in range(8))
            if f.kind == "q6":
                for tile in tiles:
                    out += bytes(sum((tile[16 * k + i] >> 4) << 2 * k for k in range(4)) for i in range(16))
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("shape", [(64, 32), (128, 96), (192, 80), (70, 50), (64, 544)], ids=str)
@pytest.mark.parametrize("form", [*FORMS, *PRODUCTS], ids=str)
def test_packed_panels_are_what_format_md_says(form: Form, shape: tuple[int, int]) -> None:
    rows = random_codes(form, *shape, seed=6)
    packed = _core.pack_panel(form.kind, rows.codes, rows.scales, rows.mins, form.group, rows.units, rows.min_units)
    expected = format_md_panel(rows)
    if shape[0] % 64 == 0 and shape[1] % 32 == 0:
        np.testing.assert_array_equal(packed, expected)
    # Codes of padding are not part of the format, its scales are: compare the true weights and the size.
    assert packed.nbytes == expected.nbytes
    got, values = unpacked(rows), rows.dequantise()
    if form.products and form.has_min:  # rounded once, not twice
        np.testing.assert_allclose(got, values, rtol=0, atol=np.abs(values).max() * 2.0**-22)
    else:
        np.testing.assert_array_equal(got, values)


@pytest.mark.parametrize("rows", [1, 64, 100, 576, 960, 1023, 1024, 2048, 3072, 4096, 4097, 6145, 32000, 49152])
@pytest.mark.parametrize(
    "form", [Form("q4", has_min=True), Form("q6", 16), Form("q8"), Form("f16"), *PRODUCTS[:4]], ids=str
)
def test_panels_cover_all_rows_and_their_sizes_agree_with_the_core(form: Form, rows: int) -> None:
    panel_rows = choose_panel_rows(rows, form)
    assert panel_rows % 64 == 0
    linear = Linear(rows, 96, form, panel_rows)
    panels = linear.panels()
    assert panels[0][0] == 0 and panels[-1][1] == round_up(rows, 64)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(panels))
    if form.quantised and rows >= 1024:
        # Two threads own whole panels: a border lies near the middle.
        assert min(abs(end - rows / 2) for _, end in panels) <= 0.07 * rows
    for begin, end in panels:
        assert linear.panel_bytes(end - begin) == _core.panel_bytes(
            form.kind, end - begin, 96, form.group, form.has_min, SUPERBLOCK if form.products else 0
        )


@pytest.mark.parametrize("rows", [960, 1024, 2048, 2816, 3072, 4096, 5120, 12288])
def test_columns_that_threads_share_are_long_runs_no_power_of_two_apart(rows: int) -> None:
    panel_rows = choose_tall_rows(rows, 4096, Form("q4"))
    assert panel_rows % 64 == 0 and panel_rows <= MOST_ROWS
    assert panel_rows >= min(rows, MOST_ROWS) - 64
    assert rows < 1024 or panel_rows % 512
    # Where threads share rows instead, panels are those of any matrix.
    assert choose_tall_rows(rows, 64, Form("q4")) == choose_panel_rows(rows, Form("q4"))
    assert choose_tall_rows(rows, 4096, Form("f16")) == 64
    assert choose_tall_rows(12289, 4096, Form("q4")) == choose_panel_rows(12289, Form("q4"))
