"""GPTQ and AWQ checkpoints: every weight is that of the formats' description, exactly; logits are those of transformers on the
dequantised weights; and what has no exact form is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import engine_logits, randomise, reference_logits, write_tokenizer
from int4_checkpoint import Int4Matrix, random_matrix
from numpy.typing import NDArray
from packed_reader import read_packed
from sparse_run.convert import convert
from sparse_run.convert.describe import describe
from sparse_run.convert.quantise import Quantisation
from sparse_run.errors import ModelError, UnsupportedModelError

N_VOCAB = 320
CONFIG: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def settings(method: str, group: int, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": group}
    more = {"desc_act": False, "sym": False} if method == "gptq" else {"version": "gemm", "zero_point": True}
    return {**base, **more, **changes}


def save(
    folder: Path,
    torch: Any,
    method: str,
    group: int,
    *,
    quantisation: dict[str, Any] | None = None,
    extra_bias: bool = False,
    family: str = "Llama",
    **matrix: Any,
) -> tuple[Any, dict[str, Int4Matrix]]:
    """A random small model with its layers' matrices in 4 bits; returns it with the weights that these stand for."""
    import transformers
    from safetensors.numpy import save_file

    model = getattr(transformers, family + "ForCausalLM")(getattr(transformers, family + "Config")(**CONFIG))
    model = model.to(torch.float32).eval()
    randomise(model, torch)
    rng = np.random.default_rng(5)
    tensors: dict[str, NDArray[Any]] = {}
    packed: dict[str, Int4Matrix] = {}
    for name, p in model.named_parameters():
        stem, _, part = name.rpartition(".")
        if part == "weight" and stem.endswith(LINEARS):
            packed[stem] = random_matrix(*p.shape, group, method, rng, **matrix)
            tensors.update({f"{stem}.{key}": value for key, value in packed[stem].stored.items()})
            with torch.no_grad():
                p.copy_(torch.from_numpy(packed[stem].weight))
            if extra_bias:
                tensors[f"{stem}.bias"] = np.zeros(p.shape[0], np.float16)
        else:
            tensors[name] = p.detach().numpy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": [family + "ForCausalLM"]}
    config["quantization_config"] = quantisation or settings(method, group)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    write_tokenizer(folder, N_VOCAB)
    return model, packed


def gate_up(packed: dict[str, Int4Matrix], layer: int) -> NDArray[np.float32]:
    gate, up = (packed[f"model.layers.{layer}.mlp.{part}_proj"].weight.reshape(-1, 64, 128) for part in ("gate", "up"))
    return np.stack([gate, up], axis=1).reshape(-1, 128)


