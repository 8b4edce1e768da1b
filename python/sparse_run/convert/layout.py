"""Where every byte of weights.safetensors lies: a pure function of names, sizes and forms, known before any weight is read.

Tensors begin at multiples of 4096 bytes of the file. The safetensors format allows no holes, so the gaps are tensors of
their own, `__pad__.0`, `__pad__.1` ..., and the header is filled up with spaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..neurons import gives_zeros
from .codes import SLAB_COLS, SUPERBLOCK, TILE_ROWS, Form

ALIGNMENT = 4096
PAD_PREFIX = "__pad__."
LAYOUT_VERSION, PRODUCTS_VERSION, NEURONS_VERSION = 1, 2, 2
MOST_ROWS = 2816  # of a panel

LayoutChoice = Literal["auto", "panels", "neurons"]
"""How the matrices that feed the FFN's neurons are stored."""
LAYOUTS: tuple[LayoutChoice, ...] = get_args(LayoutChoice)


def by_neuron(choice: LayoutChoice, config: Mapping[str, Any]) -> bool:
    """Whether a model's FFN inputs are stored by neuron. `auto`: where the activation gives exact zeros (ReLU, its square,
    FATReLU, dReLU), so that the rows of neurons that are 0 can be passed over."""
    return choice == "neurons" or (choice == "auto" and gives_zeros(config))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below value."""
    return -(-value // multiple) * multiple


def choose_tall_rows(rows: int, cols: int, form: Form) -> int:
    """Rows of a panel for q|k|v, o and down. Where threads share the columns of these (models/format.md), a column should
    be one long run: as few panels as `choose_panel_rows` allows, of which the last may be a narrow one so that runs are
    no power of two apart."""
    from .. import _core

    if not form.quantised or _core.column_stretches(rows, cols) == 1:
        return choose_panel_rows(rows, form)
    padded = round_up(rows, TILE_ROWS)
    if padded > MOST_ROWS:
        return MOST_ROWS
    return padded - TILE_ROWS if padded >= 1024 and padded % 512 == 0 else padded


def choose_panel_rows(rows: int, form: Form, unit: int = TILE_ROWS) -> int:
    """Rows of a panel for a matrix of `rows` rows: at most 2816, so that a column of 4 bits is a run of up to 1.4 KiB
    (longer runs are skipped faster, but read more slowly when nothing is skipped: cpp/kernels/README.md); a border near
    the middle of a large matrix, so that two threads own whole panels; and not a multiple of 512, because runs a power of
    two apart fall on few sets of the caches. A multiple of `unit`, itself a multiple of 64; 64 for float kinds."""
    if not form.quantised:
        return TILE_ROWS
    if rows < 512:
        return round_up(rows, unit)

    def cost(panel: int) -> float:
        middle = rows / 2
        border = max(panel, round(middle / panel) * panel)
        off_middle = abs(border - middle) / middle
        return off_middle + (0.08 if panel % 512 == 0 and rows >= 1024 else 0) + 0.06 * (MOST_ROWS - panel) / MOST_ROWS

    largest = min(MOST_ROWS, round_up(-(-rows // 2) + 2 * unit, unit))
    smallest = min(1024, round_up(-(-rows // 2), unit))
    return min(range(largest, smallest - unit, -unit), key=cost)


@dataclass(frozen=True)
class Linear:
    """A matrix stored in panels. `rows` and `cols` are the true sizes."""

    rows: int
    cols: int
    form: Form
    panel_rows: int

    def panels(self) -> list[tuple[int, int]]:
        """Row ranges [begin, end) of the panels; the last one ends at the padded number of rows."""
        padded = round_up(self.rows, TILE_ROWS)
        return [(at, min(at + self.panel_rows, padded)) for at in range(0, padded, self.panel_rows)]

    def panel_bytes(self, rows: int) -> int:
        """Bytes of a panel of `rows` rows, a multiple of 64."""
        if not self.form.quantised:
            return rows * self.cols * self.form.bits // 8
        slabs, codes = -(-self.cols // SLAB_COLS), SLAB_COLS * rows * self.form.bits // 8
        return rows * self.units_each + slabs * (rows * self.head_each + codes)

    @property
    def head_each(self) -> int:
        """Bytes of scales and minima a row of a slab."""
        return SLAB_COLS // self.form.group * (2 if self.form.has_min else 1) * (1 if self.form.products else 2)

    @property
    def units_each(self) -> int:
        """Bytes of the units of scales and minima a row of a panel, which they begin."""
        return -(-self.cols // SUPERBLOCK) * (2 if self.form.has_min else 1) * 2 if self.form.products else 0

    @property
    def nbytes(self) -> int:
        return sum(self.panel_bytes(end - begin) for begin, end in self.panels())

    def describe(self) -> dict[str, object]:
        """The entry in the file's metadata."""
        entry: dict[str, object] = {
            "layout": "panels",
            "version": PRODUCTS_VERSION if self.form.products else LAYOUT_VERSION,
            "kind": self.form.kind,
            "rows": self.rows,
            "cols": self.cols,
            "panel_rows": self.panel_rows,
        }
        if self.form.quantised:
            entry["group"] = self.form.group
            entry["min"] = self.form.has_min
            if self.form.products:
                entry["superblock"] = SUPERBLOCK
        return entry


