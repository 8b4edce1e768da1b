"""Strict reader of safetensors files: header and rows of tensors. Nothing in the file is trusted.

As with GGUF, every offset is compared with the size of the file first, and data is read with `pread`, never mapped.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedModelError
from .gguf_reader import read_exactly
from .quant_types import TENSOR_TYPES, TensorType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

MAX_HEADER_BYTES = 100 << 20  # the limit of the format itself
_FLOATS = {t.name: t for t in TENSOR_TYPES.values() if not t.form.quantised}
_SIZES = {name: t.block_bytes for name, t in _FLOATS.items()} | {"U8": 1, "I8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class SafetensorsTensor:
    """One entry of the header; `offset` counts from the start of the file. `type` is None for types that are no weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int

    def float_type(self, path: Path) -> TensorType:
        """The tensor's type; UnsupportedModelError where it is not F32, F16 or BF16."""
        if self.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{path}: tensor {self.name} is of type {self.dtype}, which is not supported; get a checkpoint in "
                f"{', '.join(_FLOATS)}"
            )
        return _FLOATS[self.dtype]


class SafetensorsFile:
    """An open safetensors file: `tensors` by name, and `read_rows`. A context manager. Raises ModelError where the file is
    missing, unreadable, truncated or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ModelError(f"{path}: cannot be read (not a regular file); fetch it again")
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
            self._size = os.fstat(self._fd).st_size
            self.tensors = self._read_header()
        except OSError as error:
            self.close()
            raise ModelError(
                f"{path}: cannot be read ({error.strerror}); check that it is there and its permissions"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; reading rows afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_rows(self, tensor: SafetensorsTensor, begin: int, end: int) -> NDArray[np.uint8]:
        """Rows begin..end-1 as stored: uint8 [end - begin, bytes of a row]. A vector is one row."""
        import numpy as np

        row_bytes = (tensor.shape[-1] if tensor.shape else 1) * tensor.float_type(self.path).block_bytes
        out = np.empty((end - begin, row_bytes), np.uint8)
        read_exactly(self._fd, out.reshape(-1).data, tensor.offset + begin * row_bytes, self.path, tensor.name)
        return out

    def read_bytes(self, tensor: SafetensorsTensor, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """A tensor of any type as stored, flat; or its rows begin..end-1."""
        import numpy as np

        row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else tensor.nbytes
        size = tensor.nbytes if end is None else (end - begin) * row_bytes
        out = np.empty(size, np.uint8)
        read_exactly(self._fd, out.data, tensor.offset + begin * row_bytes, self.path, tensor.name)
        return out

    def _fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path}: {problem}; the file is damaged or not whole, fetch it again")

    def _read_header(self) -> dict[str, SafetensorsTensor]:
        if self._size < 8:
            raise self._fail(f"{self._size} bytes are too few for a safetensors file")
        prefix = bytearray(8)
        read_exactly(self._fd, memoryview(prefix), 0, self.path, "the header")
        length = int.from_bytes(prefix, "little")
        if length > min(self._size - 8, MAX_HEADER_BYTES):
            raise self._fail(f"the header claims {length} bytes of {self._size}")
        text = bytearray(length)
        read_exactly(self._fd, memoryview(text), 8, self.path, "the header")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise self._fail("the header is not JSON") from None
        if not isinstance(header, dict):
            raise self._fail("the header is not an object")
        tensors = {name: self._entry(name, e, 8 + length) for name, e in header.items() if name != "__metadata__"}
        placed = sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset)
        for first, second in itertools.pairwise(placed):
            if first.offset + first.nbytes > second.offset:
                raise self._fail(f"tensors {first.name} and {second.name} overlap")
        return tensors

    def _entry(self, name: str, entry: Any, data: int) -> SafetensorsTensor:
        def is_size(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0

        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._fail(f"tensor {name} lacks type, shape or place") from None
        if not (isinstance(dtype, str) and isinstance(shape, list) and all(map(is_size, [*shape, begin, end]))):
            raise self._fail(f"tensor {name} has an impossible type, shape or place")
        if not begin <= end <= self._size - data:
            raise self._fail(f"tensor {name} lies outside the file")
        if dtype in _SIZES and prod(shape) * _SIZES[dtype] != end - begin:
            raise self._fail(f"tensor {name} has a shape that does not fit its size")
        return SafetensorsTensor(name, tuple(shape), dtype, data + begin, end - begin)
