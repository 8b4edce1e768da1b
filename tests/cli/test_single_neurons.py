"""A memory budget together with a method that names neurons: `convert --order` writes them one by one, decoding reads only those
that are missing, and the answer is that of the same method with all weights in memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sparse_run import _core, errors, sparsity
from sparse_run.convert.neuron_file import NEURON_FILE, hot_first, write_neuron_file
from sparse_run.neurons import known, needs, zeros_pay
from sparse_run.packed_header import read_header
from sparse_run.predictors.coreinfer.selection import Choice
from sparse_run.sparsity import SparsityFile

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPT = "The capital of France is Paris. " * 6


@pytest.fixture(scope="module")
def packed(smollm2_neurons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 by neuron, with a file of single neurons, and sparsity files of a fixed set, a predictor and thresholds."""
    folder = tmp_path_factory.mktemp("single-neurons") / "model"
    folder.mkdir()
    for file in smollm2_neurons.iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    write_neuron_file(folder, None)
    header = read_header(folder)
    config = header.config
    common: dict[str, Any] = {
        "levels": {},
        "model_name": "test",
        "fingerprint": header.fingerprint,
        "shape": header.shape,
        "quantisation": header.quantisation,
    }
    n_layers, n_ff, n_embd = int(config["n_layers"]), int(config["n_ff"]), int(config["n_embd"])
    griffin = {"statistic": "griffin", "density": 0.2, "first": 1, "last": 1, "min_prompt": 8}
    fixed = SparsityFile("griffin", {}, dense_tokens=0, options=griffin, **common)
    sparsity.save(fixed, folder / "sparsity" / "fixed.safetensors")
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(n_layers):
        name = f"predictor.{i}.neurons."
        arrays |= {
            f"{name}a": rng.integers(-127, 128, (16, n_embd), dtype=np.int8),
            f"{name}a_scale": np.full(16, 0.01 / n_embd**0.5, np.float32),
            f"{name}b": rng.integers(-127, 128, (n_ff, 16), dtype=np.int8),
            f"{name}b_scale": np.full(n_ff, 0.01 / 4, np.float32),
            f"{name}threshold": np.full(n_ff, 0.3, np.float32),
        }
    predicted = SparsityFile("dejavu", {}, dense_tokens=4, arrays=arrays, **common)
    sparsity.save(predicted, folder / "sparsity" / "predicted.safetensors")
    level = np.full(1, 0.5, np.float32)
    gates = {"G": [level] * n_layers, "Z": [level] * n_layers, "A": [level] * n_layers}
    sparsity.save(SparsityFile("cats", gates, dense_tokens=4, **common), folder / "sparsity" / "gates.safetensors")
    return folder


def generate(run_cli: RunCli, packed: Path, method: str, *more: object) -> subprocess.CompletedProcess[str]:
    words = ("generate", "-m", packed, "-p", PROMPT, "-n", 12, "--temp", 0, "-t", 2, "-c", 256, "--ignore-eos", "--json")
    return run_cli(*words, "--sparsity", method, *more)


@pytest.fixture(scope="module")
def floor(packed: Path, run_cli: RunCli) -> int:
    """The smallest budget, as the refusal names it."""
    done = generate(run_cli, packed, "predicted", "--memory-budget", "1M")
    assert done.returncode == 5, done.stderr
    match = re.search(r"--memory-budget (\d+)M or more", done.stderr)
    assert match, done.stderr
    return int(match[1]) * 10**6


@pytest.mark.parametrize("method", ["fixed", "predicted", "gates"])
def test_the_answer_is_that_of_the_method_in_memory(
    packed: Path, run_cli: RunCli, floor: int, method: str
) -> None:
    whole = generate(run_cli, packed, method)
    assert whole.returncode == 0, whole.stderr
    expected = json.loads(whole.stdout)
    assert expected["text"] != json.loads(generate(run_cli, packed, "off").stdout)["text"]
    from_neurons = 0
    for extra in (5, 75, 105, 170):
        done = generate(run_cli, packed, method, "--memory-budget", floor + extra * 10**6, "--stats")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["tokens"] == expected["tokens"], extra
        memory = found["memory"]
        parts = ("process_bytes", "working_bytes", "context_bytes", "resident_bytes", "ring_bytes", "neuron_bytes")
        assert sum(memory[part] for part in parts) <= memory["budget_bytes"]
        if method == "gates":  # whose gate rows are all needed
            assert not memory["neuron_slots"] and not memory["no_neurons"]
        elif memory["neuron_slots"]:
            from_neurons += 1
            assert memory["neuron_tokens"] == 11  # the first token of the answer follows from the prompt
            assert memory["neuron_hits"] + memory["neuron_misses"] > 0
            assert "single neurons" in done.stderr
            assert not memory["ring_bytes"]  # which is lent to them until the next prompt
            asked = (memory["neuron_hits"] + memory["neuron_misses"]) / memory["neuron_tokens"]
            assert memory["neuron_window"] == pytest.approx(memory["neuron_slots"] / asked)
            if method == "fixed":
                assert memory["neuron_misses"] <= memory["neuron_hits"] / 10 + 1 or extra < 105
        else:
            assert "leaves room for" in memory["no_neurons"] and "leaves room for" in done.stderr
    assert from_neurons >= (0 if method == "gates" else 2)


