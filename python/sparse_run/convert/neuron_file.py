"""The file of single neurons beside a packed model's weights (models/format.md): a record for each, the ones that a text uses
most at the beginning, so that a memory budget can keep them, and read the others one by one.

>>> write_neuron_file(Path("model.packed"), None)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..packed_header import PackedHeader, Part, read_header
from .codes import SLAB_COLS, TILE_ROWS, Form
from .layout import ALIGNMENT, PAD_PREFIX, Linear, round_up
from .staging import write_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .writer import ProgressCallback

NEURON_FILE = "neurons.safetensors"
_VERSION = "1"
_LINE = 64
_ORDER_CHUNKS, _CONTEXT = 16, 512  # of the text by which neurons are ordered


def hot_first(packed: Path, text: str, progress: ProgressCallback | None = None) -> NDArray[np.int64]:
    """The neurons of every layer, [n_layers, n_ff], those first that did most for a text (GRIFFIN's statistic). Raises
    UsageError where the text is too short."""
    import numpy as np

    from .. import _core
    from ..tokenizer import Tokenizer
    from .measure import chunks_of

    tokenizer = Tokenizer.load(packed)
    chunks = chunks_of(tokenizer, text, _ORDER_CHUNKS, "the text that --order names", spread=True)
    model = _core.Model(str(packed), 0, True)
    try:
        session = _core.Session(model, chunks.shape[1])
        session.collect("griffin")
        for i, chunk in enumerate(chunks):
            if progress is not None:
                progress("ordering neurons", i, len(chunks))
            session.truncate(0)
            session.eval(chunk)
        return np.argsort(-session.statistic(), axis=1, kind="stable")
    finally:
        model.close()


def write_neuron_file(packed: Path, order: NDArray[np.int64] | None, progress: ProgressCallback | None = None) -> Path:
    """Writes the file, all or nothing, in the order given ([n_layers, n_ff], a permutation of each layer's neurons) or as they
    are. Raises UsageError where the model's FFNs do not allow one, Error where the disk is full or cannot be written."""
    import numpy as np

    header = read_header(packed)
    path, part = packed / NEURON_FILE, packed / f".{NEURON_FILE}.{os.getpid()}"
    n_ff = int(header.config["n_ff"])
    layers = [_Layer(header, i) for i in range(header.n_layers)]
    sizes: dict[str, int] = {}
    for i, layer in enumerate(layers):
        sizes[f"layers.{i}.ffn_records"] = n_ff * layer.stride
        sizes[f"layers.{i}.ffn_positions"] = 4 * n_ff
        sizes[f"layers.{i}.ffn_heads"] = layer.head_bytes
    text, total = _header(sizes)
    try:
        weights = np.memmap(header.path / "weights.safetensors", np.uint8, "r")
        with open(part, "wb") as file:
            file.write(text)
            for i, layer in enumerate(layers):
                if progress is not None:
                    progress("writing neurons", file.tell(), total)
                ids = np.arange(n_ff) if order is None else order[i]
                positions = np.empty(n_ff, "<u4")
                positions[ids] = np.arange(n_ff)
                records, heads = layer.read(weights, n_ff)
                for values in (records[ids], positions, heads):
                    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                    file.write(data.data)
                    file.write(bytes(-len(data) % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise write_error(packed, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


def _header(sizes: dict[str, int]) -> tuple[bytes, int]:
    """The file's beginning, and its length. Tensors begin at multiples of 4096 bytes; what lies between them are tensors, too."""
    entries: dict[str, Any] = {"__metadata__": {"neurons_version": _VERSION}}
    at = 0
    for name, size in sizes.items():
        padding = -size % ALIGNMENT
        pieces = [(name, size), (f"{PAD_PREFIX}{len(entries)}", padding)]
        for tensor, count in pieces:
            if count:
                entries[tensor] = {"dtype": "U8", "shape": [count], "data_offsets": [at, at + count]}
                at += count
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


class _Layer:
    """How the FFN of one layer lies in the weight file, and in its records."""

    def __init__(self, header: PackedHeader, layer: int) -> None:
        rows, down = header.parts["M"][layer], header.parts["Z"][layer]
        why = ""
        if len(rows) != 1 or rows[0].layout["layout"] != "neurons":
            why = "its FFN is stored in the layout panels; convert it with --layout neurons"
        elif len(down) != 1 or not down[0].quantised:
            why = "its ffn_down is not quantised, or in several parts"
        if why:
            raise UsageError(f"{header.path}: no file of single neurons can be made: {why}")
        self.rows: Part = rows[0]
        self.down: Part = down[0]
        r, d = self.rows.layout, self.down.layout
        self.rows_each = 2 if r["gated"] else 1
        self.row = (self.rows.end - self.rows.begin) // (round_up(int(r["neurons"]), TILE_ROWS) * self.rows_each)
        form = Form(str(d["kind"]), int(d["group"]), bool(d["min"]), "superblock" in d)
        self.of_down = Linear(int(d["rows"]), int(d["cols"]), form, int(d["panel_rows"]))
        self.panels = [end - begin for begin, end in self.of_down.panels()]
        self.bits = form.bits
        self.slabs = round_up(self.of_down.cols, SLAB_COLS) // SLAB_COLS
        padded = sum(self.panels)
        self.head_bytes = (self.of_down.units_each + self.slabs * self.of_down.head_each) * padded
        self.bytes = self.rows_each * self.row + padded * self.bits // 8
        whole = round_up(self.bytes, ALIGNMENT)
        # Where little is lost, a neuron is whole blocks of the file: none is read for two.
        self.stride = whole if whole - self.bytes <= self.bytes // 4 else round_up(self.bytes, _LINE)

    def read(self, weights: NDArray[np.uint8], n_ff: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Records [n_ff, stride] in the weights' order, and the scales and minima of down."""
        import numpy as np

        records = np.zeros((n_ff, self.stride), np.uint8)
        blocks = weights[self.rows.begin : self.rows.end].reshape(-1, self.rows_each, TILE_ROWS, self.row)
        at = 0
        for i in range(self.rows_each):
            records[:, at : at + self.row] = blocks[:, i].reshape(-1, self.row)[:n_ff]
            at += self.row
        heads, begin = [], self.down.begin
        for rows in self.panels:
            head, run = self.of_down.head_each * rows, rows * self.bits // 8
            units = self.of_down.units_each * rows
            panel = weights[begin : begin + self.of_down.panel_bytes(rows)]
            slabs = panel[units:].reshape(self.slabs, head + SLAB_COLS * run)
            heads += [panel[:units], slabs[:, :head].reshape(-1)]
            records[:, at : at + run] = slabs[:, head:].reshape(-1, run)[:n_ff]
            at += run
            begin += panel.size
        return records, np.concatenate(heads)


__all__ = ["NEURON_FILE", "hot_first", "write_neuron_file"]
