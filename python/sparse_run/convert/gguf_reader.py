"""Strict reader of GGUF files: header, metadata, tensor table, rows of tensors. Nothing in the file is trusted.

Every count, length and offset is compared with the size of the file before it is used, so that a truncated or hostile
file ends in one `ModelError` that names it. Tensor data is read with `pread`, never mapped: a file that shrinks while it
is read cannot crash the process, and reading a large model does not fill the process with its pages.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ModelError, UnsupportedModelError
from .quant_types import GGML_TYPE_NAMES, TENSOR_TYPES, TensorType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1024
MAX_TENSOR_NAME_BYTES = 256
MAX_DIMS = 4
_CHUNK = 1 << 20

# Value types of the metadata: struct format, or a marker.
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is rows first: the reverse of the file's order of dimensions."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class _Array:
    """An array value that has been walked over but not decoded; `start` is where its first element lies."""

    type: int
    count: int
    start: int
    end: int


class GgufMetadata(Mapping[str, Any]):
    """Metadata of a file: int, float, bool, str, or list of those. Arrays are decoded when they are asked for, so that a
    vocabulary of 262,144 tokens costs nothing to those who only want the number of layers."""

    def __init__(self, values: dict[str, Any], header: bytes) -> None:
        self._values = values
        self._header = header

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return _decode_array(value, self._header) if isinstance(value, _Array) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def array_length(self, key: str) -> int | None:
        """Elements of the array under `key` without decoding it; None where there is no such array."""
        value = self._values.get(key)
        return value.count if isinstance(value, _Array) else None


def _decode_array(array: _Array, header: bytes) -> list[Any]:
    import numpy as np

    if array.type != _STRING:
        dtype = np.dtype(_SCALARS[array.type]).newbyteorder("<")
        values: list[Any] = np.frombuffer(header, dtype, array.count, array.start).tolist()
        return values
    out = []
    unpack = struct.Struct("<Q").unpack_from
    at = array.start
    for _ in range(array.count):
        (length,) = unpack(header, at)
        at += 8 + length
        out.append(str(header[at - length : at], "utf-8", "replace"))
    return out


class GgufFile:
    """An open GGUF file: `metadata`, `tensors` by name, and `read_rows`. A context manager.

    Raises ModelError where the file is missing, unreadable, truncated or damaged, UnsupportedModelError where it is sound
    but of a version or with a tensor type that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would wait for its writer
                raise ModelError(f"{path}: cannot be read (not a regular file); give a .gguf file")
            self.fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; check the path") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        try:
            self.size = os.fstat(self.fd).st_size
            reader = _HeaderReader(self)
            reader.read()
        except OSError as error:
            self.close()
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check the file and its disk") from None
        except BaseException:
            self.close()
            raise
        self.version = reader.version
        self.metadata = GgufMetadata(reader.values, bytes(reader.data))
        self.tensors: dict[str, GgufTensor] = reader.tensors
        self.data_offset = reader.data_offset

    def close(self) -> None:
        """Closes the file; reading rows afterwards is an error."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_rows(self, tensor: GgufTensor, begin: int, end: int) -> NDArray[np.uint8]:
        """Rows begin..end-1 as stored: uint8 [end - begin, bytes of a row]. A vector is one row."""
        import numpy as np

        row_bytes = tensor.type.nbytes(tensor.shape[-1])
        out = np.empty((end - begin, row_bytes), np.uint8)
        read_exactly(self.fd, out.reshape(-1).data, tensor.offset + begin * row_bytes, self.path, tensor.name)
        return out


def read_exactly(fd: int, buffer: memoryview, offset: int, path: Path, what: str) -> None:
    """Fills the buffer from the file's bytes at `offset`; ModelError where it ends before that."""
    done = 0
    while done < len(buffer):
        try:
            if hasattr(os, "preadv"):
                count = os.preadv(fd, [buffer[done:]], offset + done)
            else:
                part = os.pread(fd, len(buffer) - done, offset + done)
                count = len(part)
                buffer[done : done + count] = part
        except OSError as error:
            raise ModelError(f"{path}: reading {what} failed ({error.strerror}); check the disk") from None
        if count == 0:
            raise ModelError(f"{path}: the file ends within {what}; it changed or was truncated, fetch it again")
        done += count


