"""From which density on skipping columns, or rows of neurons, does not pay: measured on this machine with the shapes of a
model's matrices, and kept in $XDG_CACHE_HOME/sparse-run/breakeven-CPU.json, where running models look it up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..packed_header import ROW_SITES, SITES, read_header

DENSITIES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.1)
SCHEMA = 1


@dataclass(frozen=True)
class ShapeBreakEven:
    """One shape of matrix, and the sites whose vectors it is multiplied with. Of rows of neurons: site N or G, `rows` neurons
    of `cols` inputs, no panels."""

    sites: list[str]
    kind: str
    group: int
    has_min: bool
    rows: int
    cols: int
    panel_rows: int
    gain: list[float]
    """Dense time over skipping time at `DENSITIES`: medians of the turns' ratios."""
    break_even: float
    """Largest density at which skipping is not slower; 0 where it always is, 1 where it never is."""


@dataclass(frozen=True)
class BreakEvenResult:
    cpu: str
    isa: str
    threads: int
    model: str
    fingerprint: str
    reps: int
    densities: list[float]
    shapes: list[ShapeBreakEven]
    break_even: float
    """The smallest of the shapes'."""
    version: str
    cache: str = ""
    """Where it was kept; empty where it could not be."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_break_even(
    packed: str | Path,
    threads: int | None = None,
    *,
    reps: int = 9,
    progress: Callable[[str, int, int], None] | None = None,
) -> BreakEvenResult:
    """Measures every shape of a packed model's maskable matrices, seconds each, and keeps the result.

    Raises ModelError where the model cannot be read or none of its columns can be skipped, BudgetError without memory."""
    from .. import __version__, _core
    from .gather import bench_memory, selected_isa

    header = read_header(packed)
    sites: dict[tuple[Any, ...], set[str]] = {}
    for site in SITES:
        for layer in header.parts.get(site, []):
            for part in layer:
                p = part.layout
                if part.quantised and p["layout"] == "panels":
                    shape = (p["kind"], p["group"], bool(p["min"]), p["rows"], p["cols"], p["panel_rows"])
                    key = (*shape, site != "M", p.get("superblock", 0))
                    sites.setdefault(key, set()).add(site)
    by_neuron = {
        (p["kind"], p["group"], bool(p["min"]), p["neurons"], p["cols"], bool(p["gated"]))
        for layer in header.parts["M"]
        for part in layer
        if part.quantised and (p := part.layout)["layout"] == "neurons"
    }
    name = str(header.config.get("name") or header.path.name)
    if not sites and not by_neuron:
        raise ModelError(f"{packed}: {name} has no quantised matrices in panels, so no columns can be skipped")
    memory, threads = bench_memory(threads)
    shapes = []
    total = (len(sites) + len(by_neuron)) * reps
    for done, key in enumerate(sites):
        ratios: list[list[float]] = [[] for _ in DENSITIES]
        for turn in range(reps):
            if progress is not None:
                progress("matrices", done * reps + turn, total)
            for i, density in enumerate(DENSITIES):
                t = memory.columns(*key[:-2], density, shared_columns=key[-2], superblock=key[-1])
                ratios[i].append(t["dense_seconds"] / t["sparse_seconds"])
        gain = [statistics.median(r) for r in ratios]
        shapes.append(ShapeBreakEven(sorted(sites[key], key=SITES.index), *key[:-2], gain, crossing(DENSITIES, gain)))
    for turns, rows in enumerate(sorted(by_neuron), len(sites)):
        gains: dict[str, list[list[float]]] = {site: [[] for _ in DENSITIES] for site in ROW_SITES}
        for turn in range(reps):
            if progress is not None:
                progress("matrices", turns * reps + turn, total)
            for i, density in enumerate(DENSITIES):
                t = memory.rows(*rows, density)
                for site, way in zip(ROW_SITES, ("listed_seconds", "gated_seconds"), strict=True):
                    gains[site][i].append(t["dense_seconds"] / t[way])
        for site in ROW_SITES if rows[-1] else ROW_SITES[:1]:
            gain = [statistics.median(r) for r in gains[site]]
            shapes.append(ShapeBreakEven([site], *rows[:-1], 0, gain, crossing(DENSITIES, gain)))
    if progress is not None:
        progress("matrices", total, total)
    result = BreakEvenResult(
        cpu=str(_core.cpu_info()["brand"]),
        isa=selected_isa(),
        threads=threads,
        model=name,
        fingerprint=header.fingerprint,
        reps=reps,
        densities=list(DENSITIES),
        shapes=shapes,
        break_even=min(s.break_even for s in shapes),
        version=__version__,
    )
    return _keep(result)


def crossing(densities: Sequence[float], gain: Sequence[float]) -> float:
    """The density at which the gain, made to rise as density falls, reaches 1. densities: falling.

    >>> crossing([1.0, 0.8, 0.6], [0.9, 1.1, 1.3])
    0.9
    """
    smooth = rising(gain)
    if smooth[0] >= 1:
        return densities[0]
    for i in range(1, len(smooth)):
        if smooth[i] >= 1:
            part = (1 - smooth[i - 1]) / (smooth[i] - smooth[i - 1])
            return round(densities[i - 1] + part * (densities[i] - densities[i - 1]), 4)
    return 0.0


def rising(values: Sequence[float]) -> list[float]:
    """The values made to rise: neighbours that fall are averaged, so that one noisy measurement moves little.

    >>> rising([1.0, 3.0, 2.0])
    [1.0, 2.5, 2.5]
    """
    blocks: list[tuple[float, int]] = []
    for single in values:
        value, n = single, 1
        while blocks and blocks[-1][0] > value:
            other, m = blocks.pop()
            value, n = (value * n + other * m) / (n + m), n + m
        blocks.append((value, n))
    return [value for value, n in blocks for _ in range(n)]


def cache_path(cpu: str | None = None) -> Path:
    """The file that keeps this processor's results."""
    from .. import _core, registry

    name = re.sub(r"[^a-z0-9]+", "-", (cpu or str(_core.cpu_info()["brand"])).lower()).strip("-") or "unknown"
    return registry.packed_dir().parent / f"breakeven-{name}.json"


