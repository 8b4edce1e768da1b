"""Pictures of what sparsity costs and brings, from sparsity files and measured tables: quality against speed, density by
layer and site, and what predictors find. matplotlib draws them; it is an extra (`plot`) and imported only here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .sparsity import SparsityFile

FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Point:
    """One run: perplexity against decoded tokens a second. `line`: what it is drawn with, such as "teal"."""

    line: str
    name: str
    perplexity: float
    tokens_per_s: float


@dataclass
class Figures:
    """What there is to draw."""

    points: list[Point] = field(default_factory=list)
    dense: list[Point] = field(default_factory=list)
    peers: list[Point] = field(default_factory=list)
    densities: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Name of a file -> site -> share of inputs kept, one a layer."""
    predictors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> report of one kind of predictor (predictors/dejavu)."""
    model: str = ""


def of_files(files: Sequence[SparsityFile]) -> Figures:
    """What sparsity files of one model say."""
    out = Figures()
    for file in files:
        out.model = out.model or file.model_name
        q = file.quality
        variant = str(file.options.get("allocation") or "")
        line = file.method if variant in ("", "uniform", file.method) else f"{file.method} {variant}"
        point = _point(line, file.name, q.get("perplexity"), q.get("tokens_per_s"))
        if point is not None:
            out.points.append(point)
        dense = _point("dense", "dense", q.get("perplexity_dense"), q.get("tokens_per_s_dense"))
        if dense is not None:
            out.dense.append(dense)
        kept = {site: [1 - level for level in levels] for site, levels in file.levels.items() if any(levels)}
        if kept:
            out.densities[file.name] = kept
        for what in ("neurons", "heads"):
            if file.method == "dejavu" and isinstance(q.get(what), dict):
                out.predictors[f"{file.name}: {what}"] = q[what]
    return out


def of_table(path: str | Path) -> Figures:
    """What a table of measurements says: JSON `{"schema": 1, "model", "dense": {...}, "rows": [{"method", "name",
    "perplexity", "tokens_per_s", "levels"?}]}`, as tests/bench/sparsity_table.py writes it. Raises UsageError for another."""
    data = _read(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: no table of measurements (an object with \"rows\"); see tests/bench/sparsity_table.py")
    out = Figures(model=str(data.get("model") or ""))
    dense = data.get("dense") if isinstance(data.get("dense"), dict) else {}
    found = _point("dense", "dense", dense.get("perplexity"), dense.get("tokens_per_s"))
    if found is not None:
        out.dense.append(found)
    for row in rows:
        line, name = str(row.get("method") or "sparse"), str(row.get("name") or row.get("file") or "")
        if row.get("allocation") not in (None, "uniform", line):
            line = f"{line} {row['allocation']}"
        if str(row.get("method")) == "dense":
            found = _point("dense", "dense", row.get("perplexity"), row.get("tokens_per_s"))
            out.dense += [found] if found is not None else []
            continue
        found = _point(line, name, row.get("perplexity"), row.get("tokens_per_s"))
        if found is not None:
            out.points.append(found)
        levels = row.get("levels")
        if isinstance(levels, dict):
            kept = {str(site): [1 - float(v) for v in values] for site, values in levels.items() if any(values)}
            if kept:
                out.densities[name or line] = kept
    return out


def of_peer(path: str | Path) -> list[Point]:
    """Another engine's files of the same model: JSON, one object or list or one object a line, of {"model" or "name",
    "perplexity", "tokens_per_s" or "decode_median"}; objects of one name are put together, so that speed and perplexity may
    come from two runs. Raises UsageError where no name has both."""
    data = _read(path, lines=True)
    if isinstance(data, dict):
        data = data.get("points") or data.get("rows") or [data]
    merged: dict[str, dict[str, Any]] = {}
    for entry in data if isinstance(data, list) else []:
        if isinstance(entry, dict) and (entry.get("name") or entry.get("model")):
            merged.setdefault(str(entry.get("name") or entry.get("model")), {}).update(entry)
    out = []
    for name, entry in merged.items():
        point = _point(
            str(entry.get("engine") or "peer"),
            name,
            entry.get("perplexity"),
            entry.get("tokens_per_s", entry.get("decode_median")),
        )
        if point is not None:
            out.append(point)
    if not out:
        raise UsageError(f"{path}: no entry has a name, a perplexity and tokens a second")
    return out


def joined(parts: Sequence[Figures]) -> Figures:
    """Several sources as one."""
    out = Figures()
    for part in parts:
        out.points += part.points
        out.dense += part.dense
        out.peers += part.peers
        out.densities |= part.densities
        out.predictors |= part.predictors
        out.model = out.model or part.model
    return out


def _read(path: str | Path, *, lines: bool = False) -> Any:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a JSON file") from None
    try:
        return json.loads(text)
    except ValueError as error:
        if lines:
            try:
                return [json.loads(line) for line in text.splitlines() if line.strip()]
            except ValueError:
                pass
        raise UsageError(f"{path}: not JSON ({error}); give a JSON file") from None


def _point(line: str, name: str, perplexity: Any, rate: Any) -> Point | None:
    import math

    numbers = (perplexity, rate)
    if not all(isinstance(v, (int, float)) and math.isfinite(v) and v > 0 for v in numbers):
        return None
    return Point(line, name, float(perplexity), float(rate))


# Drawing


def load_matplotlib() -> Any:
    """matplotlib, drawing without a display. Raises UsageError, which names the extra, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "drawing needs matplotlib, which is not installed; install it with `pip install 'sparse-run[plot]'`"
        ) from None
    matplotlib.use("Agg")
    # Text stays text in SVG, and the same figures make the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sparse-run", "font.size": 9.0})
    return matplotlib


