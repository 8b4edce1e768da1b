"""Tensor types of GGUF: block sizes and the unpacking of their blocks into codes, scales and minima.

A type is one entry of `TENSOR_TYPES`: its blocks [n, bytes] become codes [n, weights], scales and minima [n, groups]; the
rest of the converter needs to know nothing else about it. All are exact. The K types and IQ4_XS hold a scale as a product
`d * s` of a half and a small integer, which stays one: int8 scales, and the halves [n, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .codes import Codes, Form

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    U8 = NDArray[np.uint8]
    F16 = NDArray[np.float16]
    # codes [n, weights of a block], scales [n, groups], minima or None; where they are products, their units [n, 1]
    Unpacked = tuple[U8, F16, F16 | None] | tuple[U8, NDArray[np.int8], NDArray[np.int8] | None, F16, F16 | None]


@dataclass(frozen=True)
class TensorType:
    """One type: `block` weights take `block_bytes`. Without `unpack` it is a float type, see `decode_floats`."""

    name: str
    block: int
    block_bytes: int
    form: Form
    unpack: Callable[[Any], Any] | None = None

    def nbytes(self, weights: int) -> int:
        """Bytes of so many weights, a multiple of `block`."""
        return weights // self.block * self.block_bytes

    def decode(self, data: U8) -> Codes | NDArray[np.float32]:
        """Stored rows u8 [rows, bytes of a row] to codes, or to float32 [rows, cols] for float types."""
        if self.unpack is None:
            return decode_floats(self.name, data)
        rows = data.shape[0]
        arrays = self.unpack(data.reshape(-1, self.block_bytes))
        return Codes(self.form, *(None if a is None else a.reshape(rows, -1) for a in arrays))  # type: ignore[arg-type]


def decode_floats(name: str, data: U8) -> NDArray[np.float32]:
    """F32, F16 or BF16 bytes [rows, bytes of a row] to float32 [rows, cols]."""
    import numpy as np

    if name == "F32":
        return data.view("<f4").astype(np.float32, copy=False)
    if name == "F16":
        return data.view("<f2").astype(np.float32)
    return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _half(blocks: U8, at: int) -> F16:
    """The half at byte `at` of each block, [n, 1]."""
    import numpy as np

    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(blocks: U8) -> U8:
    """Low nibbles, then high nibbles: [n, k] -> [n, 2 k]."""
    import numpy as np

    out = np.empty((blocks.shape[0], 2, blocks.shape[1]), np.uint8)
    np.bitwise_and(blocks, 15, out=out[:, 0])
    np.right_shift(blocks, 4, out=out[:, 1])
    return out.reshape(blocks.shape[0], -1)


def _add_bits(codes: U8, high: U8) -> U8:
    """Adds bit 4 to 32 codes a block from 4 bytes, least significant bit first."""
    import numpy as np

    bits = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    bits <<= 4
    codes |= bits
    return codes


def _q4_0(b: U8) -> Unpacked:
    return _nibbles(b[:, 2:]), _half(b, 0), None


def _q4_1(b: U8) -> Unpacked:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)


def _q5_0(b: U8) -> Unpacked:
    return _add_bits(_nibbles(b[:, 6:]), b[:, 2:6]), _half(b, 0), None


def _q5_1(b: U8) -> Unpacked:
    return _add_bits(_nibbles(b[:, 8:]), b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: U8) -> Unpacked:
    import numpy as np

    return b[:, 2:] ^ np.uint8(0x80), _half(b, 0), None


def _k_scales(b: U8) -> tuple[NDArray[np.int8], NDArray[np.int8], F16, F16]:
    """Scales and minima [n, 8] of Q4_K and Q5_K and their units: two halves, then eight pairs of 6 bits in 12 bytes."""
    import numpy as np

    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return scale.view(np.int8), minimum.view(np.int8), _half(b, 0), -_half(b, 2)


def _pairs(b: U8, at: int) -> U8:
    """256 codes of 2 bits from the 64 bytes at `at`, [n, 2, 4, 32]: 32 bytes hold 4 times 32 weights, low bits first."""
    import numpy as np

    runs = b[:, at : at + 64].reshape(-1, 2, 1, 32)
    return (runs >> np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)) & np.uint8(3)


def _q2_k(b: U8) -> Unpacked:
    import numpy as np

    scales, mins = (b[:, :16] & 15).view(np.int8), (b[:, :16] >> 4).view(np.int8)
    return _pairs(b, 16).reshape(-1, 256), scales, mins, _half(b, 80), -_half(b, 82)


def _q3_k(b: U8) -> Unpacked:
    import numpy as np

    n = b.shape[0]
    # Bit j of byte i: weight i of run j is not 4 less. A 4-bit code is 8 more than what it stands for.
    high = (b[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(8, 1)) & np.uint8(1)
    codes = _pairs(b, 32).reshape(n, 8, 32) + (high << np.uint8(2)) + np.uint8(4)
    # Sixteen 6-bit scales less 32: low nibbles of 8 bytes, then high ones; pairs of high bits in 4 bytes.
    top = (b[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1)) & np.uint8(3)
    scales = _nibbles(b[:, 96:104]) | (top.reshape(n, 16) << np.uint8(4))
    return codes.reshape(n, 256), scales.view(np.int8) - np.int8(32), None, _half(b, 108), None


def _q4_k(b: U8) -> Unpacked:
    # 4 runs of 32 bytes; each holds 32 weights in its low and the next 32 in its high nibbles.
    return _nibbles(b[:, 16:].reshape(-1, 32)).reshape(-1, 256), *_k_scales(b)


def _q5_k(b: U8) -> Unpacked:
    import numpy as np

    codes = _nibbles(b[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    # Bit j of byte i is bit 4 of weight i in group j.
    for j in range(8):
        bit = (b[:, 16:48] >> np.uint8(j)) & np.uint8(1)
        codes[:, j] |= bit << np.uint8(4)
    return codes.reshape(-1, 256), *_k_scales(b)


def _q6_k(b: U8) -> Unpacked:
    import numpy as np

    n = b.shape[0]
    # Two halves of 128 weights: 64 bytes of low nibbles, 32 bytes with four times two high bits.
    codes = _nibbles(b[:, :128].reshape(-1, 64)).reshape(n, 2, 4, 32)
    high = b[:, 128:192].reshape(n, 2, 32)
    for j in range(4):
        codes[:, :, j] |= ((high >> np.uint8(2 * j)) & np.uint8(3)) << np.uint8(4)
    return codes.reshape(n, 256), b[:, 192:208].view(np.int8), None, _half(b, 208), None


# The sixteen values that IQ4 codes stand for, in units of the scale: a non-linear grid, but of integers, so 8-bit codes hold
# it exactly (at twice the bytes).
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _iq4_codes(blocks: U8) -> U8:
    """Indices in nibbles [n, 16] to unsigned 8-bit codes [n, 32]."""
    import numpy as np

    table = (np.array(_IQ4_VALUES, np.int16) + 128).astype(np.uint8)
    codes: U8 = table[_nibbles(blocks)]
    return codes


def _iq4_nl(b: U8) -> Unpacked:
    return _iq4_codes(b[:, 2:]), _half(b, 0), None


def _iq4_xs(b: U8) -> Unpacked:
    import numpy as np

    # Eight 6-bit scales less 32: low nibbles in 4 bytes, high pairs of bits in 2.
    high = b[:, 2:4].astype(np.uint16)
    high = high[:, :1] | (high[:, 1:] << np.uint16(8))
    pairs = (high >> np.arange(0, 16, 2, dtype=np.uint16)) & np.uint16(3)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | (pairs << np.uint16(4)).astype(np.uint8)).view(np.int8) - np.int8(32)
    return _iq4_codes(b[:, 8:].reshape(-1, 16)).reshape(-1, 256), scales, None, _half(b, 0), None


TENSOR_TYPES: dict[int, TensorType] = {
    0: TensorType("F32", 1, 4, Form("f32")),
    1: TensorType("F16", 1, 2, Form("f16")),
    2: TensorType("Q4_0", 32, 18, Form("q4"), _q4_0),
    3: TensorType("Q4_1", 32, 20, Form("q4", has_min=True), _q4_1),
    6: TensorType("Q5_0", 32, 22, Form("q5"), _q5_0),
    7: TensorType("Q5_1", 32, 24, Form("q5", has_min=True), _q5_1),
    8: TensorType("Q8_0", 32, 34, Form("q8"), _q8_0),
    10: TensorType("Q2_K", 256, 84, Form("q4", group=16, has_min=True, products=True), _q2_k),
    11: TensorType("Q3_K", 256, 110, Form("q4", group=16, products=True), _q3_k),
    12: TensorType("Q4_K", 256, 144, Form("q4", has_min=True, products=True), _q4_k),
    13: TensorType("Q5_K", 256, 176, Form("q5", has_min=True, products=True), _q5_k),
    14: TensorType("Q6_K", 256, 210, Form("q6", group=16, products=True), _q6_k),
    20: TensorType("IQ4_NL", 32, 18, Form("q8"), _iq4_nl),
    23: TensorType("IQ4_XS", 256, 136, Form("q8", products=True), _iq4_xs),
    30: TensorType("BF16", 1, 2, Form("bf16")),
}

# Names of the types that exist but are not read here, for the message.
GGML_TYPE_NAMES: dict[int, str] = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
