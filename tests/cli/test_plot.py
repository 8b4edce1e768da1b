"""Pictures are real images that hold the data; without matplotlib there is one line that says what to install."""

from __future__ import annotations

import json
import struct
import subprocess
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparse_run import pictures
from sparse_run.errors import UsageError

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]

TABLE: dict[str, Any] = {
    "schema": 1,
    "model": "SmolLM2",
    "dense": {"perplexity": 22.5, "tokens_per_s": 200.0},
    "rows": [
        {"method": "teal", "name": "uniform-0.25", "perplexity": 23.5, "tokens_per_s": 230.0, "levels": {"A": [0.25] * 6, "Z": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}},
        {"method": "teal", "name": "uniform-0.50", "perplexity": 35.3, "tokens_per_s": 261.0},
        {"method": "griffin", "name": "griffin-0.50", "perplexity": 41.0, "tokens_per_s": 240.0},
    ],
}  # fmt: skip
PEER = [
    {"engine": "llama.cpp", "model": "Q4_1.gguf", "perplexity": 22.7},
    {"engine": "llama.cpp", "model": "Q4_1.gguf", "decode_median": 88.0},
    {"engine": "llama.cpp", "model": "no-speed.gguf", "perplexity": 30.0},
]
REPORT: dict[str, Any] = {
    "recall": 0.95, "density": 0.3, "active": 0.12,
    "curve": [{"recall": 0.9, "density": 0.2}, {"recall": 0.99, "density": 0.5}],
    "layers": [
        {"layer": i, "recall": 0.94 + 0.01 * i, "density": 0.3, "active": 0.12, "previous_token_recall": 0.4,
         "previous_token_density": 0.12}
        for i in range(3)
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def matplotlib(need: Callable[[str], Any]) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need("matplotlib is not installed")


def png_pixels(path: Path) -> tuple[int, int, int]:
    """Width and height from the header, and how many different bytes the decompressed pixels have: a blank has few."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, width, height, body = 8, 0, 0, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, chunk = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + chunk) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        if kind == b"IHDR":
            width, height = struct.unpack(">II", chunk[:8])
        if kind == b"IDAT":
            body += chunk
        at += 12 + length
    return width, height, len(set(zlib.decompress(body)))


def svg_texts(path: Path) -> tuple[ET.Element, list[str]]:
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    return root, ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")]


def marks(root: ET.Element, gid: str) -> list[tuple[float, float]]:
    """Where the markers of a line are."""
    (group,) = [e for e in root.iter() if e.get("id") == gid]
    return [(float(e.get("x", "0")), float(e.get("y", "0"))) for e in group.iter() if e.tag.endswith("}use")]


def test_frontier_and_density_from_a_table(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    (tmp_path / "peer.json").write_text("\n".join(json.dumps(entry) for entry in PEER))
    out = tmp_path / "pictures"
    done = run_cli(
        "plot", "--table", tmp_path / "table.json", "--peer", tmp_path / "peer.json", "-o", out, "--json", timeout=300
    )
    assert done.returncode == 0, done.stderr
    wanted = [out / f"{name}.{kind}" for name in ("frontier", "density") for kind in ("png", "svg")]
    assert json.loads(done.stdout)["files"] == [str(path) for path in wanted]
    for path in wanted[::2]:
        width, height, values = png_pixels(path)
        assert width > 500 and height > 200 and values > 20

    root, texts = svg_texts(out / "frontier.svg")
    for text in ("uniform-0.25", "uniform-0.50", "griffin-0.50", "Q4_1.gguf", "teal", "griffin", "llama.cpp", "dense"):
        assert text in texts, text
    assert any("SmolLM2" in text for text in texts) and not any("no-speed" in text for text in texts)
    # Better quality is lower, faster is further right; an SVG's y grows downwards.
    (x25, y25), (x50, y50) = marks(root, "line-teal")
    assert x25 < x50 and y25 > y50
    ((x, y),) = marks(root, "line-griffin")
    assert x25 < x < x50 and y < y50
    ((peer, _),) = marks(root, "line-peer")
    assert peer < x25
    # Linear in speed.
    assert (x - x25) / (x50 - x25) == pytest.approx((240 - 230) / (261 - 230), abs=1e-3)

    _, texts = svg_texts(out / "density.svg")
    assert "A" in texts and "Z" in texts and "layer" in texts
    assert any(t.startswith("uniform-0.25: 70% kept") for t in texts), texts


def test_the_same_figures_make_the_same_svg(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    for name in ("a", "b"):
        pictures.draw(pictures.of_table(tmp_path / "table.json"), tmp_path / name, ["svg"])
    assert (tmp_path / "a" / "frontier.svg").read_bytes() == (tmp_path / "b" / "frontier.svg").read_bytes()


def test_predictors_are_drawn_with_their_baseline(tmp_path: Path) -> None:
    written = pictures.draw(pictures.Figures(predictors={"dejavu: neurons": REPORT}, model="opt"), tmp_path)
    assert [p.name for p in written] == ["predictor.png", "predictor.svg"]
    _, texts = svg_texts(tmp_path / "predictor.svg")
    assert "dejavu: neurons, the previous token's set" in texts and "dejavu: neurons, needed: 12.0%" in texts
    assert png_pixels(tmp_path / "predictor.png")[2] > 20


def test_nothing_to_draw_and_what_is_no_table(run_cli: RunCli, tmp_path: Path, stories_gguf: Path) -> None:
    out = tmp_path / "out"
    none = run_cli("plot", "-m", stories_gguf, "-o", out, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert none.returncode == 2 and "nothing to draw" in none.stderr and not out.exists()
    for text in ("{", "[]", '{"rows": 3}'):
        (tmp_path / "bad.json").write_text(text)
        done = run_cli("plot", "--table", tmp_path / "bad.json", "-o", out)
        assert done.returncode == 2 and "bad.json" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not out.exists()
    with pytest.raises(UsageError, match="no entry has"):
        pictures.of_peer(_write(tmp_path / "peer.json", '[{"name": "x"}]'))
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path / "data")}
    unnamed = run_cli("plot", "-o", out, env=home)  # and the default model is not fetched for it
    assert unnamed.returncode == 2 and "-m MODEL" in unnamed.stderr and "--table FILE" in unnamed.stderr
    named = run_cli("plot", "-m", "smollm2-135m", "-o", out, env=home)
    assert named.returncode == 4 and "smollm2-135m" in named.stderr
    assert not out.exists() and not (tmp_path / "data").exists()
    missing = run_cli("plot", "--table", tmp_path / "none.json")
    assert missing.returncode == 2 and "cannot be read" in missing.stderr


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_matplotlib_one_line_says_what_to_install(run_cli: RunCli, tmp_path: Path) -> None:
    fake = tmp_path / "path" / "matplotlib"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('not here')")
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    import os

    path = os.pathsep.join([str(fake.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_cli("plot", "--table", tmp_path / "table.json", "-o", tmp_path, env={"PYTHONPATH": path})
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0 and "pip install 'sparse-run[plot]'" in done.stderr
    assert not list(tmp_path.glob("*.png"))
