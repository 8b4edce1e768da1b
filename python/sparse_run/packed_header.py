"""What a packed model's files say before any weight is read: which matrices each site feeds, how large they are, and a
fingerprint by which files made for this model know it again."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError, UsageError

SITES = ("A", "O", "M", "Z")
"""Attention input (q, k, v), attention output (o), FFN input (gate, up), FFN product (down)."""

ROW_SITES = ("N", "G")
"""Of an FFN stored by neuron: neurons that are named, and neurons whose gate says that they are needed."""

_MATRICES = {"attn_qkv": "A", "attn_o": "O", "ffn_gate_up": "M", "ffn_up": "M", "ffn_down": "Z"}
_SHAPE_KEYS = ("architecture", "n_layers", "n_embd", "n_heads", "n_kv_heads", "head_dim", "n_ff", "n_vocab")
_SAMPLE = 4096


@dataclass(frozen=True)
class Part:
    """One stored part of a matrix: name, bytes [begin, end) of the file, and its layout record (models/format.md)."""

    name: str
    begin: int
    end: int
    layout: dict[str, Any]

    @property
    def quantised(self) -> bool:
        return str(self.layout["kind"]).startswith("q")


@dataclass(frozen=True)
class PackedHeader:
    """A packed model without its weights."""

    path: Path
    config: dict[str, Any]
    parts: dict[str, list[list[Part]]]
    """Site -> layer -> parts of the matrices that the site feeds."""
    fingerprint: str
    """sha256 over config.json, the weight file's header and size, and its first and last 4 KiB of weights."""
    shape: str
    """Architecture and sizes, for telling another model from another quantisation of this one."""
    quantisation: str
    """Kinds of the layers' matrices and how many there are of each, such as "q4 x 120"."""

    @property
    def n_layers(self) -> int:
        return int(self.config["n_layers"])

    def width(self, site: str) -> int:
        """Length of a site's vector."""
        c = self.config
        if site == "O":
            return int(c["n_heads"]) * int(c["head_dim"])
        return int(c["n_ff"] if site in ("Z", "G") else c["n_embd"])

    def need_neurons(self, method: str) -> None:
        """Raises UsageError, with the way to convert it, where the FFN is stored by columns, so that no neuron can be skipped."""
        if all(part.layout["layout"] == "neurons" for layer in self.parts["M"] for part in layer):
            return
        raise UsageError(
            f"{method} skips neurons, and this model's FFN is stored in the layout panels; convert it with "
            "`sparse-run convert --layout neurons`"
        )

    def site_bytes(self, site: str, layer: int) -> int:
        """Bytes of the matrices that a site feeds."""
        return sum(part.end - part.begin for part in self.parts[site][layer])

    def maskable(self, site: str, layer: int) -> bool:
        """Whether the site's columns can be skipped: all its matrices are quantised and stored by column."""
        parts = self.parts[site][layer]
        return bool(parts) and all(part.quantised and part.layout["layout"] == "panels" for part in parts)


def read_header(packed: str | Path) -> PackedHeader:
    """Reads the header of a packed model directory. Raises ModelError where its files are missing or damaged."""
    path = Path(packed)
    weights = path / "weights.safetensors"
    try:
        config_bytes = (path / "config.json").read_bytes()
        config = json.loads(config_bytes)
        with weights.open("rb") as file:
            size = weights.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= size - 8:
                raise ValueError("the header's length is wrong")
            raw = file.read(length)
            header = json.loads(raw)
            first = file.read(_SAMPLE)
            file.seek(max(0, size - _SAMPLE))
            last = file.read(_SAMPLE)
        metadata = header.pop("__metadata__")
        n_layers = int(config["n_layers"])
        parts: dict[str, list[list[Part]]] = {site: [[] for _ in range(n_layers)] for site in SITES}
        kinds: Counter[str] = Counter()
        for name, entry in header.items():
            words = name.split(".")
            layout = metadata.get(f"layout:{name}")
            if layout is None or words[0] != "layers" or words[2] not in _MATRICES:
                continue
            begin, end = entry["data_offsets"]
            part = Part(name, 8 + length + begin, 8 + length + end, json.loads(layout))
            parts[_MATRICES[words[2]]][int(words[1])].append(part)
            kinds[str(part.layout["kind"])] += 1
    except (OSError, ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise ModelError(f"{path} is no readable packed model ({error}); convert it again") from None
    for layers in parts.values():
        for of_layer in layers:
            of_layer.sort(key=lambda part: [int(w) if w.isdigit() else 0 for w in part.name.split(".")])
    digest = hashlib.sha256()
    for piece in (config_bytes, raw, str(size).encode(), first, last):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return PackedHeader(
        path=path,
        config=config,
        parts=parts,
        fingerprint=digest.hexdigest(),
        shape=json.dumps([config.get(key) for key in _SHAPE_KEYS]),
        quantisation=", ".join(f"{kind} x {count}" for kind, count in sorted(kinds.items())),
    )
