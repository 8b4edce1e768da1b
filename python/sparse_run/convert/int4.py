"""GPTQ and AWQ checkpoints: 4-bit matrices in safetensors, stored column-major in words of eight codes, become rows of codes.

A weight is `scale * (code - zero)`, both by group of inputs. Codes and zeros are small integers, so `code - zero` is one too:
where every zero is 8 it fits 4 bits, else 5, and the stored weights are exactly those of the checkpoint. A file whose
columns belong to groups in any order (`desc_act`) has no such form: a column's inputs come from the layer before, in one order
for all matrices; it is refused by name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedModelError
from .checkpoint import CheckpointTensor
from .codes import Codes, Form, RowsRead
from .safetensors_reader import SafetensorsFile, SafetensorsTensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PARTS = ("qweight", "qzeros", "scales", "g_idx")
GROUPS = (32, 64, 128)
_PER_WORD = 8
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, lowest first
_STORED_GROUP = 32

# Where a tensor lies: its open file and its entry.
Placed = tuple[SafetensorsFile, SafetensorsTensor]
# A matrix as stored: words of weights; zeros and scales [rows, groups].
_Stored = tuple["NDArray[np.uint32]", "NDArray[np.int16]", "NDArray[np.float16]"]


class _Recent:
    """The matrices that are being read, as stored: rows of the result are columns there, so whole matrices are loaded, once
    for all of their panels. Threads take turns."""

    def __init__(self, most: int) -> None:
        self._most, self._arrays = most, OrderedDict[str, "_Stored"]()
        self._lock = threading.Lock()

    def get(self, key: str, load: Callable[[], _Stored]) -> _Stored:
        with self._lock:
            if key not in self._arrays:
                while len(self._arrays) >= self._most:
                    self._arrays.popitem(last=False)
                self._arrays[key] = load()
            self._arrays.move_to_end(key)
            return self._arrays[key]


def packed_matrices(
    settings: Mapping[str, Any], tensors: Mapping[str, Placed], where: str
) -> tuple[dict[str, CheckpointTensor], set[str]]:
    """The matrices of a quantised checkpoint as tensors `NAME.weight`, and the names of the tensors that they are made of.

    `settings` is config.json's quantization_config. Raises UnsupportedModelError, by name, for what differs from 4 bits in
    groups of 32, 64, 128 or one group a row, and ModelError where parts are missing or do not fit each other."""
    method = str(settings.get("quant_method", "unknown")).lower()
    group, offset = _check_settings(settings, method, where)
    recent = _Recent(4)  # gate and up are read in turn, and the next matrix begins while the last one ends
    found: dict[str, CheckpointTensor] = {}
    used: set[str] = set()
    for name in tensors:
        stem, dot, part = name.rpartition(".")
        if part != "qweight" or not dot:
            continue
        parts = {p: tensors[f"{stem}.{p}"] for p in PARTS if f"{stem}.{p}" in tensors}
        used.update(f"{stem}.{p}" for p in parts)
        matrix = Int4Rows(stem, parts, method, group, offset, recent, where)
        found[f"{stem}.weight"] = CheckpointTensor(
            f"{stem}.weight",
            (matrix.rows, matrix.cols),
            f"{method.upper()} 4 bits",
            sum(tensor.nbytes for _, tensor in parts.values()),
            lambda matrix=matrix: matrix,  # type: ignore[misc]
            _no_vector,
        )
    if not found:
        raise ModelError(f"{where}: quantised by {method!r}, but no tensor is; fetch the directory again")
    return found, used


def _no_vector() -> NDArray[np.float32]:
    raise TypeError("a quantised matrix is no vector")


def _check_settings(settings: Mapping[str, Any], method: str, where: str) -> tuple[int, int]:
    """Inputs of a group (-1: all of a row), and what is added to stored zeros."""

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{where}: quantization_config {what} is not supported; get the original checkpoint or a GGUF file"
        )

    if method not in ("gptq", "awq"):
        raise refuse(f"quant_method {settings.get('quant_method', 'unknown')!r}")
    bits = settings.get("bits", settings.get("w_bit"))
    if bits != 4:
        raise refuse(f"bits {bits!r}")
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if group not in (-1, *GROUPS):
        raise refuse(f"group_size {group!r}")
    if method == "awq":
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise refuse(f"version {version!r}")
        if settings.get("zero_point", True) is not True:
            raise refuse("zero_point false")
        return group, 0
    if settings.get("dynamic"):
        raise refuse("dynamic")
    kind = "marlin" if settings.get("is_marlin_format") else str(settings.get("checkpoint_format") or "gptq").lower()
    if kind not in ("gptq", "gptq_v2"):
        raise refuse(f"checkpoint_format {kind!r}")
    return group, 1 if kind == "gptq" else 0


class Int4Rows:
    """One matrix [outputs, inputs] of a GPTQ or AWQ checkpoint as a source of rows."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Placed],
        method: str,
        group: int,
        zero_offset: int,
        recent: _Recent,
        where: str,
    ) -> None:
        self.name, self._parts, self._gptq, self._recent, self._where = name, parts, method == "gptq", recent, where
        for part in PARTS[:3]:
            if part not in parts:
                raise ModelError(f"{where}: tensor {name}.{part} is missing; fetch the directory again")
            if len(parts[part][1].shape) != 2:
                raise self._misfit(part)
        high, wide = parts["qweight"][1].shape
        self.rows, self.cols = (wide, high * _PER_WORD) if self._gptq else (wide * _PER_WORD, high)
        self.group = self.cols if group == -1 else group
        if not self.cols or self.cols % self.group or self.group % _STORED_GROUP or self.rows % _PER_WORD:
            raise UnsupportedModelError(
                f"{where}: {name} has {self.cols} inputs and {self.rows} outputs in groups of {self.group}, which is not "
                "supported; get the original checkpoint or a GGUF file"
            )
        groups = self.cols // self.group
        for part, shape in (("qzeros", (groups, self.rows // _PER_WORD)), ("scales", (groups, self.rows))):
            if parts[part][1].shape != shape:
                raise self._misfit(part)
        self._zero_offset = zero_offset
        self._form: Form | None = None

    @property
    def form(self) -> Form:
        """4 bits where every zero is 8, else 5. The first call reads all zeros and checks the order of columns."""
        if self._form is None:
            self._check_order()
            self._form = Form("q4" if (self._read_zeros() == 8).all() else "q5", _STORED_GROUP)
        return self._form

    def read(self, begin: int, end: int) -> RowsRead:
        import numpy as np

        form = self.form
        words, zeros, scales = self._recent.get(
            self.name, lambda: (self._words("qweight"), self._read_zeros(), self._read_scales())
        )
        codes = _nibbles_down(words[:, begin:end]) if self._gptq else _awq_columns(words, begin, end)
        each = self.group
        centred = codes.T.reshape(end - begin, -1, each).astype(np.int16) - zeros[begin:end, :, None]
        centred += 1 << (form.bits - 1)
        repeat = each // _STORED_GROUP
        return Codes(
            form,
            np.ascontiguousarray(centred.reshape(end - begin, self.cols).astype(np.uint8)),
            np.ascontiguousarray(np.repeat(scales[begin:end], repeat, axis=1)),
            None,
        )

    def _read_zeros(self) -> NDArray[np.int16]:
        import numpy as np

        words = self._words("qzeros")
        stored = _nibbles_across(words) if self._gptq else _awq_columns(words, 0, self.rows)
        if self._zero_offset and (stored == 15).any():
            raise UnsupportedModelError(
                f"{self._where}: {self.name}.qzeros holds 15, which programs read as zero point 0 or as 16; get the original "
                "checkpoint or a GGUF file"
            )
        zeros: NDArray[np.int16] = stored.T.astype(np.int16) + np.int16(self._zero_offset)
        return np.ascontiguousarray(zeros)

    def _read_scales(self) -> NDArray[np.float16]:
        import numpy as np

        from .quant_types import decode_floats

        file, tensor = self._parts["scales"]
        values = decode_floats(tensor.float_type(file.path).name, file.read_rows(tensor, 0, tensor.shape[0]))
        with np.errstate(over="ignore"):
            scales = values.astype(np.float16)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{file.path}: tensor {tensor.name} holds values that are not finite numbers; the file is damaged, fetch it again"
            )
        if not (scales.astype(np.float32) == values).all():
            raise UnsupportedModelError(
                f"{self._where}: {tensor.name} holds scales that are no halves, which is not supported; get the original "
                "checkpoint or a GGUF file"
            )
        return np.ascontiguousarray(scales.T)

    def _check_order(self) -> None:
        import numpy as np

        if "g_idx" not in self._parts:
            return
        order = self._integers("g_idx").view(np.int32).reshape(-1)
        if order.shape != (self.cols,):
            raise self._misfit("g_idx")
        if not (order == np.arange(self.cols) // self.group).all():
            raise UnsupportedModelError(
                f"{self._where}: {self.name}.g_idx: columns belong to groups out of order (GPTQ with desc_act), which is not "
                "supported; get a checkpoint quantised without desc_act, or with static groups, or a GGUF file"
            )

    def _words(self, part: str) -> NDArray[np.uint32]:
        return self._integers(part).reshape(self._parts[part][1].shape)

    def _integers(self, part: str) -> NDArray[np.uint32]:
        file, tensor = self._parts[part]
        if tensor.dtype != "I32":
            raise UnsupportedModelError(
                f"{file.path}: tensor {tensor.name} is of type {tensor.dtype}, not I32; get the original checkpoint or a GGUF file"
            )
        return file.read_bytes(tensor).view("<u4")

    def _misfit(self, part: str) -> ModelError:
        shape = list(self._parts[part][1].shape)
        return ModelError(f"{self._where}: {self.name}.{part} has the shape {shape}, which does not fit; fetch it again")


def _nibbles_down(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """[n, m] words to [8 n, m] codes, the lowest nibble first: GPTQ's weights."""
    import numpy as np

    out = np.empty((words.shape[0], _PER_WORD, words.shape[1]), np.uint8)
    for i in range(_PER_WORD):
        out[:, i] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(-1, words.shape[1])


def _nibbles_across(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """[n, m] words to [n, 8 m] codes, the lowest nibble first: GPTQ's zeros."""
    import numpy as np

    out = np.empty((*words.shape, _PER_WORD), np.uint8)
    for i in range(_PER_WORD):
        out[:, :, i] = (words >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def _awq_columns(words: NDArray[np.uint32], begin: int, end: int) -> NDArray[np.uint8]:
    """Columns [begin, end) of [n, m] words of eight columns in AWQ's order: [n, end - begin] codes."""
    import numpy as np

    first, last = begin // _PER_WORD, -(-end // _PER_WORD)
    block = words[:, first:last]
    out = np.empty((*block.shape, _PER_WORD), np.uint8)
    for i, column in enumerate(_AWQ_ORDER):
        out[:, :, column] = (block >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)[:, begin - first * _PER_WORD : end - first * _PER_WORD]