class _HeaderReader:
    """One pass over the header; `data` grows by chunks as far as the header turns out to reach."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.data = bytearray()
        self.at = 0
        self.version = 0
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self.data_offset = 0

    def fail(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.file.path}: {problem}; the file is damaged or not whole, fetch it again")

    def need(self, count: int, what: str) -> None:
        """Makes sure that `count` more bytes are in memory."""
        end = self.at + count
        if end <= len(self.data):
            return
        if end > self.file.size:
            self.fail(f"the file ends within {what} ({self.file.size} bytes, {end} needed)")
        have = len(self.data)
        more = min(max(end, 2 * have, _CHUNK), self.file.size) - have
        part = bytearray(more)
        read_exactly(self.file.fd, memoryview(part), have, self.file.path, what)
        self.data += part

    def scalar(self, fmt: str, what: str) -> Any:
        size = struct.calcsize("<" + fmt)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + fmt, self.data, self.at)
        self.at += size
        return value

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.scalar("Q", what)
        if limit is not None and length > limit:
            self.fail(f"{what} is {length} bytes long")
        self.need(length, what)
        value = str(self.data[self.at : self.at + length], "utf-8", "replace")
        self.at += length
        return value

    def read(self) -> None:
        path = self.file.path
        if self.file.size < 24:
            self.fail(f"{self.file.size} bytes are too few for a GGUF file")
        self.need(24, "the header")
        if self.data[:4] != MAGIC:
            raise ModelError(f"{path}: not a GGUF file (it begins with {bytes(self.data[:4])!r}); give a .gguf file")
        self.at = 4
        self.version = self.scalar("I", "the header")
        if self.version not in VERSIONS:
            if self.version and self.version & 0xFFFF == 0:
                raise UnsupportedModelError(f"{path}: big-endian GGUF is not supported; get the little-endian file")
            raise UnsupportedModelError(
                f"{path}: GGUF version {self.version} is not supported (versions 2 and 3 are); get a current file"
            )
        n_tensors = self.scalar("Q", "the header")
        n_keys = self.scalar("Q", "the header")
        # The smallest key takes 13 bytes and the smallest tensor entry 32.
        if n_keys > MAX_KEYS or n_keys * 13 > self.file.size:
            self.fail(f"the header claims {n_keys} metadata keys")
        if n_tensors > MAX_TENSORS or n_tensors * 32 > self.file.size:
            self.fail(f"the header claims {n_tensors} tensors")
        for i in range(n_keys):
            self.key(i)
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self.fail(f"general.alignment is {alignment!r}")
        entries = [self.tensor_entry(i) for i in range(n_tensors)]
        self.data_offset = -(-self.at // alignment) * alignment
        for name, dims, type_id, offset in entries:
            self.add_tensor(name, dims, type_id, offset, alignment)

    def key(self, index: int) -> None:
        name = self.text(f"the name of metadata key {index}", MAX_KEY_BYTES)
        if name in self.values:
            self.fail(f"metadata key {name} occurs twice")
        kind = self.scalar("I", name)
        if kind == _STRING:
            self.values[name] = self.text(name)
        elif kind == _ARRAY:
            self.values[name] = self.array(name)
        elif kind in _SCALARS:
            self.values[name] = self.scalar(_SCALARS[kind], name)
        else:
            self.fail(f"metadata key {name} has the unknown value type {kind}")

    def array(self, name: str) -> _Array:
        kind = self.scalar("I", name)
        count = self.scalar("Q", name)
        start = self.at
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            if count * size > self.file.size:
                self.fail(f"metadata array {name} claims {count} elements")
            self.need(count * size, name)
            self.at += count * size
        elif kind == _STRING:
            if count * 8 > self.file.size:
                self.fail(f"metadata array {name} claims {count} strings")
            self.skip_strings(count, name)
        else:
            self.fail(f"metadata array {name} has elements of the unsupported type {kind}")
        return _Array(kind, count, start, self.at)

    def skip_strings(self, count: int, name: str) -> None:
        unpack = struct.Struct("<Q").unpack_from
        at, have, data = self.at, len(self.data), self.data
        for _ in range(count):
            if at + 8 > have:
                self.at = at
                self.need(8, name)
                have = len(data)
            at += 8 + unpack(data, at)[0]
            if at > have:
                self.at = 0
                self.need(at, name)
                have = len(data)
        self.at = at

    def tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        n_dims = self.scalar("I", f"tensor {name}")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"tensor {name} claims {n_dims} dimensions")
        dims = tuple(self.scalar("Q", f"tensor {name}") for _ in range(n_dims))
        return name, dims, self.scalar("I", f"tensor {name}"), self.scalar("Q", f"tensor {name}")

    def add_tensor(self, name: str, dims: tuple[int, ...], type_id: int, offset: int, alignment: int) -> None:
        path = self.file.path
        if name in self.tensors:
            self.fail(f"tensor {name} occurs twice")
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            label = GGML_TYPE_NAMES.get(type_id)
            if label is None:
                self.fail(f"tensor {name} has the unknown type {type_id}")
            raise UnsupportedModelError(
                f"{path}: tensor {name} is of type {label}, which is not supported; get a file whose types are among "
                f"{', '.join(t.name for t in TENSOR_TYPES.values())}"
            )
        count = 1
        for dim in dims:
            count *= dim
        if not 0 < count <= self.file.size * 8:
            self.fail(f"tensor {name} claims the dimensions {'x'.join(map(str, dims))}")
        if dims[0] % kind.block:
            self.fail(
                f"tensor {name} has rows of {dims[0]} weights, not a multiple of {kind.block} as {kind.name} needs"
            )
        nbytes = kind.nbytes(count)
        begin = self.data_offset + offset
        if offset % alignment or begin + nbytes > self.file.size:
            self.fail(f"tensor {name} lies outside the file (bytes {begin} to {begin + nbytes} of {self.file.size})")
        self.tensors[name] = GgufTensor(name, dims[::-1], kind, begin, nbytes)
