// Thresholding of a quantised vector and the list of its active columns, for any Vec.
#pragma once

#include <array>
#include <cstring>

#include "kernels/table.h"

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

template <class V>
int select(const float* x, const float* threshold, int stride, int n, int8_t* q, int32_t* sum, uint8_t* cols,
           uint8_t* count) {
  int total = 0;
  float tail_x[kSlabCols], tail_t[kSlabCols], same[kSlabCols];
  for (float& t : same) t = threshold[0];
  for (int s = 0; s * kSlabCols < n; ++s) {
    const float *px = x + s * kSlabCols, *pt = stride ? threshold + s * kSlabCols : same;
    const int width = n - s * kSlabCols;
    if (width < kSlabCols) {  // zeros are never kept
      std::memset(tail_x, 0, sizeof tail_x);
      std::memset(tail_t, 0, sizeof tail_t);
      std::memcpy(tail_x, px, sizeof(float) * width);
      std::memcpy(tail_t, pt, sizeof(float) * width);
      px = tail_x;
      pt = tail_t;
    }
    const uint32_t active = V::mask32(V::above32(px, pt), q + s * kSlabCols, sum + 2 * s);
    // Eight bytes at a time, of which the next eight overwrite what is too much; the last stay within the slab's 32.
    uint8_t* list = cols + s * kSlabCols;
    int listed = 0;
    for (int b = 0; b < 4; ++b) {
      const uint32_t byte = active >> 8 * b & 255;
      const uint64_t positions = kBitPositions.of[byte] + 0x0808080808080808ull * b;
      std::memcpy(list + listed, &positions, 8);
      listed += __builtin_popcount(byte);
    }
    count[s] = uint8_t(listed);
    total += listed;
  }
  return total;
}

}  // namespace simd
}  // namespace sr
