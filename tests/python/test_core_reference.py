"""The engine against the NumPy decoder of tests/support/packed_numpy.py, feature by feature, prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import packed_numpy
import pytest

# Logits of size 1. Keys and values next to a rounding border of fp16 may fall to either side.
TOLERANCE = 2e-3
D, HD, F, QKV = 48, 16, 128, (4 + 2 * 2) * 16
BIASES = {
    "attn_qkv.bias": (QKV,), "attn_o.bias": (D,), "ffn_down.bias": (D,),
    "attn_norm.bias": (D,), "output_norm.bias": (D,),
}  # fmt: skip

CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "llama": ({}, {}),
    "one head for each key": ({"n_kv_heads": 4}, {}),
    "untied head": ({"tied_embeddings": False}, {}),
    "half rotation": ({"rope_style": "half", "rope_theta": 500.0}, {}),
    "partial rotation": ({"rope_style": "half", "rope_dims": 8}, {}),
    "partial interleaved rotation": ({"rope_dims": 6}, {}),
    "no rotation": ({"rope_style": "none"}, {}),
    "rotation in some layers": ({"rope_layers": [False, True]}, {}),
    "rope factors and scale": ({"rope_mscale": 1.2}, {"rope_factors": (HD // 2,)}),
    "windows with their own base": ({"window": [7, 0], "rope_theta_local": 100.0}, {}),
    "windows with factors of their own": (
        {"window": [0, 5]}, {"rope_factors": (HD // 2,), "rope_factors_local": (HD // 2,)}
    ),
    "every layer windowed": ({"window": [3, 1]}, {}),
    "query and key norms": ({}, {"q_norm": (HD,), "k_norm": (HD,)}),
    "post norms": ({}, {"post_attn_norm": (D,), "post_ffn_norm": (D,)}),
    "soft caps": ({"attn_softcap": 1.5, "logit_softcap": 2.0}, {}),
    "attention scale": ({"attn_scale": 0.7}, {}),
    "scales": ({"embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.3}, {}),
    "gelu": ({"activation": "gelu"}, {}),
    "gelu_tanh": ({"activation": "gelu_tanh"}, {}),
    "relu": ({"activation": "relu"}, {}),
    "relu2": ({"activation": "relu2"}, {}),
    "layer norm": ({"norm": "layer"}, {}),
    "not gated": ({"ffn_gated": False, "activation": "relu2"}, {"ffn_up.bias": (F,)}),
    "biases": ({}, {k: v for k, v in BIASES.items() if "norm" not in k}),
    "parallel block": ({"parallel_block": True}, {}),
    "opt": (
        {"norm": "layer", "activation": "relu", "ffn_gated": False, "rope_style": "none", "n_kv_heads": 4},
        {**BIASES, "attn_qkv.bias": (3 * 64,), "ffn_norm.bias": (D,), "ffn_up.bias": (F,), "position_embd": (64, D)},
    ),
    "gemma": (
        {"rope_style": "half", "activation": "gelu_tanh", "embedding_scale": D**0.5, "window": [9, 0],
         "rope_theta_local": 50.0, "attn_scale": 0.3, "attn_softcap": 5.0, "logit_softcap": 3.0},
        {"q_norm": (HD,), "k_norm": (HD,), "post_attn_norm": (D,), "post_ffn_norm": (D,)},
    ),
    "falcon": (
        {"norm": "layer", "activation": "gelu", "ffn_gated": False, "rope_style": "half", "parallel_block": True,
         "n_kv_heads": 1},
        {"attn_norm.bias": (D,), "output_norm.bias": (D,)},
    ),
    "own norm for each branch of a parallel block": ({"parallel_block": True}, {"ffn_norm": (D,)}),
    "norms of all heads together": ({"qk_norm": "full"}, {"q_norm": (64,), "k_norm": (32,)}),
    "no norms before the branches": (
        {"pre_norms": False, "qk_norm": "full"},
        {"q_norm": (64,), "k_norm": (32,), "post_attn_norm": (D,), "post_ffn_norm": (D,)},
    ),
    "norms inside the branches": ({"activation": "relu2"}, {"attn_sub_norm": (64,), "ffn_sub_norm": (F,)}),
    "relu with a threshold": ({"activation": "relu", "activation_threshold": 0.4}, {}),
    "relu on both sides": ({"activation": "relu", "up_relu": True}, {}),
    "many queries a key": ({"n_heads": 40, "n_kv_heads": 1, "head_dim": 8}, {}),
    "cohere": (
        {"norm": "layer", "parallel_block": True, "logit_scale": 0.5}, {"q_norm": (HD,), "k_norm": (HD,)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    from sparse_run import _core

    config, extra = CASES[name]
    c, w = packed_numpy.make(tmp_path, config, extra)
    tokens = np.random.default_rng(2).integers(0, c["n_vocab"], 40).astype(np.int32)
    want = packed_numpy.logits(c, w, tokens)
    model = _core.Model(str(tmp_path), 2)
    prefill = _core.Session(model, 64).eval_all(tokens)
    session = _core.Session(model, 64)
    decode = []
    for token in tokens:
        session.eval(np.array([token], dtype=np.int32))
        decode.append(np.array(session.logits()))
    assert want.std() > 0.1, "the case says nothing"
    assert np.abs(prefill - want).max() < TOLERANCE
    assert np.array_equal(np.stack(decode), prefill)


@pytest.mark.parametrize("left_out", ["rope_mscale", "window", "rope_theta_local", "attn_softcap", "q_norm", "scale"])
def test_the_reference_notices_a_feature_that_is_left_out(left_out: str, tmp_path: Path) -> None:
    """What the comparison above would not see, it would not prove."""
    from sparse_run import _core

    config: dict[str, Any] = {
        "rope_mscale": 1.3, "window": [5, 0], "rope_theta_local": 20.0, "attn_softcap": 0.5, "residual_scale": 0.5
    }  # fmt: skip
    c, w = packed_numpy.make(tmp_path, config, {"q_norm": (HD,), "k_norm": (HD,)})
    tokens = np.random.default_rng(2).integers(0, c["n_vocab"], 40).astype(np.int32)
    got = _core.Session(_core.Model(str(tmp_path), 2), 64).eval_all(tokens)
    c.pop("residual_scale" if left_out == "scale" else left_out, None)
    if left_out == "q_norm":
        w = {k: v for k, v in w.items() if not k.endswith(("q_norm", "k_norm"))}
    want = packed_numpy.logits(c, w, tokens)
    assert np.abs(got - want).max() > 10 * TOLERANCE


def test_half_precision_weights(tmp_path: Path) -> None:
    from sparse_run import _core

    c, w = packed_numpy.make(tmp_path, {}, {}, kind="f16")
    tokens = np.arange(30, dtype=np.int32)
    got = _core.Session(_core.Model(str(tmp_path), 2), 64).eval_all(tokens)
    want = packed_numpy.logits(c, w, tokens)
    assert np.abs(got - want).max() < TOLERANCE
