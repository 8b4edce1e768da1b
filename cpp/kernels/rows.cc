// What the rows kernels of all instruction sets share: the order of their input, and sizes.
#include "kernels/rows.h"

#include <algorithm>
#include <cstring>

#include "kernels/table.h"

namespace sr {

void order_for_rows(const QuantVector& x, int cols, int8_t* q, float* scale, int32_t* sum) {
  const int slabs = (cols + kSlabCols - 1) / kSlabCols;
  for (int first = 0; first < slabs; first += kRowLanes, q += kStripeCols, scale += kRowLanes, sum += 2 * kRowLanes) {
    const int lanes = std::min(kRowLanes, slabs - first);
    if (lanes < kRowLanes) {
      std::memset(q, 0, kStripeCols);
      std::memset(scale, 0, kRowLanes * sizeof(float));
      std::memset(sum, 0, 2 * kRowLanes * sizeof(int32_t));
    }
    for (int l = 0; l < lanes; ++l) {
      const int8_t* from = x.q + size_t(first + l) * kSlabCols;
      for (int v = 0; v < kStripeChunks; ++v) std::memcpy(q + (v * kRowLanes + l) * 4, from + 4 * v, 4);
      scale[l] = x.scale[first + l];
      sum[l] = x.sum[2 * (first + l)];
      sum[kRowLanes + l] = x.sum[2 * (first + l) + 1];
    }
  }
}

void prefetch_start(const NeuronMatrix& w, const int32_t* ids, int begin, int end, int lines) {
  for (int k = begin; k < end; ++k)
    for (int r = 0; r < (w.gated ? 2 : 1); ++r)
      for (size_t at = 0; at < w.row_bytes(); at += 64) {
        if (lines-- <= 0) return;
        __builtin_prefetch(record_of(w, ids, k) + r * w.up_offset() + at, 0, 2);
      }
}

size_t rows_scratch_bytes(const NeuronMatrix& w) {
  if (!is_quantised(w.kind)) return size_t(kGemmRowBlock) * ((w.cols + 15) / 16 * 16) * sizeof(float) + 64;
  // Codes as bytes, and per scale group two floats.
  return size_t(kGemmRowBlock) * w.stripes() * (kStripeCols + size_t(kSlabCols / w.group) * kRowLanes * 8) + 64;
}

}  // namespace sr
