"""Small random packed models with float weights, and an independent decoder in NumPy that reads the same weights: the
reference for every key of models/format.md. It follows that text and shares no code with the engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BASE: dict[str, Any] = {
    "format_version": 1, "architecture": "tiny", "n_layers": 2, "n_embd": 48, "n_heads": 4, "n_kv_heads": 2,
    "head_dim": 16, "n_ff": 128, "n_vocab": 101, "n_ctx_train": 256, "norm": "rms", "norm_eps": 1e-5,
    "activation": "silu", "ffn_gated": True, "rope_style": "interleaved", "rope_theta": 10000.0,
    "tied_embeddings": True,
}  # fmt: skip


def make(
    folder: Path, config: dict[str, Any], extra: dict[str, tuple[int, ...]], kind: str = "f32", seed: int = 1
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Writes a packed model and returns its configuration and plain weights. `extra` names optional vectors (layer
    tensors without "layers.i.") and their shapes."""
    c = {**BASE, **config}
    rng = np.random.default_rng(seed)
    d, q, kv, f = c["n_embd"], c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"], c["n_ff"]
    w: dict[str, Array] = {}

    def matrix(name: str, rows: int, cols: int) -> None:
        w[name] = (rng.standard_normal((rows, cols)) / math.sqrt(cols)).astype(np.float32)

    def vector(name: str, shape: tuple[int, ...]) -> None:
        middle = 0.0 if "bias" in name or name == "position_embd" else 1.0
        w[name] = (middle + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    matrix("token_embd", c["n_vocab"], d)
    if not c["tied_embeddings"]:
        matrix("output", c["n_vocab"], d)
    vector("output_norm", (d,))
    for name in ("output_norm.bias", "position_embd", "rope_factors", "rope_factors_local"):
        if name in extra:
            vector(name, extra[name])
    for i in range(c["n_layers"]):
        at = f"layers.{i}."
        if c.get("pre_norms", True):
            vector(at + "attn_norm", (d,))
            if not c.get("parallel_block"):
                vector(at + "ffn_norm", (d,))
        matrix(at + "attn_qkv", q + 2 * kv, d)
        matrix(at + "attn_o", d, q)
        if c["ffn_gated"]:
            matrix(at + "gate", f, d)
        matrix(at + "ffn_up", f, d)
        matrix(at + "ffn_down", d, f)
        for name, shape in extra.items():
            if not name.startswith(("output", "position", "rope")):
                vector(at + name, shape)
    write(folder, c, w, kind)
    return c, w


def write(folder: Path, c: dict[str, Any], w: dict[str, Array], kind: str) -> None:
    """Writes config.json and weights.safetensors; rounds w in place to what `kind` keeps."""
    from sparse_run import _core

    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    layouts: dict[str, str] = {}
    matrices = {name for name, value in w.items() if value.ndim == 2 and name != "position_embd"}
    for name in matrices:
        if kind == "f16":
            w[name] = w[name].astype(np.float16).astype(np.float32)
    for name, value in w.items():
        if name not in matrices:
            tensors[name] = ("F32", list(value.shape), value.tobytes())
            continue
        if name.endswith("gate") or (name.endswith("ffn_up") and c["ffn_gated"]):
            continue
        add_matrix(_core, name, value, kind, tensors, layouts)
    for i in range(c["n_layers"] if c["ffn_gated"] else 0):
        gate, up = w[f"layers.{i}.gate"], w[f"layers.{i}.ffn_up"]
        fused = np.stack([gate.reshape(-1, 64, gate.shape[1]), up.reshape(-1, 64, up.shape[1])], axis=1)
        add_matrix(_core, f"layers.{i}.ffn_gate_up", fused.reshape(-1, gate.shape[1]), kind, tensors, layouts)

    header: dict[str, Any] = {"__metadata__": {f"layout:{name}": text for name, text in layouts.items()}}
    blob = bytearray()
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data + bytes(-len(data) % 4096)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(blob))
    (folder / "config.json").write_text(json.dumps(c))


def add_matrix(core: Any, name: str, value: Array, kind: str, tensors: dict[str, Any], layouts: dict[str, str]) -> None:
    rows, cols = value.shape
    panels = [core.pack_panel_float(kind, np.ascontiguousarray(value[r : r + 64])) for r in range(0, rows, 64)]
    data = b"".join(panel.tobytes() for panel in panels)
    tensors[name] = ("U8", [len(data)], data)
    layouts[name] = json.dumps(
        {"layout": "panels", "version": 1, "kind": kind, "rows": rows, "cols": cols, "panel_rows": 64}
    )


def activation(name: str, x: Array) -> Array:
    out: Array
    if name == "silu":
        out = x / (1 + np.exp(-x))
    elif name == "gelu_tanh":
        out = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    elif name == "gelu":
        out = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    else:
        out = np.maximum(x, 0) ** (2 if name == "relu2" else 1)
    return out


