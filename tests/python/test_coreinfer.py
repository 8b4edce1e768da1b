"""GRIFFIN and CoreInfer: statistics are those of plain NumPy loops, the chosen sets decode what the masked model computes, the
file does in a conversation what it says, clusters find what was put in."""

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
from sparse_run import Model, _core, sparsity
from sparse_run.errors import ModelError, UsageError
from sparse_run.eval import compare
from sparse_run.packed_header import PackedHeader
from sparse_run.predictors.common.calibration import Options
from sparse_run.predictors.coreinfer import clusters, selection
from sparse_run.predictors.coreinfer.fit import Fit, Griffin
from sparse_run.predictors.coreinfer.selection import Choice
from sparse_run.skipping import Attached, bind
from sparse_run.tokenizer import Tokenizer

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = Options(tokens=1024, eval_tokens=512, ctx=256)


@pytest.fixture(scope="module")
def ids(smollm2_neurons: Path, shared_dir: Path) -> NDArray[np.int32]:
    text = (shared_dir / "data" / "text" / "wikitext-2.test.raw").read_text("utf-8")[:8_000]
    return np.asarray(Tokenizer.load(smollm2_neurons).encode(text, parse_special=False)[:600], np.int32)


def prompt_z(model: _core.Model, header: PackedHeader, ids: NDArray[np.int32]) -> list[NDArray[np.float32]]:
    """act(gate) * up of a prompt, layer by layer."""
    session = _core.Session(model, len(ids))
    x, out = session.embed(ids), []
    for layer in range(header.n_layers):
        x, taps = session.run_layer(layer, 0, x, taps=True)
        out.append(taps["Z"])
    return out