def draw(figures: Figures, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draws what there are figures for: frontier, density, predictor; returns the files written."""
    load_matplotlib()
    made = [
        (name, make(figures))
        for name, make, there in (
            ("frontier", frontier, figures.points or figures.peers),
            ("density", density, figures.densities),
            ("predictor", predictor, figures.predictors),
        )
        if there
    ]
    if not made:
        raise UsageError(
            "nothing to draw: no sparsity file with measured quality, and no table; make one with `sparse-run calibrate`, "
            "or give --table FILE"
        )
    out = []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in made:
        for kind in formats:
            path = Path(folder) / f"{name}.{kind}"
            figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            out.append(path)
    return out


def frontier(figures: Figures) -> Any:
    """Perplexity against tokens a second: one line a method, dense runs as a star, another engine's files beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    dense = _middle(figures.dense)
    lines: dict[str, list[Point]] = {}
    for point in figures.points:
        lines.setdefault(point.line, []).append(point)
    colours = _colours(len(lines))
    for colour, (line, points) in zip(colours, lines.items(), strict=True):
        points = sorted(points, key=lambda p: p.perplexity)
        (drawn,) = axes.plot(
            [p.tokens_per_s for p in points], [p.perplexity for p in points], "o-", color=colour, label=line, lw=1.2, ms=5
        )
        drawn.set_gid(f"line-{line}")
        for p in points:
            axes.annotate(p.name, (p.tokens_per_s, p.perplexity), (4, 4), textcoords="offset points", fontsize=7)
    if dense is not None:
        axes.plot([dense.tokens_per_s], [dense.perplexity], "*", color="black", ms=13, label="dense", ls="none")
    if figures.peers:
        points = sorted(figures.peers, key=lambda p: p.tokens_per_s)
        (drawn,) = axes.plot(
            [p.tokens_per_s for p in points],
            [p.perplexity for p in points],
            "s--",
            color="0.45",
            label=points[0].line,
            lw=1,
            ms=5,
        )
        drawn.set_gid("line-peer")
        for p in points:
            axes.annotate(
                p.name, (p.tokens_per_s, p.perplexity), (4, -9), textcoords="offset points", fontsize=7, color="0.35"
            )
    values = [p.perplexity for p in [*figures.points, *figures.peers, *figures.dense]]
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("decoded tokens per second (right is faster)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(f"Quality against speed{': ' + figures.model if figures.model else ''}")
    axes.margins(x=0.12, y=0.08)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def density(figures: Figures) -> Any:
    """A heat map a file: the share of inputs kept, by site and layer."""
    import numpy as np
    from matplotlib.figure import Figure

    names = list(figures.densities)
    heights = [len(figures.densities[name]) for name in names]
    figure = Figure(figsize=(8, 1.2 + 0.75 * len(names) + 0.28 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(names), 1, squeeze=False, height_ratios=heights)
    image: Any = None
    for axes, name in zip(grid[:, 0], names, strict=True):
        kept = figures.densities[name]
        sites = list(kept)
        width = max(len(kept[site]) for site in sites)
        values = np.full((len(sites), width), np.nan)
        for k, site in enumerate(sites):
            values[k, : len(kept[site])] = kept[site]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(sites)), sites)
        mean = float(np.nanmean(values))
        axes.set_title(f"{name}: {mean:.0%} kept in the mean", fontsize=9)
    grid[-1, 0].set_xlabel("layer")
    figure.colorbar(image, ax=grid[:, 0].tolist(), label="share of inputs kept (1 = dense)")
    return figure


def predictor(figures: Figures) -> Any:
    """Recall against density: each predictor's curve, its layers, and the set of the previous token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, report) in zip(_colours(len(figures.predictors)), figures.predictors.items(), strict=True):
        curve = sorted(report.get("curve", []), key=lambda p: float(p["density"]))
        if curve:
            (drawn,) = axes.plot(
                [p["density"] for p in curve], [p["recall"] for p in curve], "-", color=colour, label=name, lw=1.5
            )
            drawn.set_gid(f"curve-{name}")
        layers = report.get("layers", [])
        axes.plot(
            [row["density"] for row in layers],
            [row["recall"] for row in layers],
            "o",
            color=colour,
            alpha=0.5,
            ms=4,
            label=f"{name}, each layer as chosen",
        )
        axes.plot(
            [row["previous_token_density"] for row in layers],
            [row["previous_token_recall"] for row in layers],
            "x",
            color=colour,
            alpha=0.7,
            ms=5,
            label=f"{name}, the previous token's set",
        )
        if "active" in report:
            axes.axvline(report["active"], color=colour, lw=0.8, ls=":", label=f"{name}, needed: {report['active']:.1%}")
    axes.plot([0, 1], [0, 1], color="0.7", lw=1, ls="--", label="chance")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("density: share predicted to be needed")
    axes.set_ylabel("recall: share of the needed that is predicted")
    axes.set_title(f"Predictors{': ' + figures.model if figures.model else ''}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


def _middle(points: list[Point]) -> Point | None:
    """One dense point of several measurements: the medians."""
    import statistics

    if not points:
        return None
    return Point(
        "dense",
        "dense",
        statistics.median(p.perplexity for p in points),
        statistics.median(p.tokens_per_s for p in points),
    )


def _colours(n: int) -> list[Any]:
    import matplotlib

    palette = matplotlib.colormaps["tab10"]
    return [palette(i % 10) for i in range(n)]