CASES: dict[str, dict[str, Any]] = {
    "gptq, groups of 128": {"method": "gptq", "group": 128},
    "gptq, groups of 64": {"method": "gptq", "group": 64},
    "gptq, groups of 32, symmetric": {"method": "gptq", "group": 32, "symmetric": True},
    "gptq, one group a row": {"method": "gptq", "group": -1},
    "gptq, second format": {"method": "gptq", "group": 128, "zero_offset": 0, "quantisation": settings("gptq", 128, checkpoint_format="gptq_v2")},
    "gptq, biases of zeros, desc_act with groups in order": {"method": "gptq", "group": 64, "extra_bias": True, "quantisation": settings("gptq", 64, desc_act=True)},
    "gptq, qwen2 with its biases": {"method": "gptq", "group": 64, "family": "Qwen2"},
    "awq, groups of 128": {"method": "awq", "group": 128},
    "awq, groups of 64": {"method": "awq", "group": 64},
    "awq, groups of 32": {"method": "awq", "group": 32},
    "awq, older names of settings": {"method": "awq", "group": 64, "quantisation": {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exact_and_logits_those_of_the_dequantised_model(case: str, torch: Any, tmp_path: Path) -> None:
    model, packed = save(tmp_path / "hf", torch, **CASES[case])
    convert(tmp_path / "hf", tmp_path / "out")
    tensors, layouts = read_packed(tmp_path / "out")
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        qkv = np.concatenate([packed[attention + part].weight for part in ("q_proj", "k_proj", "v_proj")])
        np.testing.assert_array_equal(tensors[f"layers.{layer}.attn_qkv"], qkv)
        np.testing.assert_array_equal(tensors[f"layers.{layer}.attn_o"], packed[attention + "o_proj"].weight)
        np.testing.assert_array_equal(tensors[f"layers.{layer}.ffn_gate_up"], gate_up(packed, layer))
        np.testing.assert_array_equal(tensors[f"layers.{layer}.ffn_down"], packed[mlp + "down_proj"].weight)
    kinds = {layout["kind"] for name, layout in layouts.items() if name.startswith("layers.")}
    assert kinds == {"q4" if CASES[case].get("symmetric") else "q5"}
    assert all(not layout.get("min") for layout in layouts.values())

    tokens = np.random.default_rng(7).integers(0, N_VOCAB, 48).astype(np.int32)
    expected = reference_logits(model, tokens, torch)
    # The same weights as floats, for the share of the difference that is not the 8-bit inputs of quantised products.
    save_floats(model, tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "plain")
    assert np.abs(engine_logits(tmp_path / "plain", tokens, 32) - expected).max() < 1e-3
    difference = engine_logits(tmp_path / "out", tokens, 32) - expected
    assert expected.std() > 0.2
    assert np.sqrt((difference**2).mean()) < 0.04 * expected.std()


def save_floats(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    write_tokenizer(folder, N_VOCAB)


def test_info_and_further_rounding_read_them_too(torch: Any, tmp_path: Path) -> None:
    _, packed = save(tmp_path / "hf", torch, "awq", 64)
    facts = describe(tmp_path / "hf")
    assert facts["weights"]["ffn"]["kinds"] == ["AWQ 4 bits"]
    assert 4.2 < facts["weights"]["ffn"]["bits_per_weight"] < 4.5
    convert(tmp_path / "hf", tmp_path / "out", quantisation=Quantisation(8))
    tensors, layouts = read_packed(tmp_path / "out")
    assert {layout["kind"] for layout in layouts.values()} == {"q8"}
    expected = packed["model.layers.1.mlp.down_proj"].weight
    np.testing.assert_allclose(tensors["layers.1.ffn_down"], expected, atol=0.005 * np.abs(expected).max())


def edit(path: Path, change: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


STEM = "model.layers.1.mlp.up_proj."
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": (settings("bitsandbytes", 64), "quant_method 'bitsandbytes'"),
    "8 bits": (settings("gptq", 64, bits=8), "bits 8"),
    "an odd group": (settings("gptq", 48), "group_size 48"),
    "AWQ for one vector": (settings("awq", 64, version="gemv"), "version 'gemv'"),
    "AWQ without zeros": (settings("awq", 64, zero_point=False), "zero_point false"),
    "Marlin": (settings("gptq", 64, checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "old Marlin": (settings("gptq", 64, is_marlin_format=True), "checkpoint_format 'marlin'"),
    "bits by module": (settings("gptq", 64, dynamic={"+:.*down.*": {"bits": 8}}), "dynamic"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_settings_are_refused_by_name(name: str, torch: Any, tmp_path: Path) -> None:
    quantisation, words = UNSUPPORTED[name]
    save(tmp_path / "hf", torch, "gptq", 64, quantisation=quantisation)
    with pytest.raises(UnsupportedModelError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    assert words in str(caught.value) and "GGUF" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_groups_out_of_order_are_refused_by_name(torch: Any, tmp_path: Path) -> None:
    save(tmp_path / "hf", torch, "gptq", 64)

    def shuffle(tensors: dict[str, NDArray[Any]]) -> None:
        np.random.default_rng(0).shuffle(tensors[STEM + "g_idx"])

    edit(tmp_path / "hf" / "model.safetensors", shuffle)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.up_proj.g_idx.*desc_act"):
        convert(tmp_path / "hf", tmp_path / "out")


DAMAGE: dict[str, tuple[Callable[[dict[str, NDArray[Any]]], object], str]] = {
    "no scales": (lambda t: t.pop(STEM + "scales"), "up_proj.scales is missing"),
    "no zeros": (lambda t: t.pop(STEM + "qzeros"), "up_proj.qzeros is missing"),
    "zeros of another shape": (
        lambda t: t.update({STEM + "qzeros": t[STEM + "qzeros"][:1].copy()}),
        "qzeros has the shape",
    ),
    "order of another length": (lambda t: t.update({STEM + "g_idx": t[STEM + "g_idx"][:5].copy()}), "g_idx has the shape"),
    "scales not finite": (lambda t: t[STEM + "scales"].__setitem__((0, 3), np.nan), "not finite numbers"),
    "another matrix's shape": (
        lambda t: t.update({STEM + k: t["model.layers.1.mlp.down_proj." + k] for k in ("qweight", "qzeros", "scales", "g_idx")}),
        "[128, 256], but the hyper-parameters say [256, 128]",
    ),
    "words of another type": (lambda t: t.update({STEM + "qweight": t[STEM + "qweight"].astype(np.int64)}), "is of type I64"),
    "nothing quantised": (lambda t: [t.pop(k) for k in list(t) if k.endswith("qweight")], "no tensor is"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_error_and_leaves_nothing(name: str, torch: Any, tmp_path: Path) -> None:
    save(tmp_path / "hf", torch, "gptq", 64)
    change, words = DAMAGE[name]
    edit(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(ModelError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    assert words in str(caught.value) and "hf" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_zero_point_that_programs_read_differently_is_refused(torch: Any, tmp_path: Path) -> None:
    save(tmp_path / "hf", torch, "gptq", 64)
    edit(tmp_path / "hf" / "model.safetensors", lambda t: t[STEM + "qzeros"].fill(-1))
    with pytest.raises(UnsupportedModelError, match="qzeros holds 15"):
        convert(tmp_path / "hf", tmp_path / "out")
