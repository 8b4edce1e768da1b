"""Neuron sets and statistics through the bindings: what Python gives and gets, and how mistakes are told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from llama_gguf import LlamaShape
from mixed_gguf import write_mixed
from sparse_run import _core
from sparse_run.convert import convert
from sparse_run.errors import UsageError

SHAPE = LlamaShape(n_layers=2, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=512, n_vocab=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_core.Model]:
    folder = tmp_path_factory.mktemp("neurons")
    write_mixed(folder / "m.gguf", SHAPE, {"": "Q4_1"})
    convert(folder / "m.gguf", folder / "packed", layout="neurons")
    model = _core.Model(str(folder / "packed"), 2)
    yield model
    model.close()


def prompt(n: int = 60) -> np.ndarray:
    return np.random.default_rng(2).integers(0, SHAPE.n_vocab, n).astype(np.int32)


def test_sets_chosen_by_a_prompt_are_what_decoding_computes(model: _core.Model) -> None:
    session = _core.Session(model, 128)
    session.collect("griffin")
    session.eval(prompt())
    statistic = session.statistic()
    assert statistic.shape == (SHAPE.n_layers, SHAPE.n_ff) and session.collected == 60
    # Every token's squares sum to 1.
    np.testing.assert_allclose(statistic.sum(1), 60, rtol=1e-5)
    keep = SHAPE.n_ff // 4
    best = np.sort(np.argsort(-statistic[1], kind="stable")[:keep]).astype(np.int32)
    session.density()
    session.set_neurons([None, best])
    sampler = _core.Sampler(temperature=0.0)
    chosen = [session.step(sampler) for _ in range(8)]
    density = session.density()
    assert density["N"] == keep / SHAPE.n_ff and 0 < density["body"] < 1
    # The same, computed as blocks with all other neurons masked.
    other = _core.Session(model, 128)
    other.eval(prompt())
    other.set_neurons([None, best], mask_prefill=True)
    masked = other.eval_all(np.asarray(chosen[:-1], np.int32))
    assert masked.argmax(1).tolist() == chosen[1:]
    session.set_neurons(None)
    assert session.statistic().tobytes() == statistic.tobytes(), "decoded tokens are not counted"


def test_statistics_follow_their_definitions(model: _core.Model) -> None:
    ids = prompt()
    stream = _core.Session(model, 128)
    x = stream.embed(ids)
    griffin, core = np.zeros((2, SHAPE.n_layers, SHAPE.n_ff))
    for layer in range(SHAPE.n_layers):
        x, taps = stream.run_layer(layer, 0, x, taps=True)
        z = taps["Z"].astype(np.float64)
        griffin[layer] = (z**2 / (z**2).sum(1, keepdims=True)).sum(0)
        for row in taps["Z"]:
            core[layer][np.argsort(-row, kind="stable")[: -(-int((row > 0).sum()) // 5)]] += 1
    for kind, wanted in (("griffin", griffin), ("core", core)):
        session = _core.Session(model, 128)
        session.collect(kind)
        session.eval(ids[:25])
        session.eval(ids[25:])
        np.testing.assert_allclose(session.statistic(), wanted, rtol=1e-5)


def test_mistakes_are_told(model: _core.Model) -> None:
    session = _core.Session(model, 16)
    good = np.arange(4, dtype=np.int32)
    for bad in (good[::-1].copy(), np.asarray([0, 512], np.int32), np.asarray([3, 3], np.int32)):
        with pytest.raises(UsageError, match="layer 1 must be ascending, from 0 to 511"):
            session.set_neurons([None, bad])
    for sets, words in (([good], "1 layers"), ([], "0 layers"), ([None, good.astype(np.int64)], "int32")):
        with pytest.raises(UsageError, match=words):
            session.set_neurons(sets)
    with pytest.raises(UsageError, match="unknown statistic 'mean'"):
        session.collect("mean")
    with pytest.raises(UsageError, match="call collect"):
        session.statistic()


def low_rank(rng: np.random.Generator, rank: int, n: int, at: float) -> dict[str, np.ndarray]:
    return {
        "a": rng.integers(-127, 128, (rank, SHAPE.n_embd)).astype(np.int8),
        "a_scale": np.full(rank, 0.001, np.float32),
        "b": rng.integers(-127, 128, (n, rank)).astype(np.int8),
        "b_scale": np.full(n, 0.001, np.float32),
        "threshold": np.full(n, at, np.float32),
    }


def predictor_arrays(at: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    arrays = {}
    for layer in range(SHAPE.n_layers):
        for what, n in (("neurons", SHAPE.n_ff), ("heads", SHAPE.n_heads)):
            if what == "neurons" or layer:
                made = low_rank(rng, 16, n, at)
                arrays |= {f"predictor.{layer}.{what}.{key}": value for key, value in made.items()}
    return arrays


def test_predictors_decode_what_they_mask_in_blocks_and_report_it(model: _core.Model) -> None:
    ids = prompt()
    predictor = _core.Predictor(model, {**predictor_arrays(), "clusters.x": np.zeros(3)}, dense_tokens=20)
    assert predictor.dense_tokens == 20 and predictor.nbytes > SHAPE.n_layers * 16 * (SHAPE.n_ff + SHAPE.n_embd)
    masked, decoding, dense = (_core.Session(model, 128) for _ in range(3))
    masked.set_predictor(predictor, mask_prefill=True)
    rows = masked.eval_all(ids)
    decoding.set_predictor(predictor)
    decoding.eval(ids[:20])
    decoding.density()
    for i in range(20, 60):
        decoding.eval(ids[i : i + 1])
        assert np.array_equal(decoding.logits(), rows[i]), i
    density = decoding.density()
    assert 0.05 < density["N"] < 0.95 and 0.05 < density["H"] < 0.95 and 0 < density["body"] < 1.2
    assert "recall" not in density
    of_blocks = masked.density()
    assert [of_blocks[site] for site in "NHZO"] == [density[site] for site in "NHZO"]
    assert not np.array_equal(dense.eval_all(ids)[30], rows[30])
    # Measured: nothing is left out.
    measured = _core.Session(model, 128)
    measured.set_predictor(predictor, measure=True)
    dense.truncate(0)
    assert np.array_equal(measured.eval_all(ids), dense.eval_all(ids))
    report = measured.density()
    # SwiGLU has no zeros: recall is the share that is named.
    assert report["N"] == pytest.approx(report["recall"], abs=1e-6)


def test_predictors_that_do_not_fit_are_refused(model: _core.Model) -> None:
    sound = predictor_arrays()
    for key, value, words in (
        ("predictor.0.neurons.b", sound["predictor.0.neurons.b"][:500], "do not fit together"),
        ("predictor.0.neurons.a", sound["predictor.0.neurons.a"][:, :200], "do not fit together"),
        ("predictor.0.neurons.a", sound["predictor.0.neurons.a"].astype(np.int16), "int8"),
        ("predictor.1.heads.threshold", np.full(4, np.nan, np.float32), "not a finite number"),
        ("predictor.0.heads.a", sound["predictor.1.heads.a"], "predictor.0.heads.a_scale is missing"),
    ):
        with pytest.raises(UsageError, match=words):
            _core.Predictor(model, {**sound, key: value})
    with pytest.raises(UsageError, match="no predictor"):
        _core.Predictor(model, {})
    with pytest.raises(UsageError, match="dense_tokens"):
        _core.Predictor(model, sound, dense_tokens=-1)