def test_bench_measures_a_method_under_a_budget_and_eval_refuses(packed: Path, run_cli: RunCli, floor: int) -> None:
    budget = ("--memory-budget", floor + 120 * 10**6)
    sizes = ("--prompt", 8, "--gen", 4, "--reps", 2)
    done = run_cli("bench", "-m", packed, *sizes, "--sparsity", "fixed", *budget, "--json", "-t", 2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sparsity"] == "fixed" and found["density"]["N"] == pytest.approx(0.2, abs=0.01)
    assert found["sparse_memory"]["neuron_tokens"] == 8
    assert found["memory"]["budget_bytes"] == found["sparse_memory"]["budget_bytes"]
    table = run_cli("bench", "-m", packed, *sizes, "--sparsity", "fixed", *budget, "-t", 2)
    assert "single neurons" in table.stdout
    done = run_cli("eval", "-m", packed, "--text", __file__, "--sparsity", "fixed", *budget)
    assert done.returncode == 2 and "--memory-budget" in done.stderr


def test_a_level_that_was_not_calibrated_is_refused_under_a_budget(
    packed: Path, run_cli: RunCli, run_python: Callable[..., str], floor: int
) -> None:
    done = generate(run_cli, packed, "0.37", "--memory-budget", floor + 50 * 10**6)
    assert done.returncode == 2, done.stderr
    assert "calibrate" in done.stderr and len([s for s in done.stderr.splitlines() if "error" in s]) == 1
    program = """
import sys
from sparse_run import errors, load
with load(sys.argv[1], threads=1, ctx_size=256, memory_budget=int(sys.argv[2])) as model:
    try:
        model.set_sparsity("fixed")
    except errors.UsageError as error:
        print(error)
    model.set_sparsity(None)
"""
    assert "room_for" in run_python(program, packed, floor + 70 * 10**6)


def test_order_puts_hot_neurons_first_and_changes_no_bit(
    packed: Path, shared_dir: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    text = (shared_dir / "data" / "calibration" / "c4.txt").read_text("utf-8")
    order = hot_first(packed, text[:8000])
    n_ff = order.shape[1]
    assert all((np.sort(row) == np.arange(n_ff)).all() for row in order)
    folder = tmp_path / "ordered"
    folder.mkdir()
    for file in packed.iterdir():
        if file.is_file() and file.name != NEURON_FILE:
            os.link(file, folder / file.name)
    shutil.copytree(packed / "sparsity", folder / "sparsity")
    write_neuron_file(folder, order)

    def answer(path: Path) -> tuple[list[int], dict[str, int]]:
        done = generate(run_cli, path, "fixed", "--memory-budget", "320M")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["tokens"], found["memory"]

    (plain, one), (ordered, other) = answer(packed), answer(folder)
    assert plain == ordered
    assert one["neuron_slots"] and other["neuron_slots"]
    # What is hot in any text is there before it is asked for.
    assert other["neuron_misses"] < one["neuron_misses"]


def test_convert_order_on_the_command_line(packed: Path, smollm2_packed: Path, run_cli: RunCli, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(packed, folder, ignore=shutil.ignore_patterns(NEURON_FILE, "sparsity"))
    done = run_cli("convert", folder, "--order", "none", "--json")
    assert done.returncode == 0, done.stderr
    assert (folder / NEURON_FILE).read_bytes() == (packed / NEURON_FILE).read_bytes()
    assert json.loads(done.stdout)["neurons_bytes"] == (packed / NEURON_FILE).stat().st_size
    done = run_cli("convert", smollm2_packed, "--order", "none")
    assert done.returncode == 2 and "--layout neurons" in done.stderr
    assert not (smollm2_packed / NEURON_FILE).exists()
    done = run_cli("convert", "--layout", "panels", "--order", "none", tmp_path / "x.gguf", tmp_path / "y")
    assert done.returncode == 2 and "--layout" in done.stderr
    short = tmp_path / "short.txt"
    short.write_text("too short", "utf-8")
    before = (folder / NEURON_FILE).stat().st_mtime_ns
    done = run_cli("convert", folder, "--order", short)
    assert done.returncode == 2 and "shorter" in done.stderr
    assert (folder / NEURON_FILE).stat().st_mtime_ns == before


def test_needs_follow_from_the_file(packed: Path, tmp_path: Path) -> None:
    header = read_header(packed)
    fixed, why = known("fixed", packed)
    assert fixed is not None and not why
    assert needs(fixed, header.config, packed).neuron_share == pytest.approx((28 * round(0.2 * 1536) + 2 * 1536) / (30 * 1536))
    predicted = known("predicted", packed)[0]
    assert predicted is not None
    assert needs(predicted, header.config, packed).neuron_share == 1.0
    assert needs(predicted, header.config, packed).extra_bytes > sum(a.nbytes for a in predicted.arrays.values())
    gates = known("gates", packed)[0]
    assert needs(gates, header.config, packed).neuron_share == 0.0
    assert not needs(gates, header.config, packed).by_gate and not needs(None, header.config, packed).by_gate
    gates.levels = {"G": [0.9] * 30}
    assert needs(gates, header.config, packed).by_gate
    zeros = {**header.config, "activation": "relu"}
    assert needs(None, zeros, packed).by_gate and needs(fixed, zeros, packed).neuron_share and not needs(fixed, zeros, packed).by_gate
    record = tmp_path / "source.json"
    for share, pays in ((0.95, True), (0.5, False)):  # as `convert --order TEXT` measures it
        record.write_text(json.dumps({"natural_sparsity": {"ffn": share}}), "utf-8")
        assert needs(None, zeros, tmp_path).by_gate is pays and not zeros_pay(header.config, tmp_path)
    assert known(None, packed) == known("off", packed) == (None, "")
    assert Choice.of(fixed.options).keep(1536) == 307
    with pytest.raises(errors.BudgetError):
        _core.Model(str(packed), 1, memory_budget=1, neuron_share=0.5)
