"""What -m means: paths, names, and a cache that converts an unchanged source once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_gguf import LlamaShape
from mixed_gguf import write_mixed
from packed_reader import read_packed
from sparse_run import registry
from sparse_run.convert import identity
from sparse_run.errors import Error, ModelError, UnsupportedModelError

SHAPE = LlamaShape(n_layers=1, n_embd=64, n_heads=2, n_kv_heads=1, head_dim=32, n_ff=64, n_vocab=300)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty cache and data directories, and a working directory."""
    for kind in ("cache", "data"):
        monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", str(tmp_path / kind))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def model(places: Path) -> Path:
    path = places / "work" / "m.gguf"
    write_mixed(path, SHAPE, {"": "Q8_0"})
    return path


def conversions(calls: list[Any]) -> int:
    return sum(1 for call in calls if call[1] == 0)


def test_a_gguf_is_converted_once_and_found_again(model: Path, places: Path) -> None:
    calls: list[Any] = []
    first = registry.resolve(model, progress=lambda *call: calls.append(call))
    assert conversions(calls) == 1
    assert first.parent == places / "cache" / "sparse-run" / "packed" == registry.packed_dir()
    read_packed(first)
    before = (first / "weights.safetensors").stat().st_mtime_ns
    assert registry.resolve("m.gguf", progress=lambda *call: calls.append(call)) == first
    assert registry.resolve(first, progress=lambda *call: calls.append(call)) == first
    assert conversions(calls) == 1 and (first / "weights.safetensors").stat().st_mtime_ns == before
    assert registry.packed_models() == [first]


def test_finding_a_conversion_takes_milliseconds(model: Path, places: Path) -> None:
    with open(model, "ab") as file:
        file.truncate(300 << 20)  # the size of a real model; only its edges may be read
    registry.resolve(model)
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()  # the processor's: other processes do not count
        registry.resolve(model)
        best = min(best, time.thread_time() - start)
    assert best < 0.02


