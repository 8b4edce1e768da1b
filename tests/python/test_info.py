"""What `info` tells of sparse models, rounded ones and directories: exact zeros as transformers counts them, thresholds, layouts,
licence and source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import randomise, write_tokenizer
from sparse_run.convert import convert, measure
from sparse_run.convert.describe import describe
from sparse_run.convert.quantise import Quantisation
from sparse_run.tokenizer import Tokenizer

N_VOCAB = 320
CONFIG: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "relu",
}
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 12


@pytest.fixture(scope="module")
def relu(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Llama with ReLU as a Hugging Face directory with a model card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.float32).eval()
    randomise(model, torch)
    folder = tmp_path_factory.mktemp("relu") / "hf"
    model.save_pretrained(folder)
    write_tokenizer(folder, N_VOCAB)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/relu-model"}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- relu\n---\n# Model\nlicense: not this one\n")
    return folder, model


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the directory with other entries in config.json; links to the rest."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_exact_zeros_are_counted_as_transformers_has_them(relu: tuple[Path, Any], torch: Any, tmp_path: Path) -> None:
    folder, model = relu
    facts = describe(folder)
    assert facts["natural_sparsity"] is None and facts["exact_zeros"] is True
    convert(folder, tmp_path / "out", quantisation=Quantisation(8), calibration=TEXT)
    measured = describe(tmp_path / "out")["natural_sparsity"]
    chunks = measure.chunks_of(Tokenizer.load(tmp_path / "out"), TEXT, 16, "the text", spread=True)
    shares: list[list[float]] = [[], []]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: shares[i].append(float((args[0] == 0).float().mean()))
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for chunk in chunks:
            model(torch.from_numpy(chunk.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    expected = [float(np.mean(share)) for share in shares]
    assert 0.3 < min(expected) < 0.7
    assert measured["by_layer"] == pytest.approx(expected, abs=0.01), "176 neurons, not the 192 that are stored"
    assert measured["ffn"] == pytest.approx(np.mean(expected), abs=0.01)
    assert measured["tokens"] == chunks.size


def test_info_measures_on_a_text(relu: tuple[Path, Any], tmp_path: Path, run_cli: Any) -> None:
    folder, _ = relu
    (tmp_path / "text.txt").write_text(TEXT)
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run_cli("info", folder, "--measure", tmp_path / "text.txt", "--json", env=home)
    found = json.loads(done.stdout)["natural_sparsity"]
    # The same count as calibration's, which test_exact_zeros holds against transformers, from fewer chunks of the text.
    convert(folder, tmp_path / "out", quantisation=Quantisation(8), calibration=TEXT)
    expected = describe(tmp_path / "out")["natural_sparsity"]
    assert found["by_layer"] == pytest.approx(expected["by_layer"], abs=0.03)
    assert found["ffn"] == pytest.approx(np.mean(found["by_layer"]))
    chunks = measure.chunks_of(Tokenizer.load(tmp_path / "out"), TEXT, measure.SPARSITY_CHUNKS, "the text", spread=True)
    assert found["tokens"] == chunks.size
    assert "exactly 0" in run_cli("info", tmp_path / "out", "--measure", tmp_path / "text.txt").stdout
    (tmp_path / "short.txt").write_text("Too short.")
    done = run_cli("info", tmp_path / "out", "--measure", tmp_path / "short.txt")
    assert done.returncode == 2 and "shorter than one chunk" in done.stderr and done.stderr.count("\n") == 1
    silu = edited(folder, tmp_path / "silu", hidden_act="silu")
    assert "silu gives no exact zeros" in run_cli("info", silu, "--measure", tmp_path / "text.txt").stdout


def test_the_command_tells_of_sparsity_layout_rounding_licence_and_source(
    relu: tuple[Path, Any], tmp_path: Path, run_cli: Any
) -> None:
    folder, _ = relu
    text = run_cli("info", folder).stdout
    assert "apache-2.0" in text and "someone/relu-model" in text and "not measured" in text
    convert(folder, tmp_path / "out", quantisation=Quantisation(5), calibration=TEXT, report_text=TEXT)
    text = run_cli("info", tmp_path / "out").stdout
    assert "exactly 0" in text and "layout neurons" in text and "5 bits in groups of 32, calibrated" in text
    assert "KL" in text and "apache-2.0" in text
    facts = json.loads(run_cli("info", tmp_path / "out", "--json").stdout)
    assert facts["schema"] == 1
    assert facts["made_from"]["quantised"] == {"bits": "5 bits in groups of 32", "calibrated": True}
    assert 0 < facts["quality"]["kl_mean"] < 0.1
    assert "neurons" in facts["layout"]
    assert {"embedding", "attention", "ffn", "head"} <= set(facts["weights"])
    for weights in facts["weights"].values():
        assert weights["bytes"] > 0 and weights["bits_per_weight"] > 0


def test_thresholds_and_second_relus_are_shown(relu: tuple[Path, Any], tmp_path: Path, run_cli: Any) -> None:
    folder, _ = relu
    fatrelu = edited(folder, tmp_path / "fatrelu", hidden_act="fatrelu", hidden_act_param=0.01)
    facts = describe(fatrelu)
    assert facts["activation"] == "relu" and facts["activation_threshold"] == 0.01 and not facts["up_relu"]
    assert "relu, 0 below 0.01 (FATReLU)" in run_cli("info", fatrelu).stdout
    drelu = edited(folder, tmp_path / "drelu", architectures=["BambooForCausalLM"], sliding_window=None)
    facts = describe(drelu)
    assert facts["up_relu"] is True and facts["activation_threshold"] is None
    assert "on gate and up (dReLU)" in run_cli("info", drelu).stdout
    silu = edited(folder, tmp_path / "silu", hidden_act="silu")
    assert describe(silu)["exact_zeros"] is False
    assert "silu gives no exact zeros" in run_cli("info", silu).stdout
    # What the packed model says is the same.
    for path in (fatrelu, drelu, silu):
        convert(path, tmp_path / "packed", existing="overwrite")
        same = ("activation", "activation_threshold", "up_relu", "exact_zeros", "license", "source")
        assert [describe(tmp_path / "packed")[key] for key in same] == [describe(path)[key] for key in same]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'cc-by-4.0'\n---\n", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: some-terms\n---\n", "some-terms"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# No head\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_cards_head(
    card: str | None, licence: str | None, relu: tuple[Path, Any], tmp_path: Path
) -> None:
    target = edited(relu[0], tmp_path / "hf", _name_or_path="/home/me/model")
    (target / "README.md").unlink()
    if card is not None:
        (target / "README.md").write_text(card)
    facts = describe(target)
    assert facts["license"] == licence and facts["source"] is None
