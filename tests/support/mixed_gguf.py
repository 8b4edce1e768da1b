"""Small Llama GGUF files whose tensors have any types, with their weights as the gguf package reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llama_gguf import LlamaShape, TensorSource, byte_level_vocabulary, write_llama_gguf
from numpy.typing import NDArray

_K_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def encode(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """float32 [rows, cols] as stored; the K types, which the package cannot make, are random blocks instead."""
    import gguf

    qtype = gguf.GGMLQuantizationType[kind]
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if kind not in _K_HALVES:
        return gguf.quants.quantize(values, qtype)
    rng = np.random.default_rng(abs(int(values.view(np.int32).sum())))
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    data = rng.integers(0, 256, (values.size // block, size), np.uint8)
    for at in _K_HALVES[kind]:
        data[:, at : at + 2] = rng.uniform(1e-5, 1e-4, len(data)).astype(np.float16).reshape(-1, 1).view(np.uint8)
    return data.reshape(values.shape[0], -1)


def write_mixed(
    path: Path,
    shape: LlamaShape,
    types: Mapping[str, str],
    *,
    extra: Mapping[str, NDArray[Any]] | None = None,
    **options: Any,
) -> dict[str, NDArray[np.float32]]:
    """Writes a model whose matrices have the type that `types` gives for the longest suffix of their names (`""` is the
    default); `extra` adds tensors in F32. Returns all weights in float32."""
    import gguf

    rng = np.random.default_rng(len(path.name))
    sources, weights = [], {}

    def add(name: str, data: NDArray[Any], dims: tuple[int, ...], kind: str) -> None:
        make: Callable[[], NDArray[Any]] = lambda: data
        sources.append(TensorSource(name, dims, gguf.GGMLQuantizationType[kind], data.nbytes, make))
        if kind == "BF16":
            weights[name] = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            weights[name] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(dims)

    for name, dims in shape.tensors():
        values = rng.normal(scale=0.1, size=dims).astype(np.float32)
        stem = name.removesuffix(".weight")
        kind = "F32" if len(dims) == 1 else types[max((s for s in types if stem.endswith(s)), key=len)]
        add(name, encode(values, kind) if len(dims) > 1 else values, dims, kind)
    for name, values in (extra or {}).items():
        add(name, np.ascontiguousarray(values, np.float32), values.shape, "F32")
    options.setdefault("vocabulary", byte_level_vocabulary(shape.n_vocab))
    write_llama_gguf(path, shape, sources, **options)
    return weights
