"""BitNet checkpoints: packed ternary matrices and rounded master weights arrive code by code, logits are those of transformers on
the same weights, and what differs is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import engine_logits, randomise, reference_logits, write_tokenizer
from numpy.typing import NDArray
from packed_reader import read_packed
from sparse_run.convert import convert
from sparse_run.errors import ModelError, UnsupportedModelError

N_VOCAB = 320
CONFIG: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}


def pack(ternary: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Four quarters of the rows in two bits each, lowest first, plus one: as transformers' integration describes it."""
    quarters = (ternary + 1).astype(np.uint8).reshape(4, -1, ternary.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def save(folder: Path, torch: Any, settings: dict[str, Any], **changes: Any) -> tuple[Any, dict[str, NDArray[np.float32]]]:
    """A random small model, its layers' matrices ternary (packed, or as master weights); returns it with their values."""
    from safetensors.numpy import save_file
    from transformers import BitNetConfig, BitNetForCausalLM

    model = BitNetForCausalLM(BitNetConfig(**{**CONFIG, **changes})).to(torch.float32).eval()
    randomise(model, torch)
    rng = np.random.default_rng(3)
    tensors: dict[str, NDArray[Any]] = {}
    weights: dict[str, NDArray[np.float32]] = {}
    for name, p in model.named_parameters():
        value = p.detach().numpy().copy()
        if not name.endswith("_proj.weight"):
            if name != "lm_head.weight":
                tensors[name] = value
            continue
        if settings.get("quantization_mode") == "online":
            tensors[name] = value
            mean = np.abs(value).mean(dtype=np.float64)
            weights[name] = (np.clip(np.rint(value / mean), -1, 1) * mean).astype(np.float32)
        else:
            ternary = rng.integers(-1, 2, value.shape).astype(np.int8)
            scale = np.float32(2.0 ** rng.integers(-5, -3) * 1.25)
            tensors[name] = pack(ternary)
            stored = scale if settings.get("linear_class") == "autobitlinear" else 1 / scale
            tensors[name + "_scale"] = np.array([stored], np.float32)
            weights[name] = ternary * scale
        with torch.no_grad():
            p.copy_(torch.from_numpy(weights[name]))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["BitNetForCausalLM"]}
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": None, **settings}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    write_tokenizer(folder, N_VOCAB)
    return model, weights


MODES: dict[str, dict[str, Any]] = {
    "packed, scale multiplies": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "packed, scale divides": {},
    "master weights": {"linear_class": "autobitlinear", "quantization_mode": "online"},
}


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_ternary_and_logits_those_of_transformers(mode: str, torch: Any, tmp_path: Path) -> None:
    model, weights = save(tmp_path / "hf", torch, MODES[mode])
    convert(tmp_path / "hf", tmp_path / "out", layout="panels")
    tensors, layouts = read_packed(tmp_path / "out")
    # A scale that is no half is rounded to one; those of the packed cases are halves, and 1 / 1.25 is rounded in float32.
    tolerance = 2**-11 if mode != "packed, scale multiplies" else 0
    for i in range(2):
        stem = f"model.layers.{i}."
        expected = {
            "attn_qkv": np.concatenate([weights[f"{stem}self_attn.{p}_proj.weight"] for p in "qkv"]),
            "attn_o": weights[f"{stem}self_attn.o_proj.weight"],
            "ffn_down": weights[f"{stem}mlp.down_proj.weight"],
        }
        for name, weight in expected.items():
            got = tensors[f"layers.{i}.{name}"]
            np.testing.assert_array_equal(np.sign(got), np.sign(weight))
            np.testing.assert_allclose(got, weight, rtol=tolerance, atol=0)
    assert {layout["kind"] for name, layout in layouts.items() if name.startswith("layers.")} == {"q4"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["activation"] == "relu2" and config["ffn_gated"] is True

    tokens = np.random.default_rng(7).integers(0, N_VOCAB, 48).astype(np.int32)
    expected_logits = reference_logits(model, tokens, torch)
    convert(tmp_path / "hf", tmp_path / "auto")
    for packed in ("out", "auto"):
        difference = engine_logits(tmp_path / packed, tokens, 32) - expected_logits
        assert expected_logits.std() > 0.2
        assert np.sqrt((difference**2).mean()) < 0.05 * expected_logits.std(), packed


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a norm in every matrix": ({"use_rms_norm": True}, {}, "use_rms_norm"),
    "another class": ({"linear_class": "other"}, {}, "linear_class 'other'"),
    "a width that is padded": ({}, {"intermediate_size": 200}, "intermediate_size is 200"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_is_refused_by_name(name: str, torch: Any, tmp_path: Path) -> None:
    settings, changes, words = REFUSED[name]
    save(tmp_path / "hf", torch, settings, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "up_proj.weight_scale is missing"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill(np.nan), "not finite"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill(0), "not a number above 0"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].fill(255), "not ternary"),
    ],
    ids=["no scale", "scale not a number", "scale zero", "codes"],
)
def test_damage_is_one_clear_error(change: Any, words: str, torch: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    save(tmp_path / "hf", torch, MODES["packed, scale multiplies"])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ModelError, match=words):
        convert(tmp_path / "hf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
