"""`sparse-run list`: the models on this machine, and those that are known by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from .common import json_option, print_json


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show known names, pulled files and packed models, with sizes and dates."""
    from ..registry import models_dir, packed_dir

    known, pulled, packed = _known(), _pulled(), _packed()
    if as_json:
        print_json(
            {
                "known": known,
                "pulled": pulled,
                "packed": packed,
                "models_dir": str(models_dir()),
                "packed_dir": str(packed_dir()),
            }
        )
        return
    rows = [(k["name"], k["title"], _mb(k["bytes"]), "here" if k["pulled"] else "not pulled yet") for k in known]
    click.echo("Known by name (sparse-run pull NAME)")
    _table(rows)
    click.echo(f"\nPulled, in {models_dir()}")
    _table([(p["name"], _mb(p["bytes"]), p["date"]) for p in pulled])
    click.echo(f"\nPacked, in {packed_dir()}")
    _table([(p["key"], p["name"], _mb(p["bytes"]), p["date"], p["source"]) for p in packed])


def _known() -> list[dict[str, Any]]:
    from ..registry import DEFAULT_MODEL, KNOWN, models_dir

    return [
        {
            "name": m.name,
            "title": m.title,
            "license": m.license,
            "bytes": m.size,
            "default": m.name == DEFAULT_MODEL,
            "pulled": (models_dir() / m.file).is_file(),
        }
        for m in KNOWN.values()
    ]


def _pulled() -> list[dict[str, Any]]:
    from ..registry import pulled_models

    return [
        {"name": name, "path": str(path), "bytes": _bytes(path), "date": _date(path)} for name, path in pulled_models()
    ]


def _packed() -> list[dict[str, Any]]:
    import json

    from ..registry import packed_models, read_source

    out = []
    for path in packed_models():
        try:
            name = str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("name", ""))
        except (OSError, ValueError, AttributeError):
            name = "(damaged)"
        source = str(read_source(path).get("path", ""))
        out.append(
            {
                "key": path.name,
                "name": name,
                "path": str(path),
                "bytes": _bytes(path),
                "date": _date(path),
                "source": source,
            }
        )
    return out


def _bytes(path: Path) -> int:
    """Size of a file, or of the files in a directory; 0 where a link leads nowhere."""
    try:
        return sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def _date(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).isoformat(sep=" ", timespec="minutes")
    except OSError:
        return "missing"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        click.echo("  none")
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
