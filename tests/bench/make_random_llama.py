#!/usr/bin/env python3
"""Makes a GGUF file of the Llama architecture with random weights, for speed comparisons on large shapes.

    make_random_llama.py OUT.gguf --shape 1b --type q4_0

The blocks of quantised types are drawn directly (uniform codes, scales around the value that gives the wanted standard
deviation), tensor by tensor: no float model is ever held, and the same seed gives the same file. The 1b and 3b shapes
are those of Llama-3.2 (tied embeddings, vocabulary of 128,256); the tokenizer is a small working byte-level BPE.

`--gate-rank R` makes every FFN's gate a product of random factors of that rank, then quantised: a small predictor can tell
which of its neurons a token needs, as it can in naturally sparse models, and cannot where all weights are drawn apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from llama_gguf import LlamaShape, TensorSource, byte_level_vocabulary, write_llama_gguf

ONE_B = LlamaShape(
    n_layers=16,
    n_embd=2048,
    n_heads=32,
    n_kv_heads=8,
    head_dim=64,
    n_ff=8192,
    n_vocab=128256,
    n_ctx=131072,
    rope_theta=500000.0,
)
SHAPES = {
    "tiny": LlamaShape(n_layers=2, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=768, n_vocab=1024),
    "1b": ONE_B,
    # Layers and width of 1b, but more of them: 1.1 GB as q4_1, which llama.cpp maps as it lies (q4_0 it repacks into memory).
    "1.8b": dataclasses.replace(ONE_B, n_layers=25),
    # 1.1 GB as q4_0 with the vocabulary of Llama 2, as naturally sparse models (ReLU-fied Llama 2, Bamboo) have it.
    "1.9b": dataclasses.replace(ONE_B, n_layers=31, n_vocab=32000, n_ctx=4096, rope_theta=LlamaShape.rope_theta),
    "3b": dataclasses.replace(ONE_B, n_layers=28, n_embd=3072, n_heads=24, head_dim=128),
}
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "f16")


def uniform_bytes(rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def halves(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """float16 values [n, k] as bytes [n, 2 k]."""
    return values.astype("<f2").view(np.uint8)


def blocks(kind: str, rng: np.random.Generator, n: int, std: float) -> NDArray[np.uint8]:
    """n random blocks of a quantised type, uint8 [n, bytes of a block], their weights having about mean 0 and `std`.

    Codes are uniform over b bits, whose standard deviation is 2**b / sqrt(12); the scale follows from it.
    """
    bits = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8, "q4_k": 4, "q6_k": 6}[kind]
    scale = std * 12**0.5 / 2**bits * rng.uniform(0.5, 1.5, (n, 1))
    if kind == "q4_0":
        # Codes 1 to 15, whose mean is the zero point: a common offset of all weights would drown the rest within a few layers.
        low, high = (rng.integers(1, 16, (n, 16), dtype=np.uint8) for _ in range(2))
        return np.concatenate([halves(scale), low | high << 4], axis=1)
    if kind == "q4_1":
        return np.concatenate([halves(scale), halves(-7.5 * scale), uniform_bytes(rng, n, 16)], axis=1)
    if kind == "q5_0":
        return np.concatenate([halves(scale), uniform_bytes(rng, n, 20)], axis=1)
    if kind == "q5_1":
        return np.concatenate([halves(scale), halves(-15.5 * scale), uniform_bytes(rng, n, 20)], axis=1)
    if kind == "q8_0":
        return np.concatenate([halves(scale), uniform_bytes(rng, n, 32)], axis=1)
    if kind == "q6_k":  # 256 weights: low bits, high bits, 16 int8 scales, one half: weight = d * s * (code - 32)
        sub = rng.integers(16, 48, (n, 16), dtype=np.uint8)
        return np.concatenate([uniform_bytes(rng, n, 192), sub, halves(scale / 32)], axis=1)
    # q4_k: d, dmin, eight 6-bit scales and minima in 12 bytes, 128 bytes of codes: weight = d * s * code - dmin * m.
    # With s = 2 m everywhere and dmin = 15 d the weights of a sub-block are symmetric around 0.
    m = rng.integers(8, 24, (n, 8), dtype=np.uint8)
    s = 2 * m
    packed = np.concatenate(
        [
            (s[:, :4] & 63) | (s[:, 4:] >> 4) << 6,
            (m[:, :4] & 63) | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        axis=1,
    ).astype(np.uint8)
    d = scale / 32
    return np.concatenate([halves(d), halves(15 * d), packed, uniform_bytes(rng, n, 128)], axis=1)


def random_source(name: str, shape: tuple[int, ...], kind: str, seed: list[int], std: float) -> TensorSource:
    """A weight of the kind asked for; vectors (norms) are float32 around 1."""
    import gguf

    if len(shape) == 1:

        def norm() -> NDArray[Any]:
            return np.random.default_rng(seed).uniform(0.8, 1.2, shape).astype(np.float32)

        return TensorSource(name, shape, gguf.GGMLQuantizationType.F32, 4 * shape[0], norm)
    rows, cols = shape
    if kind == "f16":

        def dense() -> NDArray[Any]:
            rng = np.random.default_rng(seed)
            out = np.empty(shape, np.float16)
            for r in range(0, rows, 4096):  # bounded: the float32 draw of a large embedding would be 1 GB
                part = rng.standard_normal((min(4096, rows - r), cols), dtype=np.float32)
                out[r : r + len(part)] = part * std
            return out

        return TensorSource(name, shape, gguf.GGMLQuantizationType.F16, 2 * rows * cols, dense)
    qtype = gguf.GGMLQuantizationType[kind.upper()]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    if cols % per_block:
        raise SystemExit(f"{name}: {cols} columns are not a multiple of {kind}'s {per_block}")
    row_bytes = cols // per_block * block_bytes

    def quantised() -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        out = np.empty((rows, row_bytes), np.uint8)
        for r in range(0, rows, 4096):
            n = min(4096, rows - r)
            out[r : r + n] = blocks(kind, rng, n * cols // per_block, std).reshape(n, row_bytes)
        return out

    return TensorSource(name, shape, qtype, rows * row_bytes, quantised)


def low_rank_source(
    name: str, shape: tuple[int, int], rank: int, kind: str, seed: list[int], std: float
) -> TensorSource:
    """A matrix of that rank and standard deviation, but for the rounding of its blocks."""
    import gguf

    qtype = gguf.GGMLQuantizationType[kind.upper()]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    rows, cols = shape

    def quantised() -> NDArray[Any]:
        rng = np.random.default_rng(seed)
        right = rng.standard_normal((rank, cols), dtype=np.float32)
        out = np.empty((rows, cols // per_block * block_bytes), np.uint8)
        for r in range(0, rows, 1024):
            left = rng.standard_normal((min(1024, rows - r), rank), dtype=np.float32) * np.float32(std / rank**0.5)
            out[r : r + len(left)] = gguf.quants.quantize(left @ right, qtype)
        return out

    return TensorSource(name, shape, qtype, rows * (cols // per_block * block_bytes), quantised)


def make(
    path: Path,
    shape_name: str,
    kind: str,
    head_kind: str,
    seed: int,
    gate_rank: int,
    progress: Callable[[str], None],
) -> None:
    """Writes the file under a temporary name and renames it when it is whole."""
    shape = SHAPES[shape_name]
    sources = []
    for index, (name, dims) in enumerate(shape.tensors()):
        use = head_kind if name in ("token_embd.weight", "output.weight") else kind
        # 1/sqrt(inputs) keeps activations at the scale of their input whatever the width.
        std = dims[-1] ** -0.5
        if gate_rank and name.endswith("ffn_gate.weight"):
            sources.append(low_rank_source(name, (dims[0], dims[1]), gate_rank, use, [seed, index], std))
        else:
            sources.append(random_source(name, dims, use, [seed, index], std))
    size = sum(s.nbytes for s in sources)
    progress(f"{path}: {shape_name} shape, {kind}, embedding {head_kind}, {size / 1e6:.0f} MB of weights")
    part = path.with_name(path.name + ".part")
    write_llama_gguf(
        part, shape, sources, byte_level_vocabulary(shape.n_vocab), name=f"random-llama-{shape_name}-{kind}"
    )
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="type of all matrices")
    parser.add_argument(
        "--head-type", choices=TYPES, help="type of the embedding, which is also the head (default: --type)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate-rank", type=int, default=0, help="rank of the FFNs' gates; 0: drawn weight by weight")
    args = parser.parse_args()
    if args.gate_rank and args.type not in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        parser.error(f"--gate-rank rounds to q4_0, q4_1, q5_0, q5_1 or q8_0, not to {args.type}")
    make(
        args.out,
        args.shape,
        args.type,
        args.head_type or args.type,
        args.seed,
        args.gate_rank,
        lambda s: print(s, file=sys.stderr),
    )


if __name__ == "__main__":
    main()
