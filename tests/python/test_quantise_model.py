"""Rounding whole models: bits as asked for, a report that a second measurement confirms, importance as a forward pass in NumPy
has it, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_reader import read_packed
from reference_numpy import load_llama2c, log_softmax
from sparse_run import _core
from sparse_run.convert import convert, measure
from sparse_run.convert.describe import describe
from sparse_run.convert.quantise import Quantisation
from sparse_run.errors import UsageError
from sparse_run.tokenizer import Tokenizer

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog. One day, "
    "she saw a big red ball and a small bird in a tree. The bird was sad because it could not find its mother. Lily said, "
    '"Do not be sad, I will help you." They looked and looked until the sun went down. '
) * 12


@pytest.fixture(scope="module")
def rounded(stories_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The story model in several precisions, with its report."""
    folder = tmp_path_factory.mktemp("rounded")
    out = {}
    for name, quantisation in {
        "4": Quantisation(4),
        "5": Quantisation(5),
        "6": Quantisation(6),
        "8": Quantisation(8),
        "16": Quantisation(16),
        "auto": Quantisation(0, target_bpw=5.0),
    }.items():
        path = folder / name
        out[name] = path, convert(stories_gguf, path, quantisation=quantisation, report_text=STORY)
    assert sorted(p.name for p in folder.iterdir()) == sorted(out), "the copy of the source is removed"
    return out


def test_more_bits_are_nearer_to_the_source(rounded: dict[str, tuple[Path, Any]]) -> None:
    kl = {name: quality.kl_mean for name, (_, quality) in rounded.items()}
    assert kl["16"] < kl["8"] < kl["6"] < kl["5"] < kl["4"] < 0.5
    assert kl["8"] < 0.01
    assert kl["auto"] < kl["4"]
    top = {name: quality.top1_agreement for name, (_, quality) in rounded.items()}
    assert 0.75 < top["4"] <= top["8"] <= top["16"] <= 1.0


def test_bits_are_as_promised(rounded: dict[str, tuple[Path, Any]]) -> None:
    # The other matrices of this tiny model are padded to whole tiles; 512 rows of embedding are whole ones.
    for bits, bpw in (("4", 6.5), ("5", 6.5), ("6", 6.5), ("8", 8.5)):
        layouts = read_packed(rounded[bits][0])[1]
        found = {layout["kind"] for name, layout in layouts.items() if name.endswith(("ffn_gate_up", "attn_o"))}
        assert found == {f"q{bits}"}
        assert describe(rounded[bits][0])["weights"]["embedding"]["bits_per_weight"] == bpw
    assert {layout["kind"] for layout in read_packed(rounded["16"][0])[1].values()} == {"f16"}


