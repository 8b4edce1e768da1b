"""Reads a packed model back with the official safetensors package, written from models/format.md alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_packed(directory: Path) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, Any]]]:
    """Tensors as float32 (matrices [rows, cols], parts apart), and the layouts of the matrices. Rows that are stored by
    neuron come in the order of panels: 64 of gate, 64 of up ..."""
    from safetensors import safe_open
    from sparse_run import _core

    tensors: dict[str, NDArray[Any]] = {}
    layouts: dict[str, dict[str, Any]] = {}
    with safe_open(directory / "weights.safetensors", framework="np") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - not a mapping
            blob = file.get_tensor(name)
            if name.startswith("__pad__."):
                assert not blob.any()
                continue
            if f"layout:{name}" not in metadata:
                assert blob.dtype == np.float32
                tensors[name] = blob
                continue
            m = layouts[name] = json.loads(metadata[f"layout:{name}"])
            assert blob.dtype == np.uint8 and m["version"] == (2 if m["layout"] == "neurons" or "superblock" in m else 1)
            group, has_min, superblock = m.get("group", 32), m.get("min", False), m.get("superblock", 0)
            if m["layout"] == "neurons":
                rows = _core.unpack_neurons(m["kind"], blob, m["neurons"], m["cols"], group, has_min, m["gated"])
                each = 2 if m["gated"] else 1
                blocks = rows.reshape(-1, 64, each, m["cols"]).transpose(0, 2, 1, 3)
                tensors[name] = blocks.reshape(rows.shape)
                continue
            assert m["layout"] == "panels"
            out, at, padded = [], 0, -(-m["rows"] // 64) * 64
            for row in range(0, padded, m["panel_rows"]):
                n = min(m["panel_rows"], padded - row)
                size = _core.panel_bytes(m["kind"], n, m["cols"], group, has_min, superblock)
                out.append(_core.unpack_panel(m["kind"], blob[at : at + size], n, m["cols"], group, has_min, superblock))
                at += size
            assert at == blob.size
            rows = np.concatenate(out)
            assert not rows[m["rows"] :].any(), "padding rows are zero"
            tensors[name] = rows[: m["rows"]]
    return tensors, layouts


def tensor_offsets(directory: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in the file, [begin, end)."""
    with open(directory / "weights.safetensors", "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    return {name: (8 + length + e["data_offsets"][0], 8 + length + e["data_offsets"][1]) for name, e in header.items()}
