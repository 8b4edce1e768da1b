// Thresholding of a quantised vector and the list of its active columns, for any Vec.
#pragma once

#include <cstring>

#include "kernels/table.h"

namespace sr {
namespace simd {

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
    const int listed = V::list32(active, cols + s * kSlabCols);
    count[s] = uint8_t(listed);
    total += listed;
  }
  return total;
}

}  // namespace simd
}  // namespace sr
