"""Sources of matrix rows: what the converter reads from, and the fusings and paddings that it does on the way.

A source knows its size and form, and yields any range of its rows; so a matrix of any size passes through in slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ModelError
from .codes import SUPERBLOCK, TILE_ROWS, Codes, Form, RowsRead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .quant_types import TensorType


class RowSource(Protocol):
    """A matrix [rows, cols] of which row ranges can be read: `Codes` where `form` is quantised, else float32."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def form(self) -> Form: ...
    def read(self, begin: int, end: int) -> RowsRead: ...


class ArrayRows:
    """Floats in memory, to be stored as `kind` (f32, f16, bf16)."""

    def __init__(self, values: NDArray[Any], kind: str = "f32") -> None:
        self.values = values
        self.rows, self.cols = values.shape
        self.form = Form(kind)

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        return np.ascontiguousarray(self.values[begin:end], np.float32)


class CodeRows:
    """Codes in memory."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.rows, self.cols = codes.codes.shape
        self.form = codes.form

    def read(self, begin: int, end: int) -> RowsRead:
        return self.codes.map(lambda a: a[begin:end])


class RowFile(Protocol):
    """An open file that tensors can be read from."""

    path: Path

    def read_rows(self, tensor: Any, begin: int, end: int) -> NDArray[np.uint8]: ...


class FileRows:
    """A matrix of a file. Reading raises ModelError where a weight is not a finite number."""

    def __init__(self, file: RowFile, tensor: Any, kind: TensorType) -> None:
        self.file, self.tensor, self.kind = file, tensor, kind
        self.rows, self.cols = tensor.shape
        self.form = kind.form

    def read(self, begin: int, end: int) -> RowsRead:
        return _decode(self.file, self.tensor, self.kind, begin, end)


def file_vector(file: RowFile, tensor: Any, kind: TensorType) -> NDArray[np.float32]:
    """A whole vector of a file, float32; ModelError where a value is not a finite number."""
    values: NDArray[np.float32] = floats_of(_decode(file, tensor, kind, 0, 1))[0]
    return values


def _decode(file: RowFile, tensor: Any, kind: TensorType, begin: int, end: int) -> RowsRead:
    import numpy as np

    rows = kind.decode(file.read_rows(tensor, begin, end))
    if not (rows.finite if isinstance(rows, Codes) else np.isfinite(rows).all()):
        raise ModelError(
            f"{file.path}: tensor {tensor.name} holds weights that are not finite numbers; the file is damaged, fetch it again"
        )
    return rows


class CastRows:
    """A source in another form that holds the same values."""

    def __init__(self, source: RowSource, form: Form) -> None:
        self.source, self.form = source, form
        self.rows, self.cols = source.rows, source.cols

    def read(self, begin: int, end: int) -> RowsRead:
        rows = self.source.read(begin, end)
        if isinstance(rows, Codes):
            return rows.to(self.form) if self.form.quantised else rows.dequantise()
        return rows


class PaddedRows:
    """A source with zero rows below and zero columns to the right (scale 0, so that the code does not matter)."""

    def __init__(self, source: RowSource, rows: int, cols: int) -> None:
        self.source, self.form = source, source.form
        self.rows, self.cols = rows, cols
        if self.form.quantised and source.cols % self.form.group and cols != source.cols:
            raise ValueError(f"{source.cols} columns in groups of {self.form.group} cannot be widened")

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        last = max(begin, min(end, self.source.rows))
        rows = self.source.read(begin, last)
        below, right = end - last, self.cols - self.source.cols

        def pad(a: NDArray[Any], right: int) -> NDArray[Any]:
            return np.pad(a, ((0, below), (0, right))) if below or right else a

        if not isinstance(rows, Codes):
            return pad(rows, right)
        widths = (1, self.form.group, self.form.group, SUPERBLOCK, SUPERBLOCK)
        return Codes(
            self.form,
            *(None if a is None else pad(a, -(-self.cols // w) - a.shape[1]) for a, w in zip(rows.arrays, widths)),  # type: ignore[arg-type]
        )


class ConcatRows:
    """Sources of one form and width, one below the other."""

    def __init__(self, sources: Sequence[RowSource]) -> None:
        self.sources = sources
        self.form, self.cols = sources[0].form, sources[0].cols
        self.rows = sum(source.rows for source in sources)

    def read(self, begin: int, end: int) -> RowsRead:
        parts, at = [], 0
        for source in self.sources:
            first, last = max(begin - at, 0), min(end - at, source.rows)
            if first < last:
                parts.append(source.read(first, last))
            at += source.rows
        return stack(parts)


class PickedRows:
    """Ranges [begin, end) of another source's rows, one below the other: a part of a fused matrix."""

    def __init__(self, source: RowSource, ranges: Sequence[tuple[int, int]]) -> None:
        self.source, self.ranges = source, ranges
        self.form, self.cols = source.form, source.cols
        self.rows = sum(end - begin for begin, end in ranges)

    def read(self, begin: int, end: int) -> RowsRead:
        parts, at = [], 0
        for first, last in self.ranges:
            here, there = max(begin - at, 0), min(end - at, last - first)
            if here < there:
                parts.append(self.source.read(first + here, first + there))
            at += last - first
        return stack(parts) if parts else self.source.read(0, 0)


class InterleavedRows:
    """gate and up in blocks of 64 rows: gate 0-63, up 0-63, gate 64-127 ... Both of one form, rows a multiple of 64."""

    def __init__(self, gate: RowSource, up: RowSource) -> None:
        self.gate, self.up = gate, up
        self.form, self.cols = gate.form, gate.cols
        self.rows = gate.rows + up.rows

    def read(self, begin: int, end: int) -> RowsRead:
        if begin % TILE_ROWS or end % TILE_ROWS:
            raise ValueError("interleaved rows are read in whole blocks of 64")
        parts = []
        for at in range(begin, end, TILE_ROWS):
            block, odd = divmod(at // TILE_ROWS, 2)
            source = self.up if odd else self.gate
            parts.append(source.read(block * TILE_ROWS, (block + 1) * TILE_ROWS))
        return stack(parts)


def stack(parts: Sequence[RowsRead]) -> RowsRead:
    """Rows of one form, one below the other."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    codes = [part for part in parts if isinstance(part, Codes)]
    if not codes:
        return np.concatenate([part for part in parts if not isinstance(part, Codes)])
    arrays = ([a for a in same if a is not None] for same in zip(*(c.arrays for c in codes)))
    return Codes(codes[0].form, *(np.concatenate(same) if same else None for same in arrays))  # type: ignore[arg-type]


def floats_of(rows: RowsRead) -> NDArray[np.float32]:
    """The weights, float32 [rows, cols]."""
    return rows.dequantise() if isinstance(rows, Codes) else rows
