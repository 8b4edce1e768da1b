"""The two layouts of what feeds the FFN's neurons hold the same weights and give the same text; which one a model gets, where
its conversion is kept, and what `info` says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_gguf import LlamaShape
from mixed_gguf import write_mixed
from packed_reader import read_packed
from sparse_run import _core
from sparse_run.convert import convert
from sparse_run.convert.layout import LAYOUTS, by_neuron
from sparse_run.convert.neuron_file import write_neuron_file
from sparse_run.errors import UsageError
from sparse_run.packed_header import read_header

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
SHAPE = LlamaShape(n_layers=2, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=320, n_vocab=400)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q6_K", "Q8_0"])
def test_both_layouts_hold_the_same_weights(kind: str, tmp_path: Path) -> None:
    write_mixed(tmp_path / "m.gguf", SHAPE, {"": "Q8_0" if kind.endswith("_K") else kind, "ffn_gate": kind, "ffn_up": kind})
    convert(tmp_path / "m.gguf", tmp_path / "panels", layout="panels")
    convert(tmp_path / "m.gguf", tmp_path / "neurons", layout="neurons")
    panels, first = read_packed(tmp_path / "panels")
    neurons, second = read_packed(tmp_path / "neurons")
    assert panels.keys() == neurons.keys()
    for name, values in panels.items():
        # Rows round the scales of K types to halves.
        rounded = kind.endswith("_K") and name.endswith("ffn_gate_up")
        atol = np.abs(values).max() * 2.0**-10 if rounded else 0
        np.testing.assert_allclose(neurons[name], values, rtol=0, atol=atol, err_msg=name)
    for name, layout in second.items():
        assert layout["layout"] == ("neurons" if name.endswith("ffn_gate_up") else "panels"), name
        assert first[name]["layout"] == "panels" and first[name]["kind"] == layout["kind"]


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_both_layouts_choose_the_same_tokens(kind: str, tmp_path: Path) -> None:
    write_mixed(tmp_path / "m.gguf", SHAPE, {"": kind})
    prompt = np.random.default_rng(1).integers(0, SHAPE.n_vocab, 30).astype(np.int32)
    logits, chosen = [], []
    for layout in ("panels", "neurons"):
        convert(tmp_path / "m.gguf", tmp_path / layout, layout=layout)
        model = _core.Model(str(tmp_path / layout), 2)
        session = _core.Session(model, 64)
        logits.append(session.eval_all(prompt))
        sampler = _core.Sampler(temperature=0.0)
        chosen.append([session.step(sampler) for _ in range(20)])
        model.close()
    # The integers are the same, the order of float sums is not.
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=(1e-4 if kind == "F32" else 0.02) * abs(logits[0]).max())
    assert chosen[0] == chosen[1]


def test_auto_means_neurons_where_the_activation_gives_zeros() -> None:
    dense: dict[str, Any] = {"activation": "silu"}
    zeros: list[dict[str, Any]] = [
        {"activation": "relu"},
        {"activation": "relu2"},
        {"activation": "silu", "activation_threshold": 0.01},
        {"activation": "silu", "up_relu": True},
    ]
    assert not by_neuron("auto", dense) and by_neuron("neurons", dense)
    for config in zeros:
        assert by_neuron("auto", config) and not by_neuron("panels", config)
    assert LAYOUTS == ("auto", "panels", "neurons")


def test_info_shows_the_layout_and_the_cache_keeps_both(tmp_path: Path, run_cli: RunCli) -> None:
    gguf = tmp_path / "m.gguf"
    write_mixed(gguf, SHAPE, {"": "Q8_0"})
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    paths = {}
    for layout in LAYOUTS:
        done = run_cli("convert", gguf, "--layout", layout, "--json", env=env)
        assert done.returncode == 0, done.stderr
        paths[layout] = Path(json.loads(done.stdout)["path"])
        told = run_cli("info", paths[layout], "--json", env=env)
        assert told.returncode == 0, told.stderr
        facts = json.loads(told.stdout)
        assert facts["layout"] == ("neurons" if layout == "neurons" else "panels")
        parameters = facts["weights"]["ffn"]["parameters"]
        assert parameters == SHAPE.n_layers * 3 * SHAPE.n_embd * SHAPE.n_ff
        assert ("layout " + facts["layout"]) in run_cli("info", paths[layout], env=env).stdout
    assert len(set(paths.values())) == 3 and all(path.is_dir() for path in paths.values())
    # A source that has changed makes its older conversions useless.
    write_mixed(gguf, SHAPE, {"": "Q4_0"})
    assert run_cli("convert", gguf, env=env).returncode == 0
    assert not any(path.exists() for path in paths.values())
    bad = run_cli("convert", gguf, "--layout", "rows", env=env)
    assert bad.returncode == 2 and "rows" in bad.stderr


def test_sites_that_a_layout_lacks_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_mixed(tmp_path / "m.gguf", SHAPE, {"": "Q8_0"})
    t = [np.full(1, 0.1, np.float32)] * SHAPE.n_layers
    for layout, refused, remedy in (("panels", "G", "--layout neurons"), ("neurons", "M", "--layout panels")):
        convert(tmp_path / "m.gguf", tmp_path / layout, layout=layout)
        model = _core.Model(str(tmp_path / layout), 1)
        header = read_header(tmp_path / layout)
        assert header.maskable("M", 0) == (layout == "panels") and header.maskable("Z", 0)
        with pytest.raises(UsageError, match=remedy):
            _core.Sparsity(model, {refused: t})
        for site in "AOZ":
            _core.Sparsity(model, {site: t})
        model.close()


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    from sparse_run.errors import ModelError

    write_mixed(tmp_path / "m.gguf", SHAPE, {"": "Q8_0"})
    convert(tmp_path / "m.gguf", tmp_path / "sound", layout="neurons")
    sound = (tmp_path / "sound" / "weights.safetensors").read_bytes()
    for old, new in (
        (b'\\"neurons\\": 320', b'\\"neurons\\": 319'),
        (b'\\"gated\\": true', b'\\"gated\\": null'),
        (b'\\"cols\\": 256, \\"gated\\"', b'\\"cols\\": 255, \\"gated\\"'),
        (b'\\"kind\\": \\"q8\\", \\"neurons\\"', b'\\"kind\\": \\"q4\\", \\"neurons\\"'),
    ):
        assert old in sound
        shutil.copytree(tmp_path / "sound", tmp_path / "bad", dirs_exist_ok=True)
        (tmp_path / "bad" / "weights.safetensors").write_bytes(sound.replace(old, new, 1))
        with pytest.raises(ModelError, match="ffn_gate_up"):
            _core.Model(str(tmp_path / "bad"), 1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_single_neurons_and_heads_hold_all_of_down(kind: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    shape = LlamaShape(n_layers=1, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=512, n_vocab=300)
    write_mixed(tmp_path / "m.gguf", shape, {"": "Q8_0", "ffn_down": kind})
    packed = tmp_path / "m"
    convert(tmp_path / "m.gguf", packed, layout="neurons")
    ids = np.random.default_rng(5).permutation(512)
    tensors = load_file(write_neuron_file(packed, ids[None]))
    part = read_header(packed).parts["Z"][0][0]
    m = part.layout
    assert ("superblock" in m) == kind.endswith("_K") and m["panel_rows"] >= m["rows"]
    blob = np.fromfile(packed / "weights.safetensors", np.uint8)[part.begin : part.end]
    # Records: a gate and an up row of Q8_0, then the column's run. Heads: units, then the head of each of 16 slabs.
    rows, run = 2 * -(-256 * 34 // 32 // 64) * 64, 256 * int(m["kind"][1:]) // 8
    records = tensors["layers.0.ffn_records"].reshape(512, -1)[tensors["layers.0.ffn_positions"].view("<u4")]
    runs = records[:, rows : rows + run].reshape(16, -1)
    heads, planes = tensors["layers.0.ffn_heads"], 2 if m["min"] else 1
    units = 2 * planes * 256 * 2 if "superblock" in m else 0
    slabs = np.concatenate([heads[units:].reshape(16, -1), runs], 1)
    np.testing.assert_array_equal(np.concatenate([heads[:units], slabs.reshape(-1)]), blob)
