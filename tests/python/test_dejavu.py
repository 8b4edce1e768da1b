"""Deja Vu's offline half on a small ReLU model that was really trained: predictors beat chance and the previous token's set,
thresholds reach the wanted recall, and the file holds what was measured. Its arithmetic, on cases known beforehand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sparse_run import _core, sparsity
from sparse_run.errors import ModelError, UsageError
from sparse_run.packed_header import PackedHeader
from sparse_run.predictors.common.layers import Stream
from sparse_run.predictors.dejavu import predictor as low_rank
from sparse_run.predictors.dejavu.fit import Fit, Options, advice, rank_for
from sparse_run.predictors.dejavu.traces import active_neurons, needed_heads, normalised, traces
from sparse_run.skipping import Attached, bind
from sparse_run.tokenizer import Tokenizer

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def packed(relu_packed: Path) -> Path:
    return relu_packed


@pytest.fixture(scope="module")
def text(shared_dir: Path) -> str:
    """Not what the model was trained on."""
    return (shared_dir / "data" / "calibration" / "technical.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def made(model: _core.Model, header: PackedHeader, text: str, torch: Any) -> sparsity.SparsityFile:
    options = Options(tokens=6144, ctx=256, rank=32, epochs=10, recall=0.9, heads=True)
    return Fit(model, Tokenizer.load(header.path), header, options, text=text).file()


def test_predictors_beat_chance_and_the_previous_token(made: sparsity.SparsityFile) -> None:
    n = made.quality["neurons"]
    assert made.quality["true_zeros"] and len(n["layers"]) == 3
    # The model is sparse at all, and the sets change from token to token.
    assert 0.01 < n["active"] < 0.5 and n["previous_token_recall"] < 0.9
    assert n["previous_token_density"] == pytest.approx(n["active"], rel=0.1)
    assert n["recall"] >= 0.9 - 1e-9 and n["density"] < 0.75
    for layer in n["layers"]:
        assert layer["recall"] > layer["density"] + 0.2, "chance finds as much as it reads"
        assert layer["recall_at_previous_density"] > layer["previous_token_recall"] + 0.03
    heads = made.quality["heads"]
    assert len(heads["layers"]) == 2, "the first layer has no earlier input"
    assert heads["recall"] >= 0.9 - 1e-9 and heads["density"] < 1
    assert "not better" not in advice(made) and "meant for" not in advice(made)


def test_the_report_is_what_the_stored_arrays_do(
    made: sparsity.SparsityFile, model: _core.Model, header: PackedHeader, text: str
) -> None:
    """Recall and density again, in NumPy, from the file's arrays and the held-out rows."""
    options = Options(tokens=6144, ctx=256, rank=32, epochs=10, recall=0.9, heads=True)
    fit = Fit(model, Tokenizer.load(header.path), header, options, text=text)
    chunks, held = fit.chunks()
    assert 2 <= held.sum() < len(held) / 2
    stream = Stream(model, chunks[held])
    for layer in range(header.n_layers):
        x = stream.x[:, 16:].reshape(-1, header.width("M")).astype(np.float64)
        h = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12)
        a, b = (made.arrays[f"predictor.{layer}.neurons.{key}"] for key in "ab")
        scale_a, scale_b = (made.arrays[f"predictor.{layer}.neurons.{key}_scale"] for key in "ab")
        assert a.dtype == b.dtype == np.int8 and a.shape == (32, 96) and b.shape == (384, 32)
        logits = (h @ (a * scale_a[:, None]).T) @ (b * scale_b[:, None]).T
        predicted = logits > made.arrays[f"predictor.{layer}.neurons.threshold"]
        z = []
        for i in range(len(stream.x)):
            stream.x[i], taps = stream.run(layer, stream.x[i], taps=True)
            z.append(taps["Z"][16:])
        needed = np.concatenate(z) != 0
        rows = needed.any(1)
        found = ((predicted & needed).sum(1)[rows] / needed.sum(1)[rows]).mean()
        report = made.quality["neurons"]["layers"][layer]
        assert report["recall"] == pytest.approx(found, abs=2e-3)
        assert report["density"] == pytest.approx(predicted.mean(), abs=2e-3)
        assert report["active"] == pytest.approx(needed.mean(), abs=1e-6)


