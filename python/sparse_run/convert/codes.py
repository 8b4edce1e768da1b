"""Weights in the terms of the packed format: unsigned codes with scales and minima, and exact changes between kinds.

A weight is `scale * (u - bias)` without minima and `scale * u + min` with them (models/format.md). Everything here keeps
the values exactly; what would not is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatRows = NDArray[np.float32]

BITS = {"q4": 4, "q5": 5, "q6": 6, "q8": 8}
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
TILE_ROWS = 64
SLAB_COLS = 32


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: `kind` of q4 q5 q6 q8 f32 f16 bf16; columns per scale; whether there are minima."""

    kind: str
    group: int = 32
    has_min: bool = False

    @property
    def quantised(self) -> bool:
        return self.kind in BITS

    @property
    def bits(self) -> int:
        """Bits of one code or float."""
        return BITS[self.kind] if self.quantised else 8 * FLOAT_BYTES[self.kind]


@dataclass(frozen=True)
class Codes:
    """Rows of a quantised matrix: `codes` u8 [rows, cols]; `scales`, `mins` f16 [rows, ceil(cols / group)]."""

    form: Form
    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    mins: NDArray[np.float16] | None

    def to(self, form: Form) -> Codes:
        """The same weights with at least as many bits, minima added, or groups halved; exact."""
        import numpy as np

        if form == self.form:
            return self
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
        scales = np.repeat(self.scales.astype(np.float32), self.form.group, axis=1)[:, :cols]
        if self.mins is None:
            return (self.codes.astype(np.float32) - np.float32(1 << (self.form.bits - 1))) * scales
        mins = np.repeat(self.mins.astype(np.float32), self.form.group, axis=1)[:, :cols]
        return self.codes.astype(np.float32) * scales + mins


def _can_promote(old: Form, new: Form) -> bool:
    return (
        old.quantised
        and new.quantised
        and new.bits >= old.bits
        and old.group % new.group == 0
        and (new.has_min or not old.has_min)
    )


def common_form(a: Form, b: Form) -> Form:
    """The smallest form that holds weights of both forms exactly."""
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