@pytest.mark.parametrize("change", ["content", "date", "size", "converter"])
def test_a_changed_source_is_converted_anew_and_the_old_conversion_goes(
    change: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = registry.resolve(model)
    stat = model.stat()
    if change == "content":
        data = bytearray(model.read_bytes())
        data[-1] ^= 1
        model.write_bytes(data)
        os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "date":
        os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "size":
        with open(model, "ab") as file:
            file.write(b"\0")
        os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        monkeypatch.setattr(identity, "CONVERTER_VERSION", 999)
    second = registry.resolve(model)
    assert second != first
    assert registry.packed_models() == [second]


def test_conversions_of_other_sources_stay(model: Path, places: Path) -> None:
    other = places / "work" / "other.gguf"
    write_mixed(other, SHAPE, {"": "F16"})
    kept = registry.resolve(other)
    registry.resolve(model)
    os.utime(model, (5, 5))
    now = registry.resolve(model)
    assert registry.packed_models() == sorted([kept, now])


@pytest.mark.parametrize("damage", ["config.json", "weights.safetensors", "tokenizer_config.json", "short"])
def test_a_conversion_that_lost_a_file_is_made_again(damage: str, model: Path) -> None:
    packed = registry.resolve(model)
    if damage == "short":
        os.truncate(packed / "weights.safetensors", 5000)
    else:
        (packed / damage).unlink()
    assert registry.resolve(model) == packed
    read_packed(packed)
    assert (packed / "tokenizer_config.json").is_file()


def test_a_relative_xdg_variable_is_ignored(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    monkeypatch.setenv("HOME", str(places))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert registry.packed_dir() == places / ".cache" / "sparse-run" / "packed"
    assert registry.models_dir() == places / ".local" / "share" / "sparse-run" / "models"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt5", "no model named 'gpt5'; known: smollm2-135m"),
        ("", "the model's name is empty"),
        ("./gone.gguf", "./gone.gguf: no such file"),
        ("gone.gguf", "gone.gguf: no such file"),
        ("/a/b/c", "/a/b/c: no such file"),
        ("org/repo", "sparse-run pull org/repo"),
        ("x" * 5000, "cannot be read"),
        ("zero\0byte", "zero"),
        ("smollm2-135m", "sparse-run pull smollm2-135m"),
        (None, "sparse-run pull smollm2-135m"),
    ],
)
def test_a_model_that_is_not_there_is_said_in_one_line(name: str | None, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        registry.resolve(name, pull=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_directories_are_told_apart(places: Path) -> None:
    empty = places / "work" / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="neither a packed model nor"):
        registry.resolve(empty)
    (empty / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give one of its \.gguf files, as .*a\.gguf"):
        registry.resolve(empty)


def test_known_names_beat_folders_of_that_name_unless_they_hold_a_model(model: Path, places: Path) -> None:
    (places / "work" / "smollm2-135m").mkdir()
    with pytest.raises(ModelError, match="not on this machine yet"):
        registry.resolve("SmolLM2-135M", pull=False)
    (places / "work" / "smollm2-135m").rmdir()
    packed = registry.resolve(model)
    shutil.copytree(packed, places / "work" / "smollm2-135m")
    assert registry.resolve("smollm2-135m", pull=False) == Path("smollm2-135m")


def test_files_in_the_models_directory_have_names(model: Path, places: Path) -> None:
    base = registry.models_dir()
    (base / "org" / "repo").mkdir(parents=True)
    shutil.copy(model, base / "By-Hand.gguf")
    (base / "org" / "repo" / "w.Q4_0.gguf").symlink_to(model)
    (base / ".hidden.part-1").mkdir()
    shutil.copy(model, base / ".hidden.part-1" / "x.gguf")
    names = dict(registry.pulled_models())
    assert sorted(names) == ["By-Hand", "org/repo:w.Q4_0.gguf"]
    assert registry.find("by-hand") == base / "By-Hand.gguf"
    assert registry.find("org/repo") == registry.find("org/repo:w.Q4_0.gguf") == base / "org" / "repo" / "w.Q4_0.gguf"
    (base / "org" / "repo" / "w.Q8_0.gguf").symlink_to(model)
    with pytest.raises(ModelError, match="name one of them"):
        registry.find("org/repo")
    assert registry.resolve("org/repo:w.Q8_0.gguf") == registry.resolve(model)


def test_a_home_directory_is_expanded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert registry.find("~/m.gguf") == model


def test_an_unwritable_cache_is_one_clear_error(model: Path, places: Path) -> None:
    (places / "cache").write_text("a file, not a directory")
    with pytest.raises(Error, match="XDG_CACHE_HOME") as caught:
        registry.resolve(model)
    assert not isinstance(caught.value, ModelError) and "cannot be written" in str(caught.value)


def test_processes_that_need_the_same_conversion_at_once_all_get_it(model: Path) -> None:
    code = "import sys; from sparse_run.registry import resolve; print(resolve(sys.argv[1]))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    results = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    packed = Path(results[0][0].decode().strip())
    assert np.isfinite(read_packed(packed)[0]["token_embd"]).all()
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]


def test_list_and_info_show_what_is_there(model: Path, places: Path, run_cli: Any) -> None:
    packed = registry.resolve(model)
    registry.models_dir().mkdir(parents=True)
    shutil.copy(model, registry.models_dir())
    listed = json.loads(run_cli("list", "--json").stdout)
    assert listed["schema"] == 1
    assert [(k["name"], k["pulled"], k["default"]) for k in listed["known"]] == [("smollm2-135m", False, True)]
    assert [(p["name"], p["bytes"]) for p in listed["pulled"]] == [("m", model.stat().st_size)]
    assert [(p["key"], p["source"]) for p in listed["packed"]] == [(packed.name, str(model))]
    text = run_cli("list").stdout
    assert "smollm2-135m" in text and packed.name in text

    infos = [json.loads(run_cli("info", path, "--json").stdout) for path in (model, packed)]
    for info in infos:
        assert info["schema"] == 1
        assert (info["architecture"], info["layers"], info["heads"], info["kv_heads"]) == ("llama", 1, 2, 1)
        assert (info["ffn"], info["ffn_kind"], info["activation"]) == (64, "gated", "silu")
        assert (info["vocabulary"], info["context"], info["tied_embeddings"]) == (300, 2048, True)
        weights = info["weights"]
        assert set(weights) == {"embedding", "attention", "ffn", "other"}
        assert weights["attention"]["parameters"] == 2 * 64 * 64 + 2 * 32 * 64
        assert weights["ffn"]["bits_per_weight"] == 8.5
        assert sum(w["bytes"] for w in weights.values()) == info["bytes"]
    assert infos[0]["format"] == "gguf" and infos[0]["weights"]["ffn"]["kinds"] == ["Q8_0"]
    assert infos[1]["format"] == "packed" and infos[1]["weights"]["ffn"]["kinds"] == ["q8 group 32"]
    assert infos[1]["made_from"]["path"] == str(model)
    text = run_cli("info", packed).stdout
    assert "64 neurons, gated, silu" in text and "8.50" in text


def test_convert_on_the_command_line(model: Path, places: Path, run_cli: Any) -> None:
    done = run_cli("convert", model, places / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == 1 and result["path"] == str(places / "out") and len(result["sha256"]) == 64
    assert "converting m.gguf" in done.stderr
    again = run_cli("convert", model, places / "out")
    assert again.returncode == 2 and "--force" in again.stderr
    assert run_cli("convert", model, places / "out", "--force", "-q").stderr == ""
    assert run_cli("convert", places / "out", places / "twice").returncode == 2
    cached = run_cli("convert", model, "-q")
    assert cached.stdout.strip() == str(registry.resolve(model))


def test_an_unsupported_model_keeps_its_kind_of_error_through_the_cache(places: Path) -> None:
    import gguf

    path = places / "work" / "u.gguf"
    writer = gguf.GGUFWriter(str(path), "mamba9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="mamba9"):
        registry.resolve(path)
    assert registry.packed_models() == [] and not any(registry.packed_dir().glob(".*"))
