"""An independent forward pass of Llama-architecture models in plain NumPy: the reference for golden texts and logits.

It shares no code with the product: weights come straight from llama2.c's .bin, or from a GGUF through the gguf package,
and every step is written the way the papers have it, in float64 (matrices may stay float32 to fit into memory).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Layer:
    """Weights of one block, matrices as [outputs, inputs]."""

    attn_norm: Array
    q: Array
    k: Array
    v: Array
    o: Array
    ffn_norm: Array
    gate: Array
    up: Array
    down: Array


@dataclass
class ReferenceLlama:
    """A decoder with RMS norm, rotary positions on interleaved pairs (2i, 2i+1), SwiGLU and a KV cache."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    theta: float
    embedding: Array
    layers: list[Layer]
    final_norm: Array
    head: Array
    rope_factors: Array | None = None
    cache_dtype: Any = np.float64  # float16 rounds keys and values as the engine's cache does
    _keys: list[Array] = field(default_factory=list)
    _values: list[Array] = field(default_factory=list)

    def reset(self) -> None:
        """Forgets all tokens."""
        self._keys, self._values = [], []

    @property
    def n_past(self) -> int:
        return len(self._keys[0]) if self._keys else 0

    def eval(self, tokens: Any) -> NDArray[np.float64]:
        """Appends tokens and returns the logits of each, float64 [len(tokens), n_vocab]."""
        ids = np.asarray(tokens, dtype=np.int64)
        n, past = len(ids), self.n_past
        if not self._keys:
            empty = np.zeros((0, self.n_kv_heads, self.head_dim))
            self._keys = [empty for _ in self.layers]
            self._values = [empty for _ in self.layers]
        cos, sin = self._rotation(past, n)
        visible = np.arange(past + n)[None, :] <= np.arange(past, past + n)[:, None]
        x = self.embedding[ids].astype(np.float64)
        for i, layer in enumerate(self.layers):
            h = self._norm(x, layer.attn_norm)
            q = _rotate(_matmul(h, layer.q).reshape(n, self.n_heads, self.head_dim), cos, sin)
            k = _rotate(_matmul(h, layer.k).reshape(n, self.n_kv_heads, self.head_dim), cos, sin)
            v = _matmul(h, layer.v).reshape(n, self.n_kv_heads, self.head_dim)
            self._keys[i] = np.concatenate([self._keys[i], k.astype(self.cache_dtype).astype(np.float64)])
            self._values[i] = np.concatenate([self._values[i], v.astype(self.cache_dtype).astype(np.float64)])
            group = self.n_heads // self.n_kv_heads
            keys = np.repeat(self._keys[i], group, axis=1)
            values = np.repeat(self._values[i], group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, keys) * self.head_dim**-0.5
            scores = np.where(visible[None], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, values).reshape(n, -1)
            x = x + _matmul(mixed, layer.o)
            h = self._norm(x, layer.ffn_norm)
            gate = _matmul(h, layer.gate)
            x = x + _matmul(gate / (1.0 + np.exp(-gate)) * _matmul(h, layer.up), layer.down)
        return _matmul(self._norm(x, self.final_norm), self.head)

    def choices(self, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
        """What the reference would choose greedily in place of each of `tokens`, given the prompt and those before it; and
        for each choice its lead over the runner-up. Equal to `tokens` if and only if they are the greedy text."""
        self.reset()
        logits = self.eval([*prompt, *tokens])[len(prompt) - 1 : -1]
        top = np.partition(logits, -2, axis=-1)
        return logits.argmax(axis=-1).tolist(), (top[:, -1] - top[:, -2]).tolist()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The `n` most likely tokens after the prompt, one by one: for making a new golden text."""
        self.reset()
        logits, out = self.eval(prompt)[-1], []
        for _ in range(n):
            out.append(int(np.argmax(logits)))
            logits = self.eval(out[-1:])[-1]
        return out

    def _norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * weight

    def _rotation(self, past: int, n: int) -> tuple[Array, Array]:
        inverse = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        if self.rope_factors is not None:
            inverse = inverse / self.rope_factors
        angle = np.arange(past, past + n)[:, None] * inverse[None]
        return np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]


def _matmul(x: Array, weight: Array) -> Array:
    return (x.astype(weight.dtype, copy=False) @ weight.T).astype(np.float64, copy=False)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the probabilities along the last axis, float64."""
    x = np.asarray(logits, dtype=np.float64)
    top = x.max(axis=-1, keepdims=True)
    return np.asarray(x - top - np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))


