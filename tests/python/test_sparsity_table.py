"""The program that makes the tables of predictors/: one small table end to end, and the page of a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def table(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / "sparsity_table.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=dict(os.environ),
    )


def test_a_table_is_made_stopped_and_continued(smollm2_gguf: Path, shared_dir: Path, tmp_path: Path) -> None:
    data = shared_dir / "data"
    out = tmp_path / "measured"
    words = ["-m", smollm2_gguf, "-o", out, "--calibrate", data / "calibration" / "c4.txt"]
    words += ["--text", data / "text" / "wikitext-2.test.raw", "--tokens", 1024, "--eval-tokens", 1024]
    words += ["--levels", "0.4", "--budgets", "", "--methods", "teal:uniform,griffin:uniform"]
    first = table(*words, "--chunks", 1)
    assert first.returncode == 0, first.stderr
    path = out / "SmolLM2-135M-Instruct.Q4_1.json"
    made: dict[str, Any] = json.loads(path.read_text("utf-8"))
    rows = {(row["method"], row["score"]): row for row in made["rows"]}
    assert set(rows) == {("teal", "abs"), ("teal", "wina"), ("griffin", "abs")}
    assert made["settings"]["chunks"] == 1 and made["command"].startswith("python tests/bench/sparsity_table.py -m SmolLM2")
    for row in rows.values():
        assert row["tokens_scored"] == 255 and 0 < row["kl_mean"] < row["kl_p99"] and 0.4 < row["density"]["body"] < 0.95
        assert row["perplexity"] == pytest.approx(row["perplexity_dense"] * (1 + row["increase"]))
        assert row["bytes_per_token"] < made["dense"]["bytes_per_token"]
    assert made["dense"]["perplexity"] == rows["teal", "abs"]["perplexity_dense"]
    assert rows["griffin", "abs"]["layout"] == "neurons" and rows["teal", "abs"]["layout"] == "panels"
    change, error = rows["teal", "wina"]["against"]["uniform"]
    expected = rows["teal", "wina"]["perplexity"] / rows["teal", "abs"]["perplexity"] - 1
    assert change == pytest.approx(expected, abs=1e-5) and 0 < error < 0.2

    written = {p: p.stat().st_mtime_ns for p in (out / ".work").glob("scores-*")}
    assert len(written) == 3
    questions = ["--choice", data / "choice", "--tasks", "piqa", "--questions", 1]
    second = table(*words, "--chunks", 2, *questions)
    assert second.returncode == 0, second.stderr
    assert all(p.stat().st_mtime_ns == at for p, at in written.items()), "what was measured is not measured again"
    made = json.loads(path.read_text("utf-8"))
    assert made["settings"]["chunks"] == 2 and {row["tokens_scored"] for row in made["rows"]} == {510}
    assert made["dense"]["tasks"]["piqa"]["questions"] == 1
    page = (out / "RESULTS.md").read_text("utf-8")
    assert page.count("| teal uniform") >= 2 and "wina" in page and "510 tokens scored" in page
    stopped = table(*words, "--chunks", 3, "--for", 0)
    assert stopped.returncode == 0 and json.loads(path.read_text("utf-8")) == made, stopped.stderr


def test_the_page_names_presets_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    from sparsity_markdown import markdown  # type: ignore[import-not-found,unused-ignore]

    row = {
        "method": "teal",
        "allocation": "greedy",
        "score": "abs",
        "asked_level": 0.4,
        "budget": None,
        "level": 0.4,
        "perplexity": 25.0,
        "increase": 0.14,
        "increase_stderr": 0.02,
        "kl_mean": 0.15,
        "kl_p99": 0.9,
        "top1_agreement": 0.78,
        "density": {"A": 0.6, "body": 0.68},
        "tokens_scored": 1530,
        "bytes_per_token": 70e6,
        "against": {"uniform": [-0.06, 0.019], "global": [0.0, 0.0]},
        "tasks": {},
    }
    preset = row | {
        "allocation": "global",
        "asked_level": None,
        "budget": 0.01,
        "level": 0.2013,
        "against": {},
        "held_out_increase": 0.009,
        "held_out_stderr": 0.004,
        "tokens_per_s": 210.0,
        "speed_ratio": 1.08,
        "speed_range": [0.99, 1.2],
        "tasks": {"piqa": {"questions": 200, "accuracy": 0.6, "stderr": 0.03, "difference": -0.01, "difference_stderr": 0.02}},
    }
    made = {
        "model": "M",
        "quantisation": "Q4_1",
        "settings": {"tokens": 8192, "calibrated_on": "c4.txt", "chunks": 6, "text": "wiki", "questions": 200},
        "cpu": "a processor",
        "command": "python tests/bench/sparsity_table.py " + "--word value " * 20,
        "commits": ["abc"],
        "date": "2026-11-22",
        "dense": {
            "perplexity": 22.0,
            "bytes_per_token": 96e6,
            "tokens_per_s": 200.0,
            "tasks": {"piqa": {"questions": 200, "accuracy": 0.61, "stderr": 0.03}},
        },
        "rows": [preset, row],
    }
    page = markdown([made])
    assert "| teal greedy | 40% | 68.0% | A 60% | 25.000 | +14.0% +- 2.0% | 0.1500 | 0.90 | 78.0% |  |" in page
    assert "210 (1.08x, 0.99 to 1.20)" in page and "| 40% | teal greedy | uniform | -6.00% +- 1.90% |" in page
    assert "| **teal global, preset 1.0%** | 20.1% | +0.90% +- 0.40% | +14.00% +- 2.00% | 70.0 |" in page
    assert "60.0% [-1.0% +- 2.0%]" in page and max(map(len, page.splitlines())) <= 200
