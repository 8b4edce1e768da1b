"""The columns of stored matrices: their norms, for scores that weigh an input with what it feeds, and their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...packed_header import PackedHeader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def column_norms(header: PackedHeader, site: str, layer: int) -> NDArray[np.float32]:
    """Euclidean norms of the columns of all matrices that a site feeds, together, [width]."""
    import numpy as np

    from ... import _core

    total = np.zeros(header.width(site), np.float64)
    weights = np.memmap(header.path / "weights.safetensors", dtype=np.uint8, mode="r")
    for part in header.parts[site][layer]:
        m = part.layout
        blob, at, padded = weights[part.begin : part.end], 0, -(-int(m["rows"]) // 64) * 64
        form = int(m.get("group", 32)), bool(m.get("min", False)), int(m.get("superblock", 0))
        for row in range(0, padded, int(m["panel_rows"])):
            n = min(int(m["panel_rows"]), padded - row)
            size = _core.panel_bytes(m["kind"], n, m["cols"], *form)
            values = _core.unpack_panel(m["kind"], np.array(blob[at : at + size]), n, m["cols"], *form)
            total += np.square(values, dtype=np.float64).sum(0)
            at += size
    norms: NDArray[np.float32] = np.sqrt(total).astype(np.float32)
    return norms


def column_bytes(header: PackedHeader, site: str, layer: int) -> float:
    """Bytes of the codes of the matrices that a site feeds: what skipping all inputs would save. Scales and minima are read
    whole, whatever is skipped."""
    total = 0.0
    for part in header.parts[site][layer]:
        m = part.layout
        if m["layout"] == "panels" and part.quantised:
            total += -(-int(m["rows"]) // 64) * 64 * int(m["cols"]) * int(m["kind"][1:]) / 8
    return total