def test_decoding_with_the_predictors(
    made: sparsity.SparsityFile, model: _core.Model, header: PackedHeader, text: str
) -> None:
    """The engine predicts what NumPy predicts, and what is measured in the file is what decoding with it does."""
    q = made.quality
    assert q["perplexity"] < 1.5 * q["perplexity_dense"] and q["kl_mean"] > 0 and q["top1_agreement"] > 0.5
    assert q["tokens_per_s"] > 0 and q["tokens_per_s_dense"] > 0
    assert q["density"]["N"] == pytest.approx(q["neurons"]["density"], abs=0.05) and 0 < q["density"]["H"] < 1
    ids = np.frombuffer(text.encode()[5000:5200], np.uint8).astype(np.int32)
    session = _core.Session(model, 256)
    session.set_predictor(_core.Predictor(model, made.arrays, 16), measure=True)
    dense = _core.Session(model, 256)
    assert np.array_equal(session.eval_all(ids), dense.eval_all(ids)), "measuring leaves nothing out"
    found = session.density()
    stream = Stream(model, ids[None])
    kept = needed = hit = 0
    for layer in range(3):
        h = normalised(stream.x[0, 16:])
        stream.x[0], taps = stream.run(layer, stream.x[0], taps=True)
        trained = low_rank.read(made.arrays, layer, "neurons", n_embd=96, n=384)
        assert trained is not None
        predicted, active = trained.predict(h), taps["Z"][16:] != 0
        kept, needed, hit = kept + predicted.sum(), needed + active.sum(), hit + (predicted & active).sum()
    # The engine rounds what a predictor reads to 8 bits.
    assert found["N"] == pytest.approx(kept / (3 * 184 * 384), rel=0.02)
    assert found["recall"] == pytest.approx(hit / needed, abs=0.01)

    everything = {k: np.full_like(v, -1e30) if k.endswith("threshold") else v for k, v in made.arrays.items()}
    all_of_it = replace(made, arrays=everything)
    attached = Attached(_core.Session(model, 256), bind(all_of_it, model), blocks=True)
    dense.truncate(0)
    assert np.array_equal(attached.logits(ids), dense.eval_all(ids))
    blocks = Attached(_core.Session(model, 256), bind(made, model), blocks=True)
    by_blocks = blocks.logits(ids[:60])
    single = Attached(_core.Session(model, 256), bind(made, model))
    single.prompt(ids[:16])
    for i in range(16, 60):
        single.session.eval(ids[i : i + 1])
        assert np.array_equal(single.session.logits(), by_blocks[i])
    assert single.session.density()["N"] < 0.75
    with pytest.raises(ModelError, match="holds no predictors"):
        bind(replace(made, arrays={}), model)


def test_the_file_survives_and_damage_is_named(made: sparsity.SparsityFile, header: PackedHeader, tmp_path: Path) -> None:
    path = sparsity.save(made, tmp_path / "dejavu.safetensors")
    again = sparsity.load(path, header)
    assert again.method == "dejavu" and again.quality == made.quality and again.arrays.keys() == made.arrays.keys()
    got = low_rank.read(again.arrays, 1, "neurons", n_embd=96, n=384)
    assert got is not None and all(np.array_equal(getattr(got, k), v) for k, v in (("a", made.arrays["predictor.1.neurons.a"]),))
    assert low_rank.read(again.arrays, 0, "heads", n_embd=96, n=4) is None
    broken = dict(again.arrays)
    broken["predictor.1.neurons.b"] = broken["predictor.1.neurons.b"][:-1]
    with pytest.raises(ModelError, match=r"predictor\.1\.neurons\.b is int8 \[383, 32\].*train it again"):
        low_rank.read(broken, 1, "neurons", n_embd=96, n=384)
    broken["predictor.1.neurons.b"] = again.arrays["predictor.1.neurons.b"]
    broken["predictor.1.neurons.threshold"] = np.full(384, np.nan, np.float32)
    with pytest.raises(ModelError, match="threshold"):
        low_rank.read(broken, 1, "neurons", n_embd=96, n=384)
    del broken["predictor.1.neurons.threshold"]
    with pytest.raises(ModelError, match="is missing"):
        low_rank.read(broken, 1, "neurons", n_embd=96, n=384)