def test_statistics_are_those_of_numpy(model: _core.Model, header: PackedHeader, ids: NDArray[np.int32]) -> None:
    """The engine's, over a prompt that is cut into blocks in another way, against loops that follow the papers' words."""
    prompt = ids[:100]
    zs = prompt_z(model, header, prompt)
    found = {}
    for kind in selection.STATISTICS:
        session = _core.Session(model, 128)
        session.collect(kind)
        session.eval(prompt[:37])
        session.eval(prompt[37:])
        assert session.collected == 100
        found[kind] = session.statistic().copy()
    for layer in (0, 11, header.n_layers - 1):
        z = zs[layer].astype(np.float64)
        squares = np.zeros(z.shape[1])
        counts = np.zeros(z.shape[1], np.int64)
        for row in z:
            squares += (row / np.sqrt((row**2).sum())) ** 2
            positive = sorted((-v, j) for j, v in enumerate(row) if v > 0)
            for _, j in positive[: -(-len(positive) // 5)]:
                counts[j] += 1
        np.testing.assert_allclose(found["griffin"][layer], squares, rtol=1e-4)
        np.testing.assert_allclose(selection.griffin_squares(zs[layer]), squares, rtol=1e-9)
        assert np.array_equal(found["core"][layer], counts) and np.array_equal(selection.core_counts(zs[layer]), counts)
        kept = selection.top(found["griffin"][layer], 768)
        assert len(set(kept) ^ set(np.argsort(-squares)[:768])) <= 2, "float32 sums may swap neighbours at the border"


def test_a_set_decodes_what_the_masked_model_computes(
    model: _core.Model, header: PackedHeader, ids: NDArray[np.int32]
) -> None:
    """Decoding with a set has the bits of thresholds of site G that only the set passes, and of blocks."""
    chosen = Choice(density=0.4, first=2, last=1)
    one = _core.Session(model, 160)
    attached = Attached(one, replace(bind(example(header, chosen), model)))
    attached.prompt(ids[:80])
    sets = attached.sets
    assert sets is not None and sets[0] is None and sets[1] is None and sets[-1] is None
    middle = sets[2]
    assert middle is not None and len(middle) == round(0.4 * 1536) and (np.diff(middle) > 0).all()
    session = _core.Session(model, 160)
    session.collect("griffin")
    session.eval(ids[:80])
    for a, b in zip(sets, selection.choose(session.statistic(), chosen), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))

    thresholds: list[NDArray[np.float32] | None] = []
    for s in sets:
        t = np.full(1536, np.finfo(np.float32).max, np.float32)
        t[s if s is not None else slice(None)] = 0
        thresholds.append(None if s is None else t)
    masked = _core.Session(model, 160)
    masked.eval(ids[:80])
    masked.set_sparsity(_core.Sparsity(model, {"G": thresholds}, dense_tokens=0), mask_prefill=True)
    by_mask = masked.eval_all(ids[80:110])
    blocks = Attached(_core.Session(model, 160), bind(example(header, chosen), model), blocks=True)
    blocks.prompt(ids[:80])
    by_blocks = blocks.logits(ids[80:110])
    one.density()
    for i in range(80, 110):
        one.eval(ids[i : i + 1])
        assert np.array_equal(one.logits(), by_mask[i - 80]) and np.array_equal(one.logits(), by_blocks[i - 80])
    density = one.density()
    assert density["N"] == pytest.approx(0.4, abs=1e-3), "of the layers that are not protected"
    dense = _core.Session(model, 160)
    assert not np.array_equal(dense.eval_all(ids[:110])[80:], by_mask)


def example(header: PackedHeader, choice: Choice, **changes: Any) -> sparsity.SparsityFile:
    values: dict[str, Any] = {
        "method": "griffin",
        "thresholds": {},
        "levels": {},
        "dense_tokens": 0,
        "model_name": "SmolLM2",
        "fingerprint": header.fingerprint,
        "shape": header.shape,
        "quantisation": header.quantisation,
        "options": {
            "statistic": choice.statistic,
            "density": choice.density,
            "first": choice.first,
            "last": choice.last,
            "min_prompt": choice.min_prompt,
        },
    }
    return sparsity.SparsityFile(**{**values, **changes})


def test_keeping_everything_is_dense(model: _core.Model, header: PackedHeader, ids: NDArray[np.int32]) -> None:
    for chosen in (Choice(density=1.0), Choice(density=0.5, first=30), Choice(density=0.5, min_prompt=200)):
        attached = Attached(_core.Session(model, 128), bind(example(header, chosen), model), blocks=True)
        attached.prompt(ids[:64])
        dense = _core.Session(model, 128)
        dense.eval(ids[:64])
        assert np.array_equal(attached.logits(ids[64:90]), dense.eval_all(ids[64:90]))
        everything = [np.arange(1536, dtype=np.int32)] * 30
        attached.session.set_neurons(everything, mask_prefill=True)
        attached.session.truncate(64)
        assert np.array_equal(attached.session.eval_all(ids[64:90]), _again(dense, ids))


def _again(dense: _core.Session, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    dense.truncate(64)
    return dense.eval_all(ids[64:90])


def test_a_conversation_chooses_after_each_prompt(
    smollm2_neurons: Path, header: PackedHeader, ids: NDArray[np.int32], tmp_path: Path
) -> None:
    """Through the public API: prompts add up while the cache grows, begin anew with an empty one, and stay dense when short."""
    path = sparsity.save(example(header, Choice(density=0.3)), tmp_path / "griffin.safetensors")
    with Model.load(smollm2_neurons, threads=1) as opened:
        dense = opened.session(ctx_size=256)
        expected = dense.generate(ids[:60].tolist(), max_tokens=12, temperature=0, ignore_eos=True)
        expected.read()
        opened.set_sparsity(str(path))
        session = opened.session(ctx_size=256)
        short = session.generate(ids[:8].tolist(), max_tokens=2, temperature=0, ignore_eos=True)
        short.read()
        attached = session._attached
        assert attached is not None and attached.sets is None
        sparse = session.generate(ids[:60].tolist(), max_tokens=12, temperature=0, ignore_eos=True)
        sparse.read()
        assert attached.sets is not None and sparse.tokens[0] == expected.tokens[0], "the prompt itself is dense"
        assert sparse.tokens != expected.tokens
        core = session._opened()
        first, seen = attached.sets, core.collected
        # The first 8 tokens were observed with the short prompt, and their cache was used again.
        assert seen == 60
        more = [*ids[:60].tolist(), *sparse.tokens, *ids[60:100].tolist()]
        session.generate(more, max_tokens=2, temperature=0, ignore_eos=True).read()
        assert core.collected > seen + 39 and any(
            a is not None and b is not None and not np.array_equal(a, b)
            for a, b in zip(first, attached.sets, strict=True)
        )
        # Regenerating keeps what was observed; another text begins anew, although its first token is in the cache.
        session.generate(ids[:60].tolist(), max_tokens=1, temperature=0, ignore_eos=True).read()
        assert core.collected > 90
        other = [int(ids[0]), *ids[200:270].tolist()]
        session.generate(other, max_tokens=1, temperature=0, ignore_eos=True).read()
        assert core.collected == 70
        session.clear()
        session.generate(ids[:60].tolist(), max_tokens=1, temperature=0, ignore_eos=True).read()
        assert core.collected == 60
        for a, b in zip(first, attached.sets, strict=True):
            assert a is not None and b is not None and np.array_equal(a, b)


def test_what_half_of_the_neurons_costs(model: _core.Model, header: PackedHeader, text: str, ids: NDArray[np.int32]) -> None:
    fit = Griffin(model, Tokenizer.load(header.path), header, SMALL, text=text)
    found = {}
    for level in (0.25, 0.6):
        file = fit.file("uniform", level, measure=False)
        assert file.method == "griffin" and file.levels == {"N": [level] * 30} and file.options["prompt_tokens"] == 128
        r = compare(model, ids.tolist(), bind(file, model), n_vocab=49152, ctx=512, chunks=1)
        found[level] = r
        assert r.density["N"] == pytest.approx(1 - level, abs=0.01)
        print(f"griffin {level:.0%}: {r.perplexity / r.perplexity_dense - 1:+.1%} {r.density}")
    assert 0 < found[0.25].kl_mean < found[0.6].kl_mean and found[0.25].top1_agreement > found[0.6].top1_agreement
    # Rows of 384 bytes are skipped where that pays, which it does not at 75%: see cpp/kernels/README.md.
    assert found[0.6].density["body"] < 0.7 < found[0.25].density["body"] <= 1


def test_levels_and_protected_layers(model: _core.Model, header: PackedHeader, text: str) -> None:
    fit = Fit(model, Tokenizer.load(header.path), header, SMALL, text=text)
    assert fit.protected("stability") == fit.protected("similarity") == (6, 5)
    griffin = Griffin(model, fit.tokenizer, header, SMALL, text=text)
    assert griffin.protected("protected") == (3, 2) and griffin.protected("uniform") == (0, 0)
    _, levels = griffin.thresholds_at("protected", 0.5)
    assert levels["N"] == [0.0] * 3 + [0.6] * 25 + [0.0] * 2
    _, levels = fit.thresholds_at("stability", 0.3)
    assert levels["N"][:6] == [0.0] * 6 and levels["N"][-5:] == [0.0] * 5
    assert np.mean(levels["N"]) == pytest.approx(0.3, abs=1e-5), "the level is that of all layers"
    with pytest.raises(UsageError, match=r"a level of 0.65 is more than the 19 of 30 layers .* at most 0\.63"):
        fit.thresholds_at("stability", 0.65)


def test_similar_passages_make_clusters(model: _core.Model, header: PackedHeader, text: str, tmp_path: Path) -> None:
    """Offline and back: the file's lists are sums of the cluster's cores, and a prompt gets the list of the nearest one."""
    fit = Fit(model, Tokenizer.load(header.path), header, SMALL, text=text)
    file = fit.file("similarity", 0.3, measure=False)
    centroids, lists = file.arrays["clusters.centroids"], file.arrays["clusters.neurons"]
    k = len(centroids)
    assert 4 <= k <= 10 and centroids.shape == (k, 1536) and lists.shape == (k, 30, round(1536 * (1 - 0.3 * 30 / 19)))
    again = sparsity.load(sparsity.save(file, tmp_path / "c.safetensors"), header)
    skipping = bind(again, model)
    passage = fit.chunks()[0][0, :64]
    attached = Attached(_core.Session(model, 128), skipping)
    attached.prompt(passage)
    assert attached.sets is not None
    counts = selection.core_counts(prompt_z(model, header, passage)[selection.reference_layer(30)])
    at = int(np.argmin([np.linalg.norm(c - selection.multi_hot(counts)) for c in centroids]))
    assert attached.sets[0] is None and np.array_equal(np.asarray(attached.sets[12]), lists[at, 12])
    for damaged in (
        {"clusters.centroids": centroids},
        {"clusters.centroids": centroids[:, :-1], "clusters.neurons": lists},
        {"clusters.centroids": centroids, "clusters.neurons": lists[:, :, ::-1].copy()},
        {"clusters.centroids": centroids, "clusters.neurons": lists + 1000},
    ):
        again.arrays = damaged
        with pytest.raises(ModelError, match="make it again"):
            bind(again, model)


def test_kmeans_finds_planted_groups_and_repeats() -> None:
    rng = np.random.default_rng(3)
    centres = (rng.random((5, 200)) < 0.3).astype(np.float32)
    truth = np.repeat(np.arange(5), 12)
    points = np.abs(centres[truth] - (rng.random((60, 200)) < 0.05)).astype(np.float32)
    rng.shuffle(order := np.arange(60))
    centroids, assigned, error = clusters.kmeans(points[order], 5)
    groups = [set(truth[order][assigned == c]) for c in range(5)]
    assert all(len(g) == 1 for g in groups) and len(set.union(*groups)) == 5
    for c in range(5):
        np.testing.assert_allclose(centroids[c], points[order][assigned == c].mean(0), atol=1e-6)
    assert error == pytest.approx(sum(((points[order][i] - centroids[assigned[i]]) ** 2).sum() for i in range(60)), rel=1e-5)
    again = clusters.kmeans(points[order], 5)
    assert np.array_equal(again[0], centroids) and np.array_equal(again[1], assigned)
    errors = [clusters.kmeans(points, n)[2] for n in range(1, 11)]
    assert clusters.elbow(errors) in (4, 5, 6) and errors[4] < 0.5 * errors[2]
    assert clusters.kmeans(points[:3], 3)[2] == pytest.approx(0, abs=1e-9)


def test_selection_is_as_written() -> None:
    assert selection.top(np.asarray([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    z = np.asarray([[5, 4, 3, 2, 1, -9], [0, 0, 0, 0, 0, 1], [-1, -1, -1, -1, -1, -1], [2, 2, 2, 2, 2, 2]], np.float32)
    # ceil(0.2 * 5) = 1, 1, none, ceil(0.2 * 6) = 2 of equals the first.
    assert selection.core_counts(z).tolist() == [2, 1, 0, 0, 0, 1]
    assert selection.griffin_squares(np.asarray([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist() == pytest.approx([0.36, 0.64])
    assert selection.reference_layer(32) == 25 and selection.reference_layer(1) == 0
    sets = selection.choose(np.tile(np.arange(8.0), (4, 1)), Choice(density=0.25, first=1, last=1))
    assert [None if s is None else s.tolist() for s in sets] == [None, [6, 7], [6, 7], None]
    assert selection.choose(np.ones((2, 8)), Choice(density=1.0)) == [None, None]
    for wrong in ({"density": 0.0}, {"density": 1.5}, {"statistic": "x"}, {"first": -1}, {"min_prompt": 0}):
        with pytest.raises(UsageError):
            Choice(**wrong)
    with pytest.raises(UsageError, match="damaged"):
        Choice.of({"statistic": "griffin"})


def test_calibrate_generate_bench_and_eval(smollm2_neurons: Path, shared_dir: Path, run_cli: RunCli, tmp_path: Path) -> None:
    packed = tmp_path / "model"
    packed.mkdir()
    for file in smollm2_neurons.iterdir():
        if file.is_file():
            os.link(file, packed / file.name)
    text = shared_dir / "data" / "calibration" / "c4.txt"
    small = ("--tokens", 256, "--eval-tokens", 256, "--ctx", 128, "--text", text, "-t", 2)
    done = run_cli("calibrate", "-m", packed, *small, "--method", "griffin", "--level", 0.5, "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["files"]
    assert found["name"] == "griffin-0.50" and found["quality"]["density"]["N"] == pytest.approx(0.4, abs=0.01)
    assert found["quality"]["bytes_per_token"] < 0.9 * found["quality"]["bytes_per_token_dense"]
    prompt = " ".join(["The capital of France is Paris, which lies on the river Seine."] * 4)
    said = run_cli("generate", "-m", packed, "-p", prompt, "-n", 8, "--temp", 0, "--json", "--sparsity", "griffin-0.50")
    assert said.returncode == 0 and len(json.loads(said.stdout)["tokens"]) == 8, said.stderr
    scored = run_cli(
        "eval", "-m", packed, "--text", text, "--ctx", 128, "--chunks", 1, "--sparsity", "griffin-0.50", "--json"
    )
    assert scored.returncode == 0 and json.loads(scored.stdout)["density"]["N"] == pytest.approx(0.4, abs=0.01)
    assert json.loads(scored.stdout)["prompt_tokens"] == 64
    bench = run_cli(
        "bench", "-m", packed, "--prompt", 8, "--gen", 4, "--reps", 2, "--sparsity", "griffin-0.50", "--json"
    )
    assert bench.returncode == 0 and json.loads(bench.stdout)["density"]["N"] == pytest.approx(0.4, abs=0.01)
    piqa = shared_dir / "data" / "choice" / "piqa.jsonl"
    asked = run_cli(
        "eval", "-m", packed, "--task", "piqa", "--data", piqa, "--limit", 3, "--sparsity", "griffin-0.50", "--json"
    )
    assert asked.returncode == 0 and json.loads(asked.stdout)["questions"] == 3, asked.stderr