def test_the_report_is_what_a_second_measurement_finds(
    rounded: dict[str, tuple[Path, Any]], stories_packed: Path
) -> None:
    path, quality = rounded["4"]
    tokenizer = Tokenizer.load(path)
    chunk = np.asarray(tokenizer.encode(STORY, parse_special=False)[: measure.CONTEXT], dtype=np.int32)
    assert quality.chunks >= 1 and quality.ctx == measure.CONTEXT
    found = []
    for packed in (stories_packed, path):
        model = _core.Model(str(packed), 1)
        session = _core.Session(model, measure.CONTEXT)
        rows = []
        for at in range(quality.chunks):
            ids = np.asarray(
                tokenizer.encode(STORY, parse_special=False)[at * measure.CONTEXT : (at + 1) * measure.CONTEXT], np.int32
            )
            ids[0] = tokenizer.bos_id
            session.truncate(0)
            rows.append((log_softmax(session.eval_all(ids))[measure.CONTEXT // 2 : -1], ids[measure.CONTEXT // 2 + 1 :]))
        model.close()
        found.append(rows)
    assert len(chunk) == measure.CONTEXT
    source, result = found
    nll = [-np.mean([p[range(len(t)), t].mean() for p, t in rows]) for rows in found]
    kl = np.mean([(np.exp(p) * (p - q)).sum(1).mean() for (p, _), (q, _) in zip(source, result, strict=True)])
    assert quality.perplexity_source == pytest.approx(np.exp(nll[0]), rel=1e-3)
    assert quality.perplexity == pytest.approx(np.exp(nll[1]), rel=1e-3)
    assert quality.kl_mean == pytest.approx(kl, rel=2e-2)
    assert quality.perplexity_increase == pytest.approx(quality.perplexity / quality.perplexity_source - 1, abs=1e-6)
    record = json.loads((path / "source.json").read_text())
    assert record["quality"] == quality.as_dict()
    assert record["quantised"] == {"bits": "4 bits in groups of 32", "calibrated": False}


def test_importance_is_the_mean_square_of_inputs_in_a_numpy_forward_pass(
    stories_dir: Path, stories_packed: Path
) -> None:
    reference = load_llama2c(stories_dir / "stories260K.bin")
    chunks = measure.chunks_of(Tokenizer.load(stories_packed), STORY, 1, "the text", spread=False)
    found = measure.measure_importance(stories_packed, chunks, {"output_norm": reference.final_norm.astype(np.float32)})
    inputs = numpy_inputs(reference, chunks[0])
    assert set(found.columns) == set(inputs)
    assert len(found.layers) == len(reference.layers)
    for role, values in inputs.items():
        expected = np.square(values).mean(0)
        got = found.columns[role][: len(expected)]
        np.testing.assert_allclose(got / got.mean(), expected / expected.mean(), rtol=2e-2, atol=2e-3, err_msg=role)


def numpy_inputs(reference: Any, tokens: Any) -> dict[str, Any]:
    """What every matrix multiplies, by role: the reference's own matrices, each with a spy in front of it."""
    import reference_numpy

    roles: dict[int, list[str]] = {}
    for i, layer in enumerate(reference.layers):
        for name, part in {
            "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o": "o", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
        }.items():  # fmt: skip
            roles.setdefault(id(getattr(layer, part)), []).append(f"layers.{i}.{name}")
    roles.setdefault(id(reference.head), []).append("output")
    seen: dict[str, Any] = {}
    original = reference_numpy._matmul

    def spy(x: Any, weight: Any) -> Any:
        for role in roles[id(weight)]:
            seen[role] = x
        return original(x, weight)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_numpy, "_matmul", spy)
        reference.reset()
        reference.eval(tokens)
    return seen


def test_calibration_reduces_what_the_output_loses(stories_gguf: Path, stories_dir: Path, tmp_path: Path) -> None:
    convert(stories_gguf, tmp_path / "plain", quantisation=Quantisation(4))
    convert(stories_gguf, tmp_path / "calibrated", quantisation=Quantisation(4), calibration=STORY)
    record = json.loads((tmp_path / "calibrated" / "source.json").read_text())
    assert record["quantised"]["calibrated"] is True
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibrated", "plain"]
    reference = load_llama2c(stories_dir / "stories260K.bin")
    chunks = measure.chunks_of(Tokenizer.load(tmp_path / "plain"), STORY, 1, "the text", spread=False)
    inputs = numpy_inputs(reference, chunks[0])
    plain, calibrated = (read_packed(tmp_path / name)[0] for name in ("plain", "calibrated"))
    ratios = []
    for i, layer in enumerate(reference.layers):
        for name, weight in (("attn_o", layer.o), ("ffn_down", layer.down)):
            h = np.square(inputs[f"layers.{i}.{name}"]).mean(0)
            errors = [
                (h * (t[f"layers.{i}.{name}"][:, : weight.shape[1]] - weight) ** 2).sum() for t in (plain, calibrated)
            ]
            ratios.append(errors[1] / errors[0])
    assert sum(ratio < 1 for ratio in ratios) >= 9, ratios
    assert np.mean(ratios) < 0.97, ratios


def test_texts_that_are_too_short_or_of_no_use_are_refused_and_leave_nothing(stories_gguf: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ({"quantisation": Quantisation(4), "calibration": "short"}, "calibration text is shorter"),
        ({"quantisation": Quantisation(4), "report_text": "short"}, "report's text is shorter"),
        ({"report_text": STORY}, "give --bits"),
    ):
        with pytest.raises(UsageError, match=words):
            convert(stories_gguf, tmp_path / "out", **arguments)  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


def test_the_command_prints_and_records_what_it_did(stories_gguf: Path, tmp_path: Path, run_cli: Any) -> None:
    text = tmp_path / "story.txt"
    text.write_text(STORY)
    done = run_cli(
        "convert", stories_gguf, tmp_path / "out", "--bits", "auto", "--target-bpw", "5.5", "--calibration", text,
        "--report-text", text, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["quality"]["kl_mean"] < 0.3 and facts["quantised"]["calibrated"] is True
    assert facts["bits_per_weight"] == pytest.approx(facts["bits_per_weight"], abs=0.01)
    assert {"embedding", "attention", "ffn"} <= set(facts["weights"])
    done = run_cli("convert", stories_gguf, tmp_path / "out", "--bits", "8", "--force", "--report-text", text)
    assert done.returncode == 0, done.stderr
    assert "bits a weight" in done.stdout and "KL" in done.stdout and "perplexity" in done.stdout
    for arguments in (
        [stories_gguf, "--bits", "4"],
        [stories_gguf, tmp_path / "x", "--group", "64"],
        [stories_gguf, tmp_path / "x", "--bits", "4", "--target-bpw", "5"],
        [stories_gguf, tmp_path / "x", "--bits", "7"],
        [stories_gguf, tmp_path / "x", "--calibration", text],
    ):
        done = run_cli("convert", *arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.strip() and not done.stdout
    assert not (tmp_path / "x").exists()
