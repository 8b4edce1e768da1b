"""Random GPTQ and AWQ checkpoints as their programs write them, with the weights that they stand for: written from the formats'
descriptions, in plain NumPy, sharing nothing with the converter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Int4Matrix:
    """`stored`: tensors without the module's name; `weight` float32 [outputs, inputs]."""

    stored: dict[str, NDArray[Any]]
    weight: NDArray[np.float32]


def pack_words(values: NDArray[Any], order: list[int]) -> NDArray[np.int32]:
    """[n, 8 m] small integers to [n, m] words; nibble i holds column order[i] of its eight."""
    n, cols = values.shape
    words = np.zeros((n, cols // 8), np.uint32)
    for row in range(n):
        for word in range(cols // 8):
            for i in range(8):
                words[row, word] |= np.uint32(int(values[row, 8 * word + order[i]]) << (4 * i))
    return words.view(np.int32)


def random_matrix(
    outputs: int,
    inputs: int,
    group: int,
    method: str,
    rng: np.random.Generator,
    *,
    symmetric: bool = False,
    order: NDArray[np.int32] | None = None,
    zero_offset: int = 1,
) -> Int4Matrix:
    """`order`: the group of each input (default: in turn). GPTQ's first format stores zeros less `zero_offset`."""
    each = inputs if group == -1 else group
    groups = inputs // each
    codes = rng.integers(0, 16, (inputs, outputs))
    lowest, highest = (1, 16) if method == "gptq" else (0, 16)
    zeros = np.full((groups, outputs), 8) if symmetric else rng.integers(lowest, highest, (groups, outputs))
    scales = (rng.uniform(0.5, 1.5, (groups, outputs)) * 0.1 / np.sqrt(inputs)).astype(np.float16)
    index = np.arange(inputs, dtype=np.int32) // each if order is None else order
    weight = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    straight = list(range(8))
    if method == "gptq":
        stored = {
            "qweight": np.ascontiguousarray(pack_words(np.ascontiguousarray(codes.T), straight).T),
            "qzeros": pack_words(zeros - zero_offset, straight),
            "scales": scales,
            "g_idx": index,
        }
    else:
        stored = {"qweight": pack_words(codes, AWQ_ORDER), "qzeros": pack_words(zeros, AWQ_ORDER), "scales": scales}
    return Int4Matrix(stored, np.ascontiguousarray(weight.T))
