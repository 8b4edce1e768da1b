"""Writes a packed model (models/format.md): weights slice by slice in their final layout, then the small files, then one
rename.

>>> import numpy as np
>>> write_packed("/tmp/m", config, {"output_norm": np.ones(64), "token_embd": ArrayRows(values)})  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from ..errors import Error, UsageError
from .codes import SUPERBLOCK, TILE_ROWS, Codes
from .layout import (
    FilePlan,
    LayoutChoice,
    Linear,
    Neurons,
    Plain,
    TensorSpec,
    by_neuron,
    choose_panel_rows,
    choose_tall_rows,
    plan_file,
)
from .rows import CastRows, PaddedRows, RowSource, floats_of
from .staging import StagedDirectory, write_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
_TALL = re.compile(r"\.(attn_qkv|attn_o|ffn_down)(\.\d+)?$")  # whose columns threads share
WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.json"
SOURCE_FILE = "source.json"

# progress(what, done, total), in bytes; total 0 where it is not known.
ProgressCallback = Callable[[str, int, int], None]
# What to do where the destination exists; see write_packed.
Existing = Literal["refuse", "replace", "keep", "overwrite"]
# A linear matrix by rows, or a plain array that is stored as float32.
TensorData = Union["RowSource", "NDArray[Any]"]

# Rows are decoded in slices of about so many weights, so that the intermediate arrays stay in the caches.
_SLICE_WEIGHTS = 1 << 19
_MOST_THREADS = 4  # more would hold more panels in memory


def write_packed(
    dst: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorData],
    *,
    source: Callable[[], Mapping[str, Any]] | None = None,
    add_files: Callable[[Path], None] | None = None,
    layout: LayoutChoice = "auto",
    existing: Existing = "refuse",
    progress: ProgressCallback | None = None,
    what: str = "packing",
) -> None:
    """Makes the directory `dst` from final tensors (names of models/format.md; `assemble` makes them from parts).

    `config` and what `source()` returns, called after the weights are written, become config.json and source.json;
    `add_files(directory)` puts in what else belongs there (the tokenizer). `source` may still raise and so prevent the
    packed model. `layout` is that of what feeds the FFN's neurons (`layout.by_neuron`).

    What is at `dst` already: `refuse` to touch it, `replace` it if it is a packed model, `keep` it (of processes that make
    the same directory at once the first one wins), or `overwrite` whatever it is.

    Raises Error where the disk is full or the folder cannot be written; nothing remains then.
    """
    dst = Path(dst)
    check_destination(dst, existing)
    neurons = by_neuron(layout, config)
    if neurons:  # whose rows have halves for scales
        tensors = {name: _plain_rows(name, data) for name, data in tensors.items()}
    specs = {name: _spec(name, data, neurons) for name, data in tensors.items()}
    plan = plan_file(specs)
    with StagedDirectory(dst) as staged:
        try:
            if progress is not None:
                progress(what, 0, plan.nbytes)
            if add_files is not None:
                add_files(staged.path)
            with open(staged.path / WEIGHTS_FILE, "wb", buffering=0) as file:
                _write_weights(file.fileno(), plan, specs, tensors, progress, what)
            _write_json(staged.path / CONFIG_FILE, {"format_version": FORMAT_VERSION, **config})
            if source is not None:
                _write_json(staged.path / SOURCE_FILE, {**source(), "weights_bytes": plan.nbytes})
        except OSError as error:
            raise write_error(dst, error) from None
        staged.commit(replace=existing in ("replace", "overwrite"))


def check_destination(dst: Path, existing: Existing) -> None:
    """Raises UsageError where `dst` exists and may not be replaced. An empty directory may."""
    if existing in ("keep", "overwrite") or not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not is_packed(dst):
        raise UsageError(f"{dst} exists and is not a packed model; choose another destination")
    if existing == "refuse":
        raise UsageError(f"{dst} exists already; choose another destination, or replace it with --force")


def add_to_record(packed: Path, key: str, value: Any) -> None:
    """Adds an entry to source.json of a packed model, all or nothing. Raises Error where it cannot be written."""
    path = packed / SOURCE_FILE
    part = packed / f".{SOURCE_FILE}.{os.getpid()}"
    try:
        _write_json(part, {**json.loads(path.read_text(encoding="utf-8")), key: value})
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise write_error(packed, error) from None


def is_packed(path: Path) -> bool:
    """Whether a directory looks like a packed model."""
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def _feeds_neurons(name: str) -> bool:
    return name.endswith(("ffn_gate_up", "ffn_up"))


def _plain_rows(name: str, data: TensorData) -> TensorData:
    import numpy as np

    if isinstance(data, np.ndarray) or not _feeds_neurons(name) or not data.form.products:
        return data
    return CastRows(data, data.form.plain)


def _spec(name: str, data: TensorData, neurons: bool) -> TensorSpec:
    import numpy as np

    if isinstance(data, np.ndarray):
        return Plain(data.shape)
    if neurons and _feeds_neurons(name):
        gated = name.endswith("ffn_gate_up")
        return Neurons(data.rows // (2 if gated else 1), data.cols, data.form, gated)
    if _TALL.search(name):
        return Linear(data.rows, data.cols, data.form, choose_tall_rows(data.rows, data.cols, data.form))
    # gate and up tiles alternate and are used in pairs, which a panel must not cut.
    unit = 2 * TILE_ROWS if name.endswith("ffn_gate_up") else TILE_ROWS
    return Linear(data.rows, data.cols, data.form, choose_panel_rows(data.rows, data.form, unit))


def _write_weights(
    fd: int,
    plan: FilePlan,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, TensorData],
    progress: ProgressCallback | None,
    what: str,
) -> None:
    import numpy as np

    _check_space(fd, plan.nbytes)
    at = _write(fd, plan.header)
    with contextlib.closing(_made(specs, tensors)) as made:
        for name, data in tensors.items():
            spec = specs[name]
            at += _write(fd, bytes(plan.offsets[name] - at))
            if isinstance(spec, Plain):
                values = np.ascontiguousarray(data, dtype="<f4")
                at += _write(fd, values.reshape(-1).data.cast("B"))
                continue
            end = at + spec.nbytes
            while at < end:
                at += _write(fd, next(made))
                if progress is not None:
                    progress(what, at, plan.nbytes)
    _write(fd, bytes(plan.nbytes - at))
    if progress is not None:
        progress(what, plan.nbytes, plan.nbytes)


def _made(
    specs: Mapping[str, TensorSpec], tensors: Mapping[str, TensorData]
) -> Generator[memoryview, None, None]:
    """The bytes of all matrices in the file's order, piece by piece, made by as many threads as there are cores, at most four:
    reading, rounding and packing leave the interpreter free. A piece a thread and one waiting are in memory."""
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    import numpy as np

    from .. import _core

    workers = max(1, min(_MOST_THREADS, _core.default_threads()))
    waiting: deque[Future[memoryview]] = deque()
    pool = ThreadPoolExecutor(workers, "sparse-run-pack")
    try:
        for name, data in tensors.items():
            spec = specs[name]
            if isinstance(spec, Plain):
                continue
            assert not isinstance(data, np.ndarray)
            for piece in _pieces(spec, data):
                waiting.append(pool.submit(piece))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pieces(spec: Linear | Neurons, source: RowSource) -> list[Callable[[], memoryview]]:
    """What makes a matrix's bytes, in order: its panels, or some hundred records at a time."""
    if isinstance(spec, Linear):
        return [partial(_panel, spec, source, begin, end) for begin, end in spec.panels()]
    each = max(1, _SLICE_WEIGHTS // spec.cols // TILE_ROWS) * TILE_ROWS
    return [
        partial(_records, spec, source, first, min(each, spec.neurons - first))
        for first in range(0, spec.neurons, each)
    ]


def _records(spec: Neurons, source: RowSource, first: int, neurons: int) -> memoryview:
    """The bytes of some records. Rows of the source: 64 of gate, 64 of up, and so on where gated."""
    import numpy as np

    from .. import _core

    begin, end = first * spec.rows_each, (first + neurons) * spec.rows_each
    # Row of each record's gate and up in what is read.
    order = np.arange(end - begin).reshape(-1, spec.rows_each, TILE_ROWS).transpose(0, 2, 1).reshape(-1)
    if spec.form.quantised:
        codes = _read_codes(source, begin, end).map(lambda a: a[order])
        packed = _core.pack_neurons(spec.form.kind, codes.codes, codes.scales, codes.mins, spec.form.group, spec.gated)
    else:
        packed = _core.pack_neurons_float(spec.form.kind, floats_of(source.read(begin, end))[order], spec.gated)
    if packed.nbytes != spec.records_bytes(neurons):
        raise Error(f"records of {spec} have {packed.nbytes} bytes; this is a bug of sparse-run, please report it")
    return packed.reshape(-1).data


def _panel(spec: Linear, source: RowSource, begin: int, end: int) -> memoryview:
    """The bytes of rows [begin, end), `end` being a multiple of 64 that may lie beyond the last true row."""
    from .. import _core

    padded = source if end <= source.rows else PaddedRows(source, end, source.cols)
    if spec.form.quantised:
        codes = _read_codes(padded, begin, end)
        packed = _core.pack_panel(
            spec.form.kind, codes.codes, codes.scales, codes.mins, spec.form.group, codes.units, codes.min_units
        )
    else:
        packed = _core.pack_panel_float(spec.form.kind, floats_of(padded.read(begin, end)))
    if packed.nbytes != spec.panel_bytes(end - begin):
        raise Error(f"a panel of {spec} has {packed.nbytes} bytes; this is a bug of sparse-run, please report it")
    return packed.reshape(-1).data


def _read_codes(source: RowSource, begin: int, end: int) -> Codes:
    """Rows [begin, end) of a quantised source, decoded in slices into one set of arrays."""
    import numpy as np

    form, n = source.form, end - begin
    groups, blocks = -(-source.cols // form.group), -(-source.cols // SUPERBLOCK)
    scales = np.empty((n, groups), np.int8 if form.products else np.float16)
    units = np.empty((n, blocks), np.float16) if form.products else None
    whole = Codes(
        form,
        np.empty((n, source.cols), np.uint8),
        scales,
        np.empty_like(scales) if form.has_min else None,
        units,
        np.empty_like(units) if units is not None and form.has_min else None,
    )
    step = max(TILE_ROWS, _SLICE_WEIGHTS // source.cols // TILE_ROWS * TILE_ROWS)
    for at in range(begin, end, step):
        last = min(at + step, end)
        part = source.read(at, last)
        assert isinstance(part, Codes)
        for to, values in zip(whole.arrays, part.arrays):
            if to is not None and values is not None:
                to[at - begin : last - begin] = values
    return whole


def _check_space(fd: int, nbytes: int) -> None:
    """Fails at once rather than after minutes where the disk cannot hold the file."""
    import errno

    if not hasattr(os, "fstatvfs"):
        return
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < nbytes:
        raise OSError(errno.ENOSPC, f"{nbytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free on the disk")


def _write(fd: int, data: bytes | memoryview) -> int:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
