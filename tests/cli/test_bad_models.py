"""Bad models on the command line: one line that names the file and the remedy, the documented exit code, no left-overs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_gguf import LlamaShape
from mixed_gguf import write_mixed

SHAPE = LlamaShape(n_layers=1, n_embd=64, n_heads=2, n_kv_heads=1, head_dim=32, n_ff=64, n_vocab=300)


def good(path: Path) -> bytes:
    write_mixed(path, SHAPE, {"": "Q8_0"})
    return path.read_bytes()


def truncated(path: Path) -> None:
    data = good(path)
    path.write_bytes(data[: len(data) - 1000])


def header_only(path: Path) -> None:
    path.write_bytes(good(path)[:3000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def magic(path: Path) -> None:
    path.write_bytes(b"PK\3\4" + good(path)[4:])


def counts(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, (1 << 64) - 1, (1 << 64) - 1) + bytes(4096))


def outside(path: Path) -> None:
    data = good(path)
    name = b"output_norm.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8 + 4
    path.write_bytes(data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :])


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(100_000))


def random_header(path: Path) -> None:
    path.write_bytes(b"GGUF\3\0\0\0" + np.random.default_rng(1).bytes(100_000))


def with_writer(architecture: str, fill: Callable[[Any], None] = lambda w: None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        writer = gguf.GGUFWriter(str(path), architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return make


def tensor_type(path: Path) -> None:
    data = good(path)
    name = b"token_embd.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", 16) + data[at + 4 :])


def with_key(name: str, value: Any) -> Callable[[Path], None]:
    """A sound file with one key more, in front."""

    def make(path: Path) -> None:
        data = good(path)
        (count,) = struct.unpack_from("<Q", data, 16)
        number = isinstance(value, int)
        packed = struct.pack("<IH", 2, value) if number else struct.pack("<IQ", 8, len(value)) + value.encode()
        more = struct.pack("<Q", len(name)) + name.encode() + packed
        end = gguf.GGUFReader(str(path)).data_offset
        header = data[:16] + struct.pack("<Q", count + 1) + more + data[24:end]
        path.write_bytes(header + bytes(-len(header) % 32) + data[end:])

    return make


def infinite(path: Path) -> None:
    good(path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
    with open(path, "r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16("nan").tobytes())


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def missing(path: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "lies outside the file"),
    "header only": (header_only, "the file ends within"),
    "empty": (empty, "too few"),
    "wrong magic": (magic, "not a GGUF file"),
    "absurd counts": (counts, "claims"),
    "tensor outside": (outside, "output_norm.weight lies outside the file"),
    "garbage": (garbage, "not a GGUF file"),
    "random header": (random_header, "claims"),
    "unknown architecture": (with_writer("whale"), "'whale' is not supported; supported: "),
    "no tokenizer": (with_writer("llama"), "no tokenizer"),
    "one part of two": (with_key("split.count", 2), "one of 2 parts of a model; "),
    "an adapter": (with_key("general.type", "adapter"), "of the type 'adapter' is no model by itself"),
    "an importance matrix": (with_writer("llama", lambda w: w.add_type("imatrix")), "the type 'imatrix' is no model"),
    "unknown tensor type": (tensor_type, "token_embd.weight is of type IQ2_XXS"),
    "weights not finite": (infinite, "blk.0.attn_q.weight holds weights that are not finite"),
    "directory": (directory, "neither a packed model nor"),
    "pipe": (pipe, "not a regular file"),
    "missing": (missing, "no such file"),
}


# info reads the header alone, and so does not find weights that are not finite.
@pytest.mark.parametrize(
    ("name", "command"),
    [
        (name, command)
        for name in BAD
        for command in ("generate", "convert", "info")
        if (name, command) != ("weights not finite", "info")
    ],
)
def test_bad_models_are_one_clear_line(name: str, command: str, tmp_path: Path, run_cli: Any) -> None:
    make, words = BAD[name]
    path = tmp_path / "model.gguf"
    make(path)
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    args = {
        "generate": ["generate", "-m", path, "-p", "x", "-n", "1", "-q"],
        "convert": ["convert", path, tmp_path / "out", "-q"],
        "info": ["info", path],
    }[command]
    done = run_cli(*args, env=home, timeout=60)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sparse-run: error: ")
    assert words in lines[0] and "model.gguf" in lines[0]
    empty_folders = {"cache", "sparse-run", "packed"}
    assert {p.name for p in tmp_path.rglob("*")} - empty_folders <= {"model.gguf"}


def test_no_text_of_a_file_reaches_the_terminal_as_an_escape_sequence(tmp_path: Path, run_cli: Any) -> None:
    path = tmp_path / "model.gguf"
    write_mixed(path, SHAPE, {"": "Q8_0"}, name="\x1b[2J\x9b1m\n" + "n" * 1000)
    for arguments in (["info", path], ["info", path, "--json"], ["generate", "-m", path, "-p", "x", "-n", "0", "-v"]):
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
        for text in (done.stdout, done.stderr):
            assert text.replace("\n", "").isprintable() and len(text) < 3000
    shown = next(line for line in run_cli("info", path).stdout.splitlines() if line.startswith("name "))
    assert "\\x1b[2J" in shown


def test_an_unwritable_cache_and_a_full_disk_have_the_exit_code_of_run_time(tmp_path: Path, run_cli: Any) -> None:
    path = tmp_path / "model.gguf"
    good(path)
    (tmp_path / "cache").write_text("in the way")
    done = run_cli("generate", "-m", path, "-p", "x", "-n", "1", "-q", env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 1 and "XDG_CACHE_HOME" in done.stderr and done.stderr.count("\n") == 1
    limit = ["bash", "-c", 'ulimit -f 20; exec "$0" "$@"']
    done = run_cli("convert", path, tmp_path / "out", "-q", prefix=limit)
    assert done.returncode == 1 and "free some space" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_damaged_packed_model_is_named(tmp_path: Path, run_cli: Any) -> None:
    path = tmp_path / "model.gguf"
    good(path)
    assert run_cli("convert", path, tmp_path / "out", "-q").returncode == 0
    weights = tmp_path / "out" / "weights.safetensors"
    sound = weights.read_bytes()
    for damaged in (sound[:100], sound[:-5000], b"\xff" * 8 + sound[8:], sound[:8] + b"{}" + sound[10:]):
        weights.write_bytes(damaged)
        done = run_cli("generate", "-m", tmp_path / "out", "-p", "x", "-n", "1", "-q")
        assert done.returncode == 4, done.stderr
        assert str(weights) in done.stderr and done.stderr.count("\n") == 1
    weights.write_bytes(sound)
    for text in ("", "{", "[]", "{}", '{"format_version": 99}'):
        (tmp_path / "out" / "config.json").write_text(text)
        for command in (["generate", "-m", tmp_path / "out", "-p", "x", "-n", "1", "-q"], ["info", tmp_path / "out"]):
            done = run_cli(*command)
            assert done.returncode == 4, (text, command, done.stderr)
            assert "config.json" in done.stderr and done.stderr.count("\n") == 1
