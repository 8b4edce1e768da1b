// The positions of the set bits of a mask as bytes, for instruction sets that have no instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_run/tensor.h"

namespace sr {
namespace simd {

// For every byte, the positions of its set bits, ascending: eight entries of one byte each.
struct BitPositions {
  uint64_t of[256];
  constexpr BitPositions() : of() {
    for (int b = 0; b < 256; ++b) {
      int n = 0;
      for (int i = 0; i < 8; ++i)
        if (b >> i & 1) of[b] |= uint64_t(i) << 8 * n++;
    }
  }
};
static constexpr BitPositions kBitPositions;

// Writes them ascending and returns their number; of the 32 bytes of `list` those behind them may change.
SR_INLINE int list_bits(uint32_t bits, uint8_t* list) {
  // Eight bytes at a time, of which the next eight overwrite what is too much.
  int listed = 0;
  for (int b = 0; b < 4; ++b) {
    const uint32_t byte = bits >> 8 * b & 255;
    const uint64_t positions = kBitPositions.of[byte] + 0x0808080808080808ull * b;
    std::memcpy(list + listed, &positions, 8);
    listed += __builtin_popcount(byte);
  }
  return listed;
}

}  // namespace simd
}  // namespace sr
