"""BitNet checkpoints: matrices of -1, 0 and 1 with one scale each become rows of 4-bit codes.

Published ones are packed, four ternary rows in a row of bytes, with a `weight_scale`; master weights are floats that are rounded
whenever they are used, by their mean magnitude. The codes are exact; the scale is rounded to half where it is none, by at most
2^-11 of itself for all weights of a matrix alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedModelError
from .checkpoint import CheckpointTensor
from .codes import Codes, Form, RowsRead
from .int4 import Placed
from .rows import RowSource, file_vector, floats_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PER_BYTE = 4
_FORM = Form("q4")
_BIAS = 8
_SLICE_ROWS = 256


def ternary_matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, Placed], plain: Mapping[str, CheckpointTensor], where: str
) -> tuple[dict[str, CheckpointTensor], set[str]]:
    """The ternary matrices of a checkpoint as tensors, and the names of the tensors that they are made of. `settings` is
    config.json's quantization_config; `plain` are all tensors as they are stored."""
    online = str(settings.get("quantization_mode", "offline")) == "online"
    kind = str(settings.get("linear_class", "bitlinear"))
    if settings.get("use_rms_norm"):
        raise UnsupportedModelError(
            f"{where}: quantization_config use_rms_norm is not supported; get the original checkpoint"
        )
    if kind not in ("bitlinear", "autobitlinear"):
        raise UnsupportedModelError(
            f"{where}: quantization_config linear_class {kind!r} is not supported (autobitlinear and bitlinear are)"
        )
    found: dict[str, CheckpointTensor] = {}
    used: set[str] = set()
    for name, (file, tensor) in tensors.items():
        if tensor.dtype == "U8" and name.endswith(".weight") and len(tensor.shape) == 2:
            scale = name + "_scale"
            if scale not in tensors:
                raise ModelError(f"{where}: tensor {scale} is missing; fetch the directory again")
            used.update((name, scale))
            rows = PackedTernaryRows((file, tensor), tensors[scale], divide=kind == "bitlinear", where=where)
            found[name] = _entry(name, rows, tensor.nbytes)
        elif online and ".layers." in name and name.endswith("_proj.weight"):
            used.add(name)
            found[name] = _entry(name, RoundedTernaryRows(plain[name].rows()), tensor.nbytes)
    if not found:
        raise ModelError(f"{where}: quantised as BitNet, but no tensor is; fetch the directory again")
    return found, used


def _entry(name: str, rows: RowSource, nbytes: int) -> CheckpointTensor:
    return CheckpointTensor(name, (rows.rows, rows.cols), "ternary", nbytes, lambda: rows, _no_vector)


def _no_vector() -> NDArray[np.float32]:
    raise TypeError("a ternary matrix is no vector")


def _codes(ternary: NDArray[np.int8], scale: np.float16) -> Codes:
    import numpy as np

    groups = -(-ternary.shape[1] // _FORM.group)
    codes = (ternary + np.int8(_BIAS)).astype(np.uint8)
    return Codes(_FORM, codes, np.full((ternary.shape[0], groups), scale, np.float16), None)


def _half(scale: float, name: str) -> np.float16:
    import numpy as np

    with np.errstate(over="ignore"):
        half = np.float16(scale)
    if not (np.isfinite(half) and half > 0):
        raise ModelError(f"{name}: the scale {scale:g} is not a number above 0 that a half can hold; fetch it again")
    return half


class PackedTernaryRows:
    """Four rows of a quarter of the matrix lie in one row of bytes: bits 2i and 2i + 1 hold the i-th quarter, plus 1."""

    def __init__(self, matrix: Placed, scale: Placed, *, divide: bool, where: str) -> None:
        self._file, self._tensor = matrix
        self._quarter, self.cols = self._tensor.shape
        self.rows, self.form = self._quarter * _PER_BYTE, _FORM
        self._scale_at, self._divide, self._where = scale, divide, where
        self._scale: np.float16 | None = None
        if scale[1].shape not in ((1,), ()):
            raise ModelError(f"{where}: tensor {scale[1].name} is not one number; fetch the directory again")

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        parts = []
        for i in range(_PER_BYTE):
            first, last = max(begin - i * self._quarter, 0), min(end - i * self._quarter, self._quarter)
            if first >= last:
                continue
            stored = self._file.read_bytes(self._tensor, first, last).reshape(last - first, self.cols)
            parts.append((stored >> np.uint8(2 * i)) & np.uint8(3))
        ternary = np.concatenate(parts).astype(np.int8) - np.int8(1) if parts else np.zeros((0, self.cols), np.int8)
        if ternary.size and int(ternary.max()) > 1:
            raise ModelError(f"{self._where}: tensor {self._tensor.name} holds codes that are not ternary; fetch it again")
        return _codes(ternary, self._read_scale())

    def _read_scale(self) -> np.float16:
        if self._scale is None:
            file, tensor = self._scale_at
            value = float(file_vector(file, tensor, tensor.float_type(file.path)).reshape(-1)[0])
            if self._divide and value:
                value = 1.0 / value
            self._scale = _half(value, f"{self._where}: tensor {tensor.name}")
        return self._scale


class RoundedTernaryRows:
    """Floats rounded to -1, 0 and 1 times their mean magnitude, which needs one pass over the matrix before the first row."""

    def __init__(self, source: RowSource) -> None:
        self.source, self.rows, self.cols, self.form = source, source.rows, source.cols, _FORM
        self._mean: float | None = None
        self._lock = threading.Lock()

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        mean = self._magnitude()
        values = floats_of(self.source.read(begin, end))
        ternary = np.clip(np.rint(values * np.float32(1.0 / mean)), -1, 1).astype(np.int8)
        return _codes(ternary, _half(mean, "a ternary matrix"))

    def _magnitude(self) -> float:
        import numpy as np

        with self._lock:
            if self._mean is None:
                total = 0.0
                for at in range(0, self.rows, _SLICE_ROWS):
                    rows = floats_of(self.source.read(at, min(at + _SLICE_ROWS, self.rows)))
                    total += float(np.abs(rows).sum(dtype=np.float64))
                self._mean = max(total / (self.rows * self.cols), 1e-5)
            return self._mean
