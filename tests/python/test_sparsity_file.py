"""The sparsity file and the allocation of levels: what is refused and how, and the arithmetic, without running a model."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run import sparsity
from sparse_run.errors import ModelError, UsageError
from sparse_run.eval.choice import read_questions
from sparse_run.packed_header import SITES, PackedHeader, read_header
from sparse_run.predictors.common.allocate import MAX_LEVEL, along_path
from sparse_run.predictors.teal.fit import Fit

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def packed(smollm2_packed: Path, tmp_path: Path) -> Path:
    """A packed model of one's own, whose weights are those of the shared one."""
    out = tmp_path / "packed"
    out.mkdir()
    for file in smollm2_packed.iterdir():
        if file.is_file():
            os.link(file, out / file.name)
    return out


def example(header: PackedHeader, **changes: Any) -> sparsity.SparsityFile:
    thresholds: dict[str, list[NDArray[np.float32] | None]] = {site: [None] * header.n_layers for site in SITES}
    thresholds["A"][0] = np.full(1, 0.25, np.float32)
    thresholds["Z"][29] = np.linspace(0, 1, header.width("Z")).astype(np.float32)
    values: dict[str, Any] = {
        "method": "teal",
        "thresholds": thresholds,
        "levels": {site: [0.5] * header.n_layers for site in SITES},
        "dense_tokens": 16,
        "model_name": "SmolLM2",
        "fingerprint": header.fingerprint,
        "shape": header.shape,
        "quantisation": header.quantisation,
        "options": {"allocation": "uniform"},
        "corpus": "abc",
        "n_tokens": 1024,
        "quality": {"perplexity": 12.5, "tokens_per_s": 2.0, "tokens_per_s_dense": 1.0},
        "tool_version": "0.1.0",
        "date": "2026-01-01T00:00:00+00:00",
    }
    return sparsity.SparsityFile(**{**values, **changes})


def test_header_of_a_real_model(packed: Path) -> None:
    header = read_header(packed)
    assert header.quantisation == "q4 x 120" and header.n_layers == 30
    assert [header.width(site) for site in SITES] == [576, 576, 576, 1536]
    # q4 with scales and minima: 5 bits a weight.
    for site, rows in zip(SITES, (960, 576, 3072, 576), strict=True):
        assert header.site_bytes(site, 7) == rows * header.width(site) * 5 // 8
        assert header.maskable(site, 7)


def test_round_trip(packed: Path) -> None:
    header = read_header(packed)
    file = example(header)
    path = sparsity.save(file, sparsity.path_of(packed, "mine"))
    assert sparsity.names(packed) == ["mine"] and [p.name for p in path.parent.iterdir()] == ["mine.safetensors"]
    again = sparsity.resolve("mine", header)
    for name in ("method", "levels", "dense_tokens", "options", "corpus", "n_tokens", "quality", "date", "fingerprint"):
        assert getattr(again, name) == getattr(file, name), name
    for site in SITES:
        for a, b in zip(file.thresholds[site], again.thresholds[site], strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))
    assert again.faster()


