"""Hugging Face directories of the Llama family: weights and logits as transformers has them, and every kind of damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import write_tokenizer
from packed_reader import read_packed
from sparse_run import _core, registry
from sparse_run.convert import convert
from sparse_run.convert.describe import describe
from sparse_run.errors import ModelError, UnsupportedModelError
from sparse_run.models import rope
from sparse_run.models.fields import Fields

N_VOCAB = 300
BASE = {
    "vocab_size": N_VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save(torch: Any, folder: Path, *, dtype: str = "float32", shards: bool = False, **changes: Any) -> Any:
    """A random model of transformers, saved as it would be published."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **changes})).to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.08 + (1.0 if p.dim() == 1 else 0.0))
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    write_tokenizer(folder, N_VOCAB)
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"shards": True},
    "biases": {"attention_bias": True},
    "wide heads": {"head_dim": 64},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 3.0}},
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers_on_the_same_weights(name: str, torch: Any, tmp_path: Path) -> None:
    model = save(torch, tmp_path / "hf", **CASES[name])
    convert(tmp_path / "hf", tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 300, 64).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    session = _core.Session(_core.Model(str(tmp_path / "out"), 1), 128)
    got = np.array(session.eval_all(tokens))
    # Keys and values are held in half, which alone moves logits of this size (about 1) by up to about 1e-3.
    assert np.abs(got - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())
    facts = describe(tmp_path / "hf")
    assert facts["format"] == "safetensors" and facts["tied_embeddings"] is (name == "tied")
    assert facts["rope_scaled"] is (name in ("llama3", "yarn", "linear"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_and_bfloat16_weights_arrive_bit_by_bit(dtype: str, torch: Any, tmp_path: Path) -> None:
    model = save(torch, tmp_path / "hf", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "out")
    tensors, layouts = read_packed(tmp_path / "out")
    weights = {name: p.float().detach().numpy() for name, p in model.named_parameters()}
    np.testing.assert_array_equal(tensors["token_embd"], weights["model.embed_tokens.weight"])
    np.testing.assert_array_equal(tensors["output"], weights["lm_head.weight"])
    qkv = [weights[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    np.testing.assert_array_equal(tensors["layers.1.attn_qkv"], np.concatenate(qkv))
    np.testing.assert_array_equal(tensors["layers.1.ffn_down"][:, :160], weights["model.layers.1.mlp.down_proj.weight"])
    assert not tensors["layers.1.ffn_down"][:, 160:].any()
    assert {layout["kind"] for layout in layouts.values()} == {"f16" if dtype == "float16" else "bf16"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_rope_scalings_are_those_of_transformers(torch: Any) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for theta, factor, original in [(10000.0, 4.0, 2048), (500000.0, 8.0, 8192), (1e6, 32.0, 4096)]:
        for kind, extra in [
            ("yarn", {"original_max_position_embeddings": original}),
            ("yarn", {"original_max_position_embeddings": original, "beta_fast": 16.0, "beta_slow": 2.0}),
            ("yarn", {"original_max_position_embeddings": original, "mscale": 0.7, "mscale_all_dim": 1.3}),
            ("yarn", {"original_max_position_embeddings": original, "attention_factor": 1.5}),
            ("yarn", {"original_max_position_embeddings": original, "truncate": False}),
            ("linear", {}),
            (
                "longrope",
                {
                    "original_max_position_embeddings": original,
                    "short_factor": [1 + i / 64 for i in range(64)],
                    "long_factor": [2 + i / 32 for i in range(64)],
                },
            ),
            ("llama3", {"original_max_position_embeddings": original, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ]:
            scaling = {"rope_type": kind, "rope_theta": theta, "factor": factor, **extra}
            config = LlamaConfig(
                hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(scaling)
            )
            expected, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
            scaled = rope.hf_scaling(scaling, "config.json", 128, theta, 131072)
            plain = theta ** (-np.arange(64) / 64)
            np.testing.assert_allclose(plain / np.array(scaled.factors), expected.numpy(), rtol=2e-6)
            assert scaled.mscale == pytest.approx(attention, rel=1e-6)
            assert scaled.short_context == (original if kind == "longrope" else None)
            if kind == "longrope":
                beyond, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=original + 1)
                np.testing.assert_allclose(plain / np.array(scaled.long_factors), beyond.numpy(), rtol=2e-6)


def test_gguf_scaling_keys_mean_the_same() -> None:
    def scaling(**keys: Any) -> rope.Scaling:
        values = {f"llama.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
        return rope.gguf_scaling(Fields(values, "m.gguf", "llama."), 128, 10000.0, 131072)

    assert scaling() == rope.Scaling()
    assert scaling(scaling__type="none", scaling__factor=4.0) == rope.Scaling()
    assert scaling(scaling__type="linear", scaling__factor=4.0) == rope.Scaling([4.0] * 64)
    assert scaling(scale_linear=2.0) == rope.Scaling([2.0] * 64)
    yarn = scaling(scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=4096)
    assert yarn == rope.Scaling(rope.yarn(128, 10000.0, 4.0, 4096), rope.yarn_mscale(4.0))
    assert yarn.factors is not None and yarn.factors[0] == 1.0 and yarn.factors[-1] == 4.0
    long = scaling(scaling__type="longrope", scaling__original_context_length=4096, scaling__attn_factor=1.2)
    assert long == rope.Scaling(None, 1.2, 4096)
    with pytest.raises(UnsupportedModelError, match="'dynamic' is not supported"):
        scaling(scaling__type="dynamic")


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    for key, new in changes.items():
        if new is None:
            value.pop(key, None)
        else:
            value[key] = new
    path.write_text(json.dumps(value))


def damage_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"
TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "neither a packed model nor config.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[1]"), "not a JSON object"),
    "architecture": (
        lambda d: edit(d / "config.json", architectures=["T5Model"]),
        "'T5Model' is not supported; supported",
    ),
    "no architecture": (lambda d: edit(d / "config.json", architectures=None), "names no architecture"),
    "activation": (
        lambda d: edit(d / "config.json", hidden_act="mish"),
        "hidden_act is 'mish', which is not supported",
    ),
    "hidden size": (lambda d: edit(d / "config.json", hidden_size="96"), "hidden_size is '96'"),
    "vocabulary": (
        lambda d: edit(d / "config.json", vocab_size=301),
        "[300, 96], but the hyper-parameters say [301, 96]",
    ),
    "heads": (lambda d: edit(d / "config.json", num_key_value_heads=3), "cannot share"),
    "quantised": (
        lambda d: edit(d / "config.json", quantization_config={"quant_method": "fp8"}),
        "quantization_config quant_method 'fp8' is not supported",
    ),
    "rope": (
        lambda d: edit(d / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic', which is not supported",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "weights truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-4]),
        "lies outside the file",
    ),
    "weights empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "too few"),
    "header length": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100), "the header claims"),
    "header no JSON": (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"x" * 99), "not JSON"),
    "header nested": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
        "not JSON",
    ),
    "header shape": (
        lambda d: damage_header(d, lambda h: h[NORM].update(shape=[97])),
        "has a shape that does not fit its size",
    ),
    "header negative": (lambda d: damage_header(d, lambda h: h[NORM].update(shape=[-96])), "impossible"),
    "header offsets": (
        lambda d: damage_header(d, lambda h: h[NORM].update(data_offsets=[1 << 60, (1 << 60) + 384])),
        "lies outside the file",
    ),
    "header type": (lambda d: damage_header(d, lambda h: h[NORM].update(dtype="F64")), "is of type F64"),
    "header overlap": (
        lambda d: damage_header(d, lambda h: h["lm_head.weight"].update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"])),
        "tensors lm_head.weight and model.embed_tokens.weight overlap",
    ),
    "tensor unknown": (
        lambda d: damage_header(d, lambda h: h.update(extra={**h[NORM], "shape": [0], "data_offsets": [0, 0]})),
        "tensor extra belongs to no part",
    ),
    "tensor missing": (lambda d: damage_header(d, lambda h: h.pop(NORM)), "tensor model.norm.weight is missing"),
    "head missing": (lambda d: damage_header(d, lambda h: h.pop("lm_head.weight")), "lm_head.weight is missing"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_damage_is_one_clear_error_and_leaves_nothing(name: str, torch: Any, tmp_path: Path) -> None:
    save(torch, tmp_path / "hf")
    damage, words = TROUBLES[name]
    damage(tmp_path / "hf")
    with pytest.raises(ModelError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    assert words in str(caught.value) and "hf" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_directory_is_converted_once_and_anew_when_any_of_its_files_changes(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save(torch, tmp_path / "hf", shards=True)
    calls: list[int] = []
    first = registry.resolve(tmp_path / "hf", progress=lambda what, done, total: calls.append(done))
    assert registry.resolve(tmp_path / "hf", progress=lambda what, done, total: calls.append(done)) == first
    assert calls.count(0) == 1
    edit(tmp_path / "hf" / "config.json", rms_norm_eps=0.01)
    second = registry.resolve(tmp_path / "hf")
    assert registry.packed_models() == [second] != [first]
    assert json.loads((second / "config.json").read_text())["norm_eps"] == 0.01


def test_missing_shards_and_shards_elsewhere_are_named(torch: Any, tmp_path: Path) -> None:
    save(torch, tmp_path / "hf", shards=True)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"the file {shards[1].name} is missing"):
        convert(tmp_path / "hf", tmp_path / "out")
    edit(tmp_path / "hf" / "model.safetensors.index.json", weight_map={"a": "../../etc/passwd"})
    with pytest.raises(ModelError, match="outside the directory"):
        convert(tmp_path / "hf", tmp_path / "out")


def test_not_a_number_is_named(torch: Any, tmp_path: Path) -> None:
    model = save(torch, tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj.weight holds weights that are not finite"):
        convert(tmp_path / "hf", tmp_path / "out")