def load_llama2c(path: Path) -> ReferenceLlama:
    """Reads llama2.c's .bin (version 0): seven int32, then float32 weights, each kind stacked over the layers.

    Layout: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: own classifier), seq_len; embedding,
    rms_att, wq, wk, wv, wo, rms_ffn, w1 (gate), w2 (down), w3 (up), rms_final, two tables of seq_len * head_dim / 2
    that are not used any more, and the classifier where there is one.
    """
    raw = path.read_bytes()
    dim, n_ff, n_layers, n_heads, n_kv_heads, vocab, n_ctx = np.frombuffer(raw, "<i4", 7).tolist()
    data = np.frombuffer(raw, "<f4", offset=28).astype(np.float64)
    head_dim, untied, vocab, at = dim // n_heads, vocab < 0, abs(vocab), 0

    def take(*shape: int) -> Array:
        nonlocal at
        size = int(np.prod(shape))
        if at + size > len(data):
            raise ValueError(f"{path}: ends early")
        at += size
        return data[at - size : at].reshape(shape)

    embedding = take(vocab, dim)
    rms_att = take(n_layers, dim)
    wq = take(n_layers, dim, dim)
    wk = take(n_layers, n_kv_heads * head_dim, dim)
    wv = take(n_layers, n_kv_heads * head_dim, dim)
    wo = take(n_layers, dim, dim)
    rms_ffn = take(n_layers, dim)
    w1 = take(n_layers, n_ff, dim)
    w2 = take(n_layers, dim, n_ff)
    w3 = take(n_layers, n_ff, dim)
    final_norm = take(dim)
    take(n_ctx, head_dim)  # cosines and sines
    head = take(vocab, dim) if untied else embedding
    if at != len(data):
        raise ValueError(f"{path}: {len(data) - at} numbers left over")
    layers = [Layer(rms_att[i], wq[i], wk[i], wv[i], wo[i], rms_ffn[i], w1[i], w3[i], w2[i]) for i in range(n_layers)]
    return ReferenceLlama(n_heads, n_kv_heads, head_dim, 1e-5, 10000.0, embedding, layers, final_norm, head)


def load_gguf(path: Path) -> ReferenceLlama:
    """Reads a Llama-architecture GGUF with the gguf package; matrices become float32 (4 bytes a weight of memory)."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    tensors = {t.name: t for t in reader.tensors}

    def number(key: str, default: float | None = None) -> float:
        found = reader.get_field(f"llama.{key}")
        if found is None:
            if default is None:
                raise KeyError(key)
            return default
        return float(found.contents())

    def get(name: str, dtype: Any = np.float32) -> Array:
        t = tensors[name]
        return np.asarray(gguf.dequantize(t.data, t.tensor_type), dtype=dtype)

    n_heads, dim = int(number("attention.head_count")), int(number("embedding_length"))
    layers = []
    for i in range(int(number("block_count"))):
        p = f"blk.{i}."
        layers.append(
            Layer(
                get(p + "attn_norm.weight", np.float64),
                get(p + "attn_q.weight"),
                get(p + "attn_k.weight"),
                get(p + "attn_v.weight"),
                get(p + "attn_output.weight"),
                get(p + "ffn_norm.weight", np.float64),
                get(p + "ffn_gate.weight"),
                get(p + "ffn_up.weight"),
                get(p + "ffn_down.weight"),
            )
        )
    embedding = get("token_embd.weight")
    return ReferenceLlama(
        n_heads=n_heads,
        n_kv_heads=int(number("attention.head_count_kv", n_heads)),
        head_dim=int(number("attention.key_length", dim // n_heads)),
        eps=number("attention.layer_norm_rms_epsilon"),
        theta=number("rope.freq_base", 10000.0),
        embedding=embedding,
        layers=layers,
        final_norm=get("output_norm.weight", np.float64),
        head=get("output.weight") if "output.weight" in tensors else embedding,
        rope_factors=get("rope_freqs.weight", np.float64) if "rope_freqs.weight" in tensors else None,
    )