def test_a_failed_write_leaves_nothing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(packed)
    path = sparsity.save(example(header), sparsity.path_of(packed, "mine"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        sparsity.save(example(header, n_tokens=1), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_other_model_other_quantisation_other_weights(packed: Path, stories_packed: Path) -> None:
    header = read_header(packed)
    path = sparsity.save(example(header), sparsity.path_of(packed, "mine"))
    with pytest.raises(ModelError, match=r"made for another model \(SmolLM2\)"):
        sparsity.load(path, read_header(stories_packed))
    for changes, text in (
        (
            {"quantisation": "q8 x 120", "fingerprint": "0"},
            "another quantisation of this model .q8 x 120; this one is q4",
        ),
        ({"fingerprint": "0"}, "made for other weights of this shape"),
    ):
        sparsity.save(example(header, **changes), path)
        with pytest.raises(ModelError, match=text) as caught:
            sparsity.load(path, header)
        assert "\n" not in str(caught.value) and "calibrate" in str(caught.value)


def test_fingerprint_follows_the_weights(packed: Path) -> None:
    before = read_header(packed).fingerprint
    weights = packed / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4000] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    assert read_header(packed).fingerprint != before


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda data: data[:-100], "damaged or cut off"),
        (lambda data: data[:20], "damaged or cut off"),
        (lambda data: b"", "damaged or cut off"),
        (lambda data: data.replace(b'"version":"1"', b'"version":"7"'), "version 7 .* is not known here"),
        (lambda data: data.replace(b"sparse-run-sparsity", b"sparse-run-sparsitx"), "not a sparsity file"),
        (lambda data: data.replace(b'"dense_tokens":"16"', b'"dense_tokens":"xx"'), "metadata is damaged"),
        (lambda data: data.replace(b'"layers.0.A"', b'"layers.0.Q"'), "tensor layers.0.Q belongs to no layer and site"),
        (
            lambda data: data.replace(b'"layers.0.A"', b'"layers.9.Z"').replace(b'"layers.29.Z"', b'"layers.29.A"'),
            "wanted",
        ),
        (lambda data: data.replace(np.float32(0.25).tobytes(), np.float32(np.nan).tobytes()), "NaN or negative"),
        (lambda data: data.replace(np.float32(0.25).tobytes(), np.float32(-1).tobytes()), "NaN or negative"),
    ],
)
def test_damage_is_refused_in_one_line(packed: Path, damage: Callable[[bytes], bytes], text: str) -> None:
    header = read_header(packed)
    path = sparsity.save(example(header), sparsity.path_of(packed, "mine"))
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(ModelError, match=text) as caught:
        sparsity.load(path, header)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_names_and_levels() -> None:
    assert [sparsity.parse_level(text) for text in ("0", "0.5", "1", "teal", "1%")] == [0.0, 0.5, 1.0, None, None]
    for text in ("-0.1", "1.01", "nan", "inf", "50"):
        with pytest.raises(UsageError, match=r"outside 0\.\.1"):
            sparsity.parse_level(text)
    for name in ("", ".hidden", "a/b", "..", "off"):
        with pytest.raises(UsageError, match="cannot name a sparsity file"):
            sparsity.path_of("packed", name)


def test_auto(packed: Path) -> None:
    header = read_header(packed)
    assert sparsity.find_auto(header)[0] is None
    slow = {"tokens_per_s": 1.0, "tokens_per_s_dense": 2.0}
    sparsity.save(example(header, quality=slow), sparsity.path_of(packed, "teal-1pct"))
    file, why = sparsity.find_auto(header)
    assert file is None and "no faster" in why
    sparsity.save(example(header), sparsity.path_of(packed, "teal-1pct"))
    file, why = sparsity.find_auto(header)
    assert file is not None and file.name == "teal-1pct" and why == "sparsity teal-1pct"
    sparsity.save(example(header, quality=slow), sparsity.path_of(packed, "auto"))
    assert sparsity.find_auto(header)[0] is None


