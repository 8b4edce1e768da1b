"""Bad Hugging Face directories on the command line: one line that names what is wrong, the documented exit code, and nothing
half-written, whatever is run."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

WIDTH, N_FF, N_VOCAB = 64, 128, 320
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": N_FF,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": N_VOCAB,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens.weight": (N_VOCAB, WIDTH),
    "model.norm.weight": (WIDTH,),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
    **{f"model.layers.0.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"},
    "model.layers.0.mlp.gate_proj.weight": (N_FF, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (N_FF, WIDTH),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, N_FF),
}
UP = "model.layers.0.mlp.up_proj.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model in two shards."""
    folder = tmp_path / "hf"
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    index = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    for shard in SHARDS:
        save_file({name: w for name, w in weights.items() if index[name] == shard}, folder / shard)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_tokenizer(folder, N_VOCAB)
    return folder


def configured(**changes: Any) -> Callable[[Path], object]:
    return lambda d: (d / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def weights_changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        shard = next(folder / s for s in SHARDS if name in load_file(folder / s))
        weights = load_file(shard)
        save_file({**weights, name: change(weights[name])}, shard)

    return damage


def header_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        data = (folder / SHARDS[0]).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SHARDS[0]).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def pickled(folder: Path) -> None:
    for shard in SHARDS:
        (folder / shard).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\3\4")


def with_nan(values: Any) -> Any:
    values[3, 4] = np.nan
    return values


EMBD = "model.embed_tokens.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: (d / SHARDS[1]).unlink(), f"the file {SHARDS[1]} is missing"),
    "wrong shape": (weights_changed(UP, lambda w: w[:-1].copy()), f"tensor {UP} has the shape [127, 64]"),
    "unknown activation": (configured(hidden_act="mish"), "hidden_act is 'mish', which is not supported"),
    "unsupported architecture": (configured(architectures=["RwkvForCausalLM"]), "'RwkvForCausalLM' is not supported"),
    "unsupported feature": (
        configured(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic', which is not supported",
    ),
    "unknown setting": (configured(attention_sinks=4), "attention_sinks is 4, a setting that sparse-run does not know"),
    "weights not finite": (weights_changed(UP, with_nan), f"{UP} holds weights that are not finite"),
    "tokenizer larger than the embedding": (lambda d: write_tokenizer(d, N_VOCAB + 7), "has 327 tokens"),
    "header of impossible length": (lambda d: (d / SHARDS[0]).write_bytes(b"\xff" * 64), "the header claims"),
    "header with a place outside": (
        header_changed(lambda h: h[EMBD].update(data_offsets=[0, 1 << 60])),
        f"{EMBD} lies outside the file",
    ),
    "header with a larger shape": (header_changed(lambda h: h[EMBD].update(shape=[1 << 40, WIDTH])), "does not fit its size"),
    "pickled weights": (pickled, "pytorch_model.bin) are pickles"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_one_clear_line(name: str, folder: Path, tmp_path: Path, run_cli: Any) -> None:
    damage, words = BAD[name]
    damage(folder)
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    commands = [["convert", folder, tmp_path / "out", "-q"]]
    if name in ("missing shard", "weights not finite", "header with a place outside"):
        commands.append(["convert", folder, tmp_path / "out", "--bits", "4", "-q"])
        commands.append(["generate", "-m", folder, "-p", "x", "-n", "1", "-q"])
    for command in commands:
        done = run_cli(*command, env=home, timeout=120)
        assert done.returncode == 4, done.stderr
        assert done.stdout == "" and done.stderr.count("\n") == 1
        assert words in done.stderr and "hf" in done.stderr
    left = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(folder)]
    assert [p.name for p in left if p.suffix != ".lock"] == []
    assert not (tmp_path / "out").exists()


def test_a_sound_checkpoint_runs(folder: Path, tmp_path: Path, run_cli: Any) -> None:
    done = run_cli("generate", "-m", folder, "-p", "x", "-n", "1", "-q", env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_change_of_a_header_does_more_than_raise_a_model_error(folder: Path, data: Any) -> None:
    from sparse_run.convert.safetensors_reader import SafetensorsFile
    from sparse_run.errors import ModelError

    sound = (folder / SHARDS[0]).read_bytes()
    (length,) = struct.unpack("<Q", sound[:8])
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path = folder.parent / "changed.safetensors"
    path.write_bytes(changed)
    try:
        with SafetensorsFile(path) as file:
            for tensor in file.tensors.values():
                assert 0 <= tensor.offset and tensor.offset + tensor.nbytes <= len(sound)
    except ModelError as error:
        assert str(error).startswith(str(path))
