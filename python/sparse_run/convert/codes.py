"""Weights in the terms of the packed format: unsigned codes with scales and minima, and exact changes between kinds.

A weight is `scale * (u - bias)` without minima and `scale * u + min` with them (models/format.md). Everything here keeps
the values exactly, and what would not is refused; but for scales that are products of a half and a small integer, which
`plain` rounds to half: a relative error of at most 2^-11 of the scale, also where the half is subnormal (then the product is
a multiple of the smallest half).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Union

from ..errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatRows = NDArray[np.float32]

BITS = {"q4": 4, "q5": 5, "q6": 6, "q8": 8}
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
TILE_ROWS = 64
SLAB_COLS = 32
SUPERBLOCK = 256


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: `kind` of q4 q5 q6 q8 f32 f16 bf16; columns per scale; whether there are minima; whether scales
    and minima are small integers in units of a half for each row and 256 columns."""

    kind: str
    group: int = 32
    has_min: bool = False
    products: bool = False

    @property
    def quantised(self) -> bool:
        return self.kind in BITS

    @property
    def bits(self) -> int:
        """Bits of one code or float."""
        return BITS[self.kind] if self.quantised else 8 * FLOAT_BYTES[self.kind]

    @property
    def plain(self) -> Form:
        """The same with a half for every scale."""
        return replace(self, products=False)

    @property
    def scale_bits(self) -> float:
        """Bits a weight for scales, minima and their units."""
        if not self.quantised:
            return 0
        each = 8 / self.group + 16 / SUPERBLOCK if self.products else 16 / self.group
        return each * (2 if self.has_min else 1)


@dataclass(frozen=True)
class Codes:
    """Rows of a quantised matrix: `codes` u8 [rows, cols]; `scales`, `mins` f16 [rows, ceil(cols / group)]. Where they are
    products, these are int8, in units f16 [rows, ceil(cols / 256)]."""

    form: Form
    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    mins: NDArray[Any] | None
    units: NDArray[np.float16] | None = None
    min_units: NDArray[np.float16] | None = None

    @property
    def arrays(self) -> tuple[NDArray[Any] | None, ...]:
        """What there is beside the form, in the order of the constructor."""
        return self.codes, self.scales, self.mins, self.units, self.min_units

    @property
    def finite(self) -> bool:
        """Whether all weights are finite numbers."""
        import numpy as np

        halves = self.arrays[3:] if self.form.products else self.arrays[1:3]
        return all(a is None or bool(np.isfinite(a).all()) for a in halves)

    def map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Codes:
        """Each array changed alike, such as rows chosen from all."""
        return Codes(self.form, *(None if a is None else change(a) for a in self.arrays))  # type: ignore[arg-type]

    @property
    def plain(self) -> Codes:
        """With a half for every scale, rounded where it is a product. Raises ModelError where one is too large for that."""
        if not self.form.products:
            return self
        scales, mins = self._float_scales()
        out = Codes(self.form.plain, self.codes, _half(scales), None if mins is None else _half(mins))
        if not out.finite:
            raise ModelError("a scale of these weights does not fit into 16 bits; the file is damaged, fetch it again")
        return out

    def _float_scales(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Scales and minima, exact."""
        import numpy as np

        def values(a: NDArray[Any] | None, units: NDArray[np.float16] | None) -> NDArray[np.float32] | None:
            if a is None:
                return None
            out: NDArray[np.float32] = a.astype(np.float32)
            if units is not None:
                out *= np.repeat(units.astype(np.float32), SUPERBLOCK // self.form.group, axis=1)[:, : a.shape[1]]
            return out

        scales = values(self.scales, self.units)
        assert scales is not None
        return scales, values(self.mins, self.min_units)

    def to(self, form: Form) -> Codes:
        """The same weights with at least as many bits, minima added, or groups halved; exact but for `plain`."""
        import numpy as np

        if form == self.form:
            return self
        if self.form.products and not form.products:
            return self.plain.to(form)
        if not _can_promote(self.form, form):
            raise ValueError(f"{self.form} cannot be stored as {form} exactly")
        codes, scales, mins = self.codes, self.scales, self.mins
        if form.group != self.form.group:
            repeat = self.form.group // form.group
            groups = -(-codes.shape[1] // form.group)
            scales = np.repeat(scales, repeat, axis=1)[:, :groups]
            mins = None if mins is None else np.repeat(mins, repeat, axis=1)[:, :groups]
        if self.mins is None:
            bias = 1 << (self.form.bits - 1)
            if form.has_min:
                mins = (scales.astype(np.float32) * np.float32(-bias)).astype(np.float16)
            elif form.bits != self.form.bits:
                codes = codes + np.uint8((1 << (form.bits - 1)) - bias)
        return Codes(form, codes, scales, mins)

    def dequantise(self) -> NDArray[np.float32]:
        """The weights, float32 [rows, cols]."""
        import numpy as np

        cols = self.codes.shape[1]
        of_groups, min_of_groups = self._float_scales()
        scales = np.repeat(of_groups, self.form.group, axis=1)[:, :cols]
        if min_of_groups is None:
            return (self.codes.astype(np.float32) - np.float32(1 << (self.form.bits - 1))) * scales
        mins = np.repeat(min_of_groups, self.form.group, axis=1)[:, :cols]
        return self.codes.astype(np.float32) * scales + mins


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """To half; an overflow becomes infinite."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16)


def _can_promote(old: Form, new: Form) -> bool:
    return (
        old.quantised
        and old.products == new.products
        and new.quantised
        and new.bits >= old.bits
        and old.group % new.group == 0
        and (new.has_min or not old.has_min)
    )


def common_form(a: Form, b: Form) -> Form:
    """The smallest form that holds weights of both forms exactly; scales that are products stay such where the forms are the
    same, and are rounded elsewhere."""
    if a == b:
        return a
    if a.quantised and b.quantised:
        kind = a.kind if a.bits >= b.bits else b.kind
        return Form(kind, min(a.group, b.group), a.has_min or b.has_min)
    if not a.quantised and not b.quantised and a.kind == b.kind:
        return Form(a.kind)
    return Form("f32")


# What a row source yields: codes where its form is quantised, float32 [rows, cols] otherwise.
RowsRead = Union[Codes, "FloatRows"]