def test_a_level_says_before_its_calibration_that_it_takes_a_while(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_run.predictors.teal import fit

    said: list[str] = []

    def begins(*_: Any, **__: Any) -> None:
        assert len(said) == 1 and "level 0.37 is not calibrated yet" in said[0]
        raise InterruptedError

    monkeypatch.setattr(fit, "Fit", begins)
    with pytest.raises(InterruptedError):
        sparsity.choose("0.37", read_header(packed), None, None, say=said.append)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--sparsity", "1.5"), 2, "outside 0..1"),
        (("--sparsity", "nothing"), 2, "no sparsity file named 'nothing'; this model has none"),
        (("--sparsity", "./gone.safetensors"), 4, "no such sparsity file"),
    ],
)
def test_bad_choices_on_the_command_line(
    packed: Path, run_cli: RunCli, words: tuple[str, ...], code: int, text: str
) -> None:
    for command in (("generate", "-p", "x", "-n", "1"), ("bench", "--reps", "1")):
        done = run_cli(*command, "-m", packed, *words)
        assert done.returncode == code and done.stdout == ""
        assert text in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--level", "1.5"), 2, "outside 0..1"),
        (("--level", "much"), 2, "is no level"),
        (("--max-ppl-increase", "-1%"), 2, "is no budget"),
        (("--level", "0.5", "--name", "../up"), 2, "cannot name a sparsity file"),
        (("--level", "0.5", "--level", "0.6", "--name", "x"), 2, "--name goes with one"),
        (("--tokens", "128"), 2, "at least two chunks"),
    ],
)
def test_bad_options_of_calibrate(packed: Path, run_cli: RunCli, words: tuple[str, ...], code: int, text: str) -> None:
    done = run_cli("calibrate", "-m", packed, *words)
    assert done.returncode == code and text in done.stderr, done.stderr
    assert not sparsity.folder(packed).exists()


def test_along_path() -> None:
    path = np.array([[0.0, 0.0], [0.2, 0.0], [0.2, 0.4]])
    assert np.allclose(along_path(path, np.array([0.0, 0.1, 0.3]), 0.2), [0.2, 0.2])


class TestQuestions:
    def test_forms_of_files(self, shared_dir: Path) -> None:
        choice = shared_dir / "data" / "choice"
        for task in ("piqa", "arc_easy", "openbook_qa", "boolq", "winogrande"):
            questions = read_questions(choice / f"{task}.jsonl", task, 20)
            assert len(questions) == 20 and all(len(q.contexts) == len(q.endings) >= 2 for q in questions)
        q = read_questions(choice / "winogrande.jsonl", "winogrande", 1)[0]
        assert (
            q.contexts[1].endswith("so Maria") and q.endings == (" always got the easier cases.",) * 2 and q.gold == 1
        )
        q = read_questions(choice / "hellaswag_val_full.txt.bz2", "hellaswag", 1)[0]
        assert q.gold == 3 and q.endings[3] == " starts pulling up roofing on a roof."

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "q.jsonl"
        for text, wanted in (
            ("", "no questions"),
            ('{"query": "a"}\n', "question 1 is not one of piqa"),
            (json.dumps({"query": "a", "choices": ["b", "c"], "gold": 5}), "the right one is not among them"),
            ("one line\n", "question 1 is not one of piqa"),
        ):
            path.write_text(text, "utf-8")
            with pytest.raises(UsageError, match=wanted):
                read_questions(path, "piqa")


@pytest.mark.parametrize(("factor", "power"), [(6, 3), (0.2, 3), (1, 2), (50, 4)])
def test_search_for_a_budget(monkeypatch: pytest.MonkeyPatch, factor: float, power: float) -> None:
    """On curves whose answer is known, from slightly better than dense on: close below the budget, in few measurements."""
    measured: list[float] = []

    def increase(self: Fit, allocation: str, target: float) -> float:
        measured.append(target)
        self._increases[allocation, target] = factor * target**power - 0.002
        return self._increases[allocation, target]

    monkeypatch.setattr(Fit, "increase", increase)
    monkeypatch.setattr(Fit, "prepare", lambda *_: None)
    monkeypatch.setattr(Fit, "thresholds_at", lambda _self, _allocation, target: ({}, {"M": [target]}))
    fit = Fit.__new__(Fit)
    fit._increases = {}
    for budget in (0.005, 0.01, 0.02, 0.05):
        measured.clear()
        level = fit.search("global", budget)
        ideal = min(MAX_LEVEL, ((budget + 0.002) / factor) ** (1 / power))
        assert ideal - 0.011 <= level <= ideal and len(measured) <= 7