@dataclass(frozen=True)
class Neurons:
    """A matrix stored by neuron: in blocks of 64 the gate rows, then the up rows, or up rows alone where not gated."""

    neurons: int
    cols: int
    form: Form
    gated: bool

    @property
    def rows_each(self) -> int:
        return 2 if self.gated else 1

    def records_bytes(self, neurons: int) -> int:
        """Bytes of so many neurons, in whole blocks of 64."""
        slabs, form = round_up(self.cols, SLAB_COLS) // SLAB_COLS, self.form
        if form.quantised:
            row = slabs * SLAB_COLS * form.bits // 8 + slabs * (SLAB_COLS // form.group) * 2 * (2 if form.has_min else 1)
        else:
            row = self.cols * form.bits // 8
        return round_up(neurons, TILE_ROWS) * round_up(row, 64) * self.rows_each

    @property
    def nbytes(self) -> int:
        return self.records_bytes(self.neurons)

    def describe(self) -> dict[str, object]:
        """The entry in the file's metadata."""
        entry: dict[str, object] = {
            "layout": "neurons",
            "version": NEURONS_VERSION,
            "kind": self.form.kind,
            "neurons": self.neurons,
            "cols": self.cols,
            "gated": self.gated,
        }
        if self.form.quantised:
            entry["group"] = self.form.group
            entry["min"] = self.form.has_min
        return entry


@dataclass(frozen=True)
class Plain:
    """A float32 tensor stored as it is."""

    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 4
        for dim in self.shape:
            count *= dim
        return count


TensorSpec = Linear | Neurons | Plain


@dataclass(frozen=True)
class FilePlan:
    """The header's bytes, each tensor's position (bytes from the start of the file), and the size of the whole file."""

    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan_file(tensors: Mapping[str, TensorSpec]) -> FilePlan:
    """The safetensors file that holds these tensors in this order."""
    metadata = {"format": "sparse-run"}
    entries: dict[str, object] = {"__metadata__": metadata}
    relative: dict[str, int] = {}
    at = pads = 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        relative[name] = at
        if not isinstance(tensor, Plain):
            metadata[f"layout:{name}"] = json.dumps(tensor.describe())
            entries[name] = {"dtype": "U8", "shape": [tensor.nbytes], "data_offsets": [at, end]}
        else:
            entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = round_up(end, ALIGNMENT)
        if at != end:
            entries[f"{PAD_PREFIX}{pads}"] = {"dtype": "U8", "shape": [at - end], "data_offsets": [end, at]}
            pads += 1
    text = json.dumps(entries, separators=(",", ":")).encode()
    start = round_up(8 + len(text), ALIGNMENT)
    header = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    return FilePlan(header, {name: start + offset for name, offset in relative.items()}, start + at)