def norm(c: dict[str, Any], x: Array, weight: Array | None, bias: Array | None = None) -> Array:
    """x itself where there is no weight."""
    if weight is None:
        return x
    if c["norm"] == "layer":
        x = x - x.mean(-1, keepdims=True)
    out: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + c["norm_eps"]) * weight
    return out if bias is None else out + bias


def rotate(c: dict[str, Any], x: Array, theta: float, factors: Array | None) -> Array:
    """x [tokens, heads, head_dim], position = index of the token."""
    dims = c.get("rope_dims", c["head_dim"])
    inverse = theta ** (-np.arange(0, dims, 2) / dims) / (1 if factors is None else factors)
    angle = np.arange(x.shape[0])[:, None, None] * inverse
    cos, sin = np.cos(angle) * c.get("rope_mscale", 1), np.sin(angle) * c.get("rope_mscale", 1)
    out: Array = x.copy()
    if c["rope_style"] == "half":
        first, second = slice(0, dims // 2), slice(dims // 2, dims)
    else:
        first, second = slice(0, dims, 2), slice(1, dims, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def softcap(x: Array, cap: float) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def logits(c: dict[str, Any], weights: dict[str, Array], tokens: Array) -> NDArray[np.float64]:
    """Logits of every token, float64 [len(tokens), n_vocab]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    n, heads, kv_heads, hd = len(tokens), c["n_heads"], c["n_kv_heads"], c["head_dim"]
    x = w["token_embd"][tokens] * c.get("embedding_scale", 1)
    if "position_embd" in w:
        x = x + w["position_embd"][:n]
    at_most = np.arange(n)[:, None] - np.arange(n)[None, :]
    for i in range(c["n_layers"]):
        at = f"layers.{i}."
        window = c.get("window", [0] * c["n_layers"])[i]

        def linear(name: str, h: Array, at: str = at) -> Array:
            return h @ w[at + name].T + w.get(at + name + ".bias", 0)

        h = norm(c, x, w.get(at + "attn_norm"), w.get(at + "attn_norm.bias"))
        qkv = linear("attn_qkv", h)
        q, k, v = np.split(qkv, [heads * hd, (heads + kv_heads) * hd], axis=1)
        full = c.get("qk_norm") == "full"
        if full:
            q, k = norm(c, q, w[at + "q_norm"]), norm(c, k, w[at + "k_norm"])
        q, k, v = q.reshape(n, heads, hd), k.reshape(n, kv_heads, hd), v.reshape(n, kv_heads, hd)
        if at + "q_norm" in w and not full:
            q, k = norm(c, q, w[at + "q_norm"]), norm(c, k, w[at + "k_norm"])
        if c["rope_style"] != "none" and c.get("rope_layers", [True] * c["n_layers"])[i]:
            theta = c.get("rope_theta_local", c["rope_theta"]) if window else c["rope_theta"]
            factors = w.get("rope_factors_local" if window else "rope_factors")
            q, k = rotate(c, q, theta, factors), rotate(c, k, theta, factors)
        k, v = k.astype(np.float16).astype(np.float64), v.astype(np.float16).astype(np.float64)  # as the cache has them
        k, v = np.repeat(k, heads // kv_heads, axis=1), np.repeat(v, heads // kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * c.get("attn_scale", hd**-0.5)
        scores = softcap(scores, c.get("attn_softcap", 0))
        scores = np.where((at_most < 0) | ((at_most >= window) if window else False), -np.inf, scores)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(n, heads * hd)
        branch = linear("attn_o", norm(c, attended, w.get(at + "attn_sub_norm")))
        if at + "post_attn_norm" in w:
            branch = norm(c, branch, w[at + "post_attn_norm"])
        before, x = x, x + c.get("residual_scale", 1) * branch
        if not c.get("parallel_block") or at + "ffn_norm" in w:
            h = norm(c, before if c.get("parallel_block") else x, w.get(at + "ffn_norm"), w.get(at + "ffn_norm.bias"))
        up = linear("ffn_up", h)
        gate = h @ w[at + "gate"].T if c["ffn_gated"] else up
        z = activation(c["activation"], np.where(gate < c.get("activation_threshold", 0), 0, gate)
                       if c.get("activation_threshold") else gate)  # fmt: skip
        if c["ffn_gated"]:
            z = z * (np.maximum(up, 0) if c.get("up_relu") else up)
        branch = linear("ffn_down", norm(c, z, w.get(at + "ffn_sub_norm")))
        if at + "post_ffn_norm" in w:
            branch = norm(c, branch, w[at + "post_ffn_norm"])
        x = x + c.get("residual_scale", 1) * branch
    x = norm(c, x, w["output_norm"], w.get("output_norm.bias"))
    head = w["token_embd"] if c["tied_embeddings"] else w["output"]
    out: NDArray[np.float64] = softcap(x @ head.T * c.get("logit_scale", 1), c.get("logit_softcap", 0))
    return out