def test_command_line_on_a_model_without_true_zeros(
    stories_gguf: Path, run_cli: RunCli, tmp_path: Path, torch: Any
) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    small = ("--tokens", 512, "--ctx", 128, "--epochs", 3, "--rank", 16, "--bits", 4, "-t", 2)
    done = run_cli("train-predictor", "-m", stories_gguf, *small, "--json", env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["quality"]["true_zeros"] is False and "meant for FFNs of ReLU type" in found["advice"]
    assert f"{found['quality']['neurons']['recall']:.1%}" in found["advice"]
    assert Path(found["path"]).is_file() and found["quality"]["predictor_bytes"] > 0
    # Before the work, which takes hours with a real model, and not after it alone.
    for warning in ("its FFN is stored in the layout panels", "gives no exact zeros"):
        assert 0 <= done.stderr.find(warning) < done.stderr.find("text of the model's own")
    assert run_cli("train-predictor", "-m", stories_gguf, "--recall", 1.5, env=env).returncode == 2
    assert run_cli("train-predictor", "-m", stories_gguf, "--tokens", 300, env=env).returncode == 2
    drawn = run_cli("plot", "-m", stories_gguf, "-o", tmp_path / "pictures", env=env)
    assert drawn.returncode == 0 and (tmp_path / "pictures" / "predictor.svg").is_file(), drawn.stderr


def test_without_torch_one_line_says_what_to_install(run_cli: RunCli, tmp_path: Path) -> None:
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_cli("train-predictor", "-m", "no-such.gguf", env={"PYTHONPATH": path})
    assert done.returncode == 2 and "pip install 'sparse-run[train]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_labels() -> None:
    z = np.asarray([[0.0, 3.0, -4.0, 0.0], [1.0, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]], np.float32)
    assert active_neurons(z, True).tolist() == [[False, True, True, False], [True] * 4, [False] * 4]
    # 16 of 25 is 64%, so both are needed; 1 of 1.03 is 97%; a row of zeros needs nothing.
    assert active_neurons(z, False).tolist() == [[False, True, True, False], [True, False, False, False], [False] * 4]
    o = np.asarray([[1, 0, 0, 0.5, 3, 0, 0, 2]], np.float32)
    assert needed_heads(o, 4, 0.5).tolist() == [[False, False, True, True]]
    assert needed_heads(o, 4, 0.1).tolist() == [[False, False, True, False]]
    x = RNG.standard_normal((3, 8)).astype(np.float32) * 7
    np.testing.assert_allclose(np.square(normalised(x)).mean(1), 1, rtol=1e-5)


def test_traces_line_up_with_their_tokens(model: _core.Model, header: PackedHeader, text: str) -> None:
    """Row by row against a run of the chunk alone; the second layer's `before` is the first one's x."""
    ids = np.frombuffer(text.encode()[:256], np.uint8).astype(np.int32).reshape(2, 128)
    held = np.asarray([False, True])
    first, second = list(traces(model, ids, config=header.config, drop=8, held_chunks=held))[:2]
    assert first.before is None and second.before is not None and np.array_equal(second.before, first.x)
    assert first.held.tolist() == [False] * 120 + [True] * 120
    assert np.flatnonzero(first.first).tolist() == [0, 120]
    session = _core.Session(model, 128)
    x = session.embed(ids[1])
    after, taps = session.run_layer(0, 0, x, taps=True)
    assert np.array_equal(first.x[120:], normalised(x[8:])) and np.array_equal(second.x[120:], normalised(after[8:]))
    assert np.array_equal(first.active[120:], taps["Z"][8:] != 0)


def curve_of(values: NDArray[np.float64], needed: NDArray[np.bool_]) -> low_rank.Curve:
    """The curve of a predictor whose logits are `values`."""
    n = values.shape[1]
    p = low_rank.make(np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32), np.zeros(n, np.float32))
    return low_rank.curve(p, values.astype(np.float32), needed)


