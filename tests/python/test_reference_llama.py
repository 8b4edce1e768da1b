"""Logits of random small Llama-architecture models against transformers on the same float32 weights.

Each model is built there, written as the GGUF that llama.cpp's converter would write, converted and run by the engine:
the whole path from file to logits is under test, for a prompt of 64 tokens and 16 steps of decoding.

The engine keeps keys and values in float16. With strong weights (logits of order 1, attention far from uniform)
that rounding alone moves logits by more than 1e-3, so there the reference rounds its cache in the same way; with weights as
transformers initialises them nothing is rounded in the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import reference_logits
from llama_gguf import LlamaShape, byte_level_vocabulary, f32_source, permute_qk, write_llama_gguf

PROMPT, STEPS, TOLERANCE = 64, 16, 1e-3
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Case:
    name: str
    shape: LlamaShape
    llama3_scaling: bool = False


def shape(**changes: Any) -> LlamaShape:
    base = LlamaShape(
        n_layers=3, n_embd=128, n_heads=4, n_kv_heads=2, head_dim=32, n_ff=320, n_vocab=320, n_ctx=256
    )  # fmt: skip
    return replace(base, **changes)


CASES = [
    Case("grouped queries, tied embeddings", shape()),
    Case("untied embeddings, one head of keys for all", shape(tied=False, n_kv_heads=1)),
    Case("as many key heads as query heads, 64 wide", shape(n_embd=256, n_heads=4, n_kv_heads=4, head_dim=64)),
    Case("heads 16 wide", shape(n_heads=8, n_kv_heads=2, head_dim=16)),
    Case("heads 80 wide", shape(n_embd=160, n_heads=2, n_kv_heads=1, head_dim=80)),
    Case("heads 128 wide, more than the embedding", shape(n_embd=192, n_heads=6, n_kv_heads=3, head_dim=128, n_layers=2)),
    Case("heads 96 wide, three queries a key", shape(n_embd=288, n_heads=3, n_kv_heads=1, head_dim=96, n_layers=2)),
    Case("odd widths: embedding 72, FFN 100, vocabulary 333", shape(n_embd=72, n_heads=3, n_kv_heads=3, head_dim=24, n_ff=100, n_vocab=333)),
    Case("a base of 500000 and a large epsilon", shape(rope_theta=500000.0, norm_eps=1e-3)),
    Case("Llama 3's scaling of frequencies", shape(rope_theta=10000.0), llama3_scaling=True),
]  # fmt: skip


def reference_model(case: Case, torch: Any, *, strong: bool) -> Any:
    """A transformers model. Strong weights keep activations at order 1, as those of a trained model do; otherwise the
    matrices have the standard deviation 0.02 that transformers itself draws."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = case.shape
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": s.rope_theta}
    if case.llama3_scaling:
        rope = {"rope_type": "llama3", "rope_theta": s.rope_theta, **LLAMA3_SCALING}
    common = {
        "vocab_size": s.n_vocab, "hidden_size": s.n_embd, "intermediate_size": s.n_ff, "num_hidden_layers": s.n_layers,
        "num_attention_heads": s.n_heads, "num_key_value_heads": s.n_kv_heads, "head_dim": s.head_dim,
        "max_position_embeddings": s.n_ctx, "rms_norm_eps": s.norm_eps, "tie_word_embeddings": s.tied,
        "attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        config = LlamaConfig(**common, rope_parameters=rope)
    else:
        scaling = rope if case.llama3_scaling else None
        config = LlamaConfig(**common, rope_theta=s.rope_theta, rope_scaling=scaling)
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            else:
                width = 1.2 if "q_proj" in name or "k_proj" in name else 0.5
                deviation = width / math.sqrt(p.shape[1]) if strong else 0.02
                p.copy_(torch.randn(p.shape, generator=generator) * deviation)
    return model


def llama3_factors(s: LlamaShape) -> np.ndarray:
    """Divisors of the inverse frequencies, as llama.cpp's converter stores them in rope_freqs.weight."""
    low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
    factor, context = LLAMA3_SCALING["factor"], LLAMA3_SCALING["original_max_position_embeddings"]
    out = []
    for i in range(0, s.head_dim, 2):
        wavelength = 2 * math.pi * s.rope_theta ** (i / s.head_dim)
        if wavelength < context / high:
            out.append(1.0)
        elif wavelength > context / low:
            out.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(out, dtype=np.float32)


def to_gguf(case: Case, model: Any, path: Path) -> Path:
    s, weights = case.shape, {k: v.detach().numpy() for k, v in model.state_dict().items()}
    sources = [f32_source("token_embd.weight", weights["model.embed_tokens.weight"])]
    if case.llama3_scaling:
        sources.append(f32_source("rope_freqs.weight", llama3_factors(s)))
    for i in range(s.n_layers):
        p = f"model.layers.{i}."
        for theirs, ours in (
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ):
            w = weights[f"{p}{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                w = permute_qk(w, s.n_heads if ours == "attn_q" else s.n_kv_heads)
            sources.append(f32_source(f"blk.{i}.{ours}.weight", w))
    sources.append(f32_source("output_norm.weight", weights["model.norm.weight"]))
    if not s.tied:
        sources.append(f32_source("output.weight", weights["lm_head.weight"]))
    return write_llama_gguf(path, s, sources, byte_level_vocabulary(s.n_vocab))


@pytest.mark.parametrize("strong", [True, False], ids=["strong weights", "gentle weights"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_equal_transformers(
    case: Case, strong: bool, torch: Any, tmp_path: Path, convert_to_packed: Callable[[Path, Path], Path]
) -> None:
    from sparse_run import _core

    reference = reference_model(case, torch, strong=strong)
    packed = convert_to_packed(to_gguf(case, reference, tmp_path / "model.gguf"), tmp_path)
    tokens = np.random.default_rng(7).integers(0, case.shape.n_vocab, PROMPT + STEPS).astype(np.int32)
    expected = reference_logits(reference, tokens, torch, half_cache=strong)
    assert expected.std() > (0.4 if strong else 0.1), "the reference is too tame to tell anything"

    model = _core.Model(str(packed), 2)
    session = _core.Session(model, PROMPT + STEPS)
    got = [session.eval_all(tokens[:PROMPT])]
    for i in range(PROMPT, PROMPT + STEPS):
        session.eval(tokens[i : i + 1])
        got.append(np.array(session.logits())[None])
    actual = np.concatenate(got)
    model.close()

    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max(axis=1)
    assert difference[:PROMPT].max() < TOLERANCE, f"prompt: {difference[:PROMPT]}"
    assert difference[PROMPT:].max() < TOLERANCE, f"decode: {difference[PROMPT:]}"
