"""Logits of every family against transformers: a random small model with all features of the family switched on is saved as
safetensors, and as GGUF where llama.cpp has the family, converted, and run over a prompt of 64 tokens and 16 steps.

Windows are shorter than the prompt, caps are low enough to bend, rotations are scaled where the family does it. The engine
keeps keys and values in float16, so the reference rounds its cache in the same way (test_reference_llama.py says why).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_gguf import write_family_gguf
from hf_models import engine_logits, randomise, reference_logits, write_tokenizer
from sparse_run.convert import convert

PROMPT, STEPS, TOLERANCE = 64, 16, 1e-3
N_VOCAB = 320

BASE: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
SMALL_FALCON: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Case:
    """`model` is transformers' class without ForCausalLM, `config` its arguments; `gguf` the architecture's name there.
    `change` makes the model what transformers has no class for, `rename` its config.json."""

    name: str
    model: str
    config: dict[str, Any]
    gguf: str | None = None
    norm_offset: float = 0.0
    change: Callable[[Any, Any], None] | None = None
    rename: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    marks: tuple[Any, ...] = field(default=())


def base(**changes: Any) -> dict[str, Any]:
    return {**BASE, **changes}


def fatrelu(model: Any, torch: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = lambda x: torch.where(x >= 0.2, x, torch.zeros_like(x))


def drelu(model: Any, torch: Any) -> None:
    for layer in model.model.layers:
        mlp = layer.mlp

        def forward(x: Any, mlp: Any = mlp) -> Any:
            return mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))

        mlp.forward = forward


def to_prosparse(config: dict[str, Any]) -> dict[str, Any]:
    names = {"architectures": ["SparseLlamaForCausalLM"], "model_type": "sparsellama"}
    return {**config, **names, "hidden_act": "fatrelu", "hidden_act_param": 0.2}


def to_bamboo(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}


def to_minicpm(config: dict[str, Any]) -> dict[str, Any]:
    """Granite's factors under MiniCPM's names: depth 1.4 over the root of 3 layers, a base width of 16."""
    left = {k: v for k, v in config.items() if not k.endswith(("_multiplier", "logits_scaling"))}
    names = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm"}
    return {**left, **names, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


MINICPM = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 1.4 / 3**0.5,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.25,
}
SHORT, LONG = [1.0 + i / 5 for i in range(6)], [4.0 + i for i in range(6)]


def longrope(original: int, **more: Any) -> dict[str, Any]:
    """LongRoPE: the short factors up to `original` tokens, the long ones in what is longer."""
    factors = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": original}
    scaling = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
    return base(max_position_embeddings=2048, original_max_position_embeddings=original, rope_parameters=scaling, **more)


CASES = [
    Case("Llama: biases everywhere", "Llama", base(attention_bias=True, mlp_bias=True), "llama"),
    Case("Llama 3.2: scaled RoPE, tied", "Llama", base(tie_word_embeddings=True, head_dim=32, rope_parameters=LLAMA3), "llama"),
    Case("Llama: linear RoPE", "Llama", base(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), "llama"),
    Case("ReluLLaMA: ReLU, tied", "Llama", base(hidden_act="relu", tie_word_embeddings=True)),
    Case("ProSparse: FATReLU", "Llama", base(hidden_act="relu"), change=fatrelu, rename=to_prosparse),
    Case("Mistral: a window of 24", "Mistral", base(sliding_window=24)),
    Case("Mistral: a window and YaRN", "Mistral", base(sliding_window=24, rope_parameters=YARN)),
    Case("Mistral Nemo: heads wider than the stream's share, no window", "Mistral", base(sliding_window=None, head_dim=24), "llama"),
    Case("Ministral: windows on some layers", "Ministral", base(sliding_window=24, head_dim=16, layer_types=[SLIDING, FULL, SLIDING])),
    Case("Bamboo: ReLU on gate and up", "Mistral", base(sliding_window=None, hidden_act="relu"), change=drelu, rename=to_bamboo),
    Case("Qwen 2: biases", "Qwen2", base(), "qwen2"),
    Case("Qwen 2.5: YaRN", "Qwen2", base(rope_parameters={**YARN, "rope_theta": 1e6}), "qwen2"),
    Case("Qwen 2: windows on upper layers, tied", "Qwen2", base(use_sliding_window=True, sliding_window=20, max_window_layers=1, tie_word_embeddings=True)),
    Case("Qwen 3: norms of q and k, wide heads", "Qwen3", base(head_dim=32), "qwen3"),
    Case("Qwen 3: biases, windows, YaRN", "Qwen3", base(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=20, max_window_layers=2, rope_parameters=YARN)),
    Case("Gemma", "Gemma", base(head_dim=32), "gemma", norm_offset=1.0),
    Case("Gemma 2: caps, window, four norms", "Gemma2", base(head_dim=16, sliding_window=24, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=1.5), norm_offset=1.0),
    Case("Gemma 2 as llama.cpp has it", "Gemma2", base(head_dim=32, sliding_window=24, query_pre_attn_scalar=32, attn_logit_softcapping=2.0, final_logit_softcapping=1.5), "gemma2", norm_offset=1.0),
    Case("Gemma 3: two bases, one scaled, windows", "Gemma3", base(head_dim=16, sliding_window=20, query_pre_attn_scalar=24, final_logit_softcapping=1.5, layer_types=[SLIDING, SLIDING, FULL], rope_parameters={FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 100.0}}), norm_offset=1.0),
    Case("Gemma 3: every sixth layer sees all", "Gemma3", base(num_hidden_layers=7, head_dim=16, sliding_window=20, query_pre_attn_scalar=16), "gemma3", norm_offset=1.0),
    Case("SmolLM 3: layers without rotation", "SmolLM3", base(num_hidden_layers=4, tie_word_embeddings=True), "smollm3"),
    Case("SmolLM 3: windows, biases, another pattern", "SmolLM3", base(use_sliding_window=True, sliding_window=20, no_rope_layers=[1, 0, 0], attention_bias=True, mlp_bias=True)),
    Case("Phi-3: fused, window", "Phi3", base(sliding_window=24)),
    Case("Phi-3: fused", "Phi3", base(), "phi3"),
    Case("Phi-4 mini: LongRoPE on three quarters of a head", "Phi3", longrope(512, tie_word_embeddings=True), "phi3"),
    Case("Phi-3 128k: a context beyond the first, window", "Phi3", longrope(48, sliding_window=24), "phi3"),
    Case("OPT", "OPT", {"vocab_size": N_VOCAB, "hidden_size": 64, "ffn_dim": 200, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 96, "attn_implementation": "eager", "word_embed_proj_dim": 64}),
    Case("Falcon 7B: one key head", "Falcon", SMALL_FALCON, "falcon"),
    Case("Falcon 7B: 40 queries on one key head", "Falcon", {**SMALL_FALCON, "hidden_size": 320, "num_attention_heads": 40, "num_hidden_layers": 2}, "falcon"),
    Case("Falcon 40B: two norms side by side", "Falcon", {**SMALL_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "falcon"),
    Case("Falcon 2: the new decoder with one norm, own head", "Falcon", {**SMALL_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "ffn_hidden_size": 200}),
    Case("Falcon in sequence, biases, a key head per query", "Falcon", {**SMALL_FALCON, "parallel_attn": False, "multi_query": False, "bias": True}),
    Case("ReluFalcon", "Falcon", {**SMALL_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "activation": "relu"}),
    Case("Granite: four factors", "Granite", base(embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.1, logits_scaling=3.0), "granite"),
    Case("MiniCPM", "Granite", base(**MINICPM, tie_word_embeddings=True), "minicpm", rename=to_minicpm),
    Case("OLMo 2: norms after the branches and over all heads", "Olmo2", base(), "olmo2"),
    Case("OLMo 3: windows, full layers scaled by YaRN", "Olmo3", base(num_hidden_layers=4, sliding_window=20, rope_parameters={FULL: {**YARN, "rope_theta": 500000.0}, SLIDING: {"rope_type": "default", "rope_theta": 500000.0}}), "olmo2"),
    Case("Nemotron: LayerNorm + 1, squared ReLU, half rotated", "Nemotron", base(), "nemotron", norm_offset=1.0),
    Case("BitNet as floats: norms in front of o and down, gated squared ReLU", "BitNet", base(intermediate_size=192, attention_bias=True)),
    Case("Arcee: squared ReLU, YaRN", "Arcee", base(rope_parameters=YARN), "arcee"),
]  # fmt: skip


def build(case: Case, torch: Any) -> Any:
    import transformers

    kind = case.model + "ForCausalLM"
    config_class = getattr(transformers, "Gemma3TextConfig" if case.model == "Gemma3" else case.model + "Config")
    model = getattr(transformers, kind)(config_class(**case.config)).to(torch.float32).eval()
    randomise(model, torch, norm_offset=case.norm_offset)
    if case.change is not None:
        case.change(model, torch)
    return model


def compare(packed: Path, model: Any, torch: Any) -> None:
    tokens = np.random.default_rng(7).integers(0, N_VOCAB, PROMPT + STEPS).astype(np.int32)
    expected = reference_logits(model, tokens, torch)
    assert expected.std() > 0.12, "the reference is too tame to tell anything"
    difference = np.abs(engine_logits(packed, tokens, PROMPT) - expected).max(axis=1)
    print(f"logits of deviation {expected.std():.2f}: difference {difference.max():.1e}")
    assert difference[:PROMPT].max() < TOLERANCE, f"prompt: {difference[:PROMPT]}"
    assert difference[PROMPT:].max() < TOLERANCE, f"decode: {difference[PROMPT:]}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_safetensors_logits_are_those_of_transformers(case: Case, torch: Any, tmp_path: Path) -> None:
    model = build(case, torch)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", N_VOCAB)
    if case.rename is not None:
        path = tmp_path / "hf" / "config.json"
        path.write_text(json.dumps(case.rename(json.loads(path.read_text()))))
    convert(tmp_path / "hf", tmp_path / "packed")
    compare(tmp_path / "packed", model, torch)


@pytest.mark.parametrize("case", [c for c in CASES if c.gguf], ids=lambda c: c.name)
def test_gguf_logits_are_those_of_transformers(case: Case, torch: Any, tmp_path: Path) -> None:
    assert case.gguf is not None
    model = build(case, torch)
    write_family_gguf(tmp_path / "model.gguf", case.gguf, model)
    convert(tmp_path / "model.gguf", tmp_path / "packed")
    compare(tmp_path / "packed", model, torch)