def test_thresholds_are_chosen_for_all_layers_together() -> None:
    """A layer that is hard to predict gives up recall before one that is easy, and the mean is what was asked for."""
    needed = RNG.random((400, 64)) < 0.2
    easy = curve_of(needed * 4.0 + RNG.standard_normal(needed.shape), needed)
    hard = curve_of(needed * 0.5 + RNG.standard_normal(needed.shape), needed)
    chosen = low_rank.joint_offsets([easy, hard], 0.8)
    at = [int(np.searchsorted(c.offsets, o)) for c, o in zip((easy, hard), chosen, strict=True)]
    recalls = [c.recall[i] for c, i in zip((easy, hard), at, strict=True)]
    density = sum(c.density[i] for c, i in zip((easy, hard), at, strict=True))
    assert np.mean(recalls) >= 0.8 and recalls[0] > 0.95 and recalls[1] < 0.8
    alike = sum(np.interp(0.8, c.recall[::-1], c.density[::-1]) for c in (easy, hard))
    assert density < alike, "cheaper than the same recall in both"
    assert easy.recall[0] == 1 and easy.density[0] == 1 and easy.density[-1] == 0
    assert np.all(np.diff(easy.recall) <= 0) and np.all(np.diff(easy.density) <= 0)


def test_the_previous_tokens_set_is_measured_within_chunks() -> None:
    needed = np.asarray([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 1]], bool)
    first = np.asarray([True, False, True, False])
    recall, density = low_rank.previous_token(needed, first)
    assert recall == pytest.approx((1 / 2 + 1 / 2) / 2) and density == pytest.approx((2 + 1) / 8)


def test_quantised_weights_keep_the_logits() -> None:
    a, b = RNG.standard_normal((16, 48)).astype(np.float32), RNG.standard_normal((80, 16)).astype(np.float32)
    a[3] = 0
    bias = RNG.standard_normal(80).astype(np.float32)
    p = low_rank.make(a, b, bias)
    h = RNG.standard_normal((50, 48)).astype(np.float32)
    exact = (h @ a.T) @ b.T
    error = np.linalg.norm(p.logits(h) - exact) / np.linalg.norm(exact)
    assert error < 0.02 and p.a_scale[3] == 0
    assert np.array_equal(p.threshold, -bias)
    assert (p.predict(h) == (exact + bias > 0)).mean() > 0.98
    assert p.nbytes == 16 * 48 + 80 * 16 + 4 * (16 + 80 + 80)
    small = low_rank.make(a, b, bias, 4)
    assert max(np.abs(small.a).max(), np.abs(small.b).max()) == 7, "what the core holds in 4 bits a weight"
    assert small.nbytes == (16 * 48 + 80 * 16) // 2 + 4 * (16 + 80 + 80)
    assert 0.02 < np.linalg.norm(small.logits(h) - exact) / np.linalg.norm(exact) < 0.3


def test_ranks_and_options() -> None:
    assert [rank_for(n, 0) for n in (48, 96, 576, 2048, 4096)] == [32, 32, 64, 256, 512]
    assert rank_for(64, 100) == 64 and rank_for(576, 100) == 100
    wrong_ones = ({"recall": 0.0}, {"recall": 1.0}, {"ctx": 32}, {"tokens": 1000}, {"rank": -1}, {"dense_tokens": 300})
    for wrong in (*wrong_ones, {"bits": 5}):
        with pytest.raises(UsageError):
            Options(**wrong)