def known_break_evens(
    fingerprint: str, isa: str, threads: int, sites: tuple[str, ...] = SITES
) -> dict[str, float] | None:
    """The density above which the products of a site run dense, or (`sites` being ROW_SITES) all neurons are read, by site, as
    it was measured on this processor for a model, instruction set and number of threads by this version; None where nothing
    was. Of a site's shapes the smallest counts. Never raises: a damaged cache counts as none."""
    entry = _entry(fingerprint, isa, threads)
    out: dict[str, float] = {}
    try:
        for s in entry["shapes"]:
            value = s["break_even"]
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                return None
            for site in s["sites"]:
                if site in sites:
                    out[site] = min(float(value), out.get(site, 1.0))
    except (KeyError, TypeError, ValueError):
        return None
    return out or None


def known_gains(fingerprint: str, isa: str, threads: int) -> dict[str, tuple[list[float], list[float]]] | None:
    """As `known_break_evens`: the densities that were measured, and the dense time over the skipping time at each, of the
    matrices that each site feeds. Of several shapes at one site the one that takes most bytes counts."""
    entry = _entry(fingerprint, isa, threads)
    out: dict[str, tuple[list[float], list[float]]] = {}
    try:
        for s in sorted(entry["shapes"], key=lambda s: s["rows"] * s["cols"]):
            for site in s["sites"]:
                out[site] = [float(d) for d in entry["densities"]], [max(1e-3, float(g)) for g in s["gain"]]
    except (KeyError, TypeError, ValueError):
        return None
    return out or None


def _entry(fingerprint: str, isa: str, threads: int) -> dict[str, Any]:
    """What this version kept for a model, instruction set and number of threads; empty where that is nothing."""
    from .. import __version__

    entry = _read(cache_path()).get(_key(fingerprint, isa, threads))
    return entry if isinstance(entry, dict) and entry.get("version") == __version__ else {}


def _key(fingerprint: str, isa: str, threads: int) -> str:
    return f"{fingerprint} {isa} {threads}"


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    entries = data.get("models") if isinstance(data, dict) and data.get("schema") == SCHEMA else None
    return entries if isinstance(entries, dict) else {}


def _keep(result: BreakEvenResult) -> BreakEvenResult:
    """Adds the result to the cache: the file is whole or as it was."""
    path = cache_path(result.cpu)
    entries = _read(path)
    entry = result.as_dict()
    del entry["cache"]
    entries[_key(result.fingerprint, result.isa, result.threads)] = entry
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"schema": SCHEMA, "cpu": result.cpu, "models": entries}, out, indent=1)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
        return result
    except BaseException:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
        raise
    return BreakEvenResult(**{**vars(result), "cache": str(path)})
