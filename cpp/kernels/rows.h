// Addressing inside stored neuron records, shared by all instruction sets.
#pragma once

#include "sparse_run/tensor.h"

namespace sr {

constexpr int kStripeChunks = 8;  // chunks of 4 inputs a lane, so 32 inputs a lane
constexpr int kGemmRowBlock = 32;  // rows that rows_gemm_* unpacks at a time, so that they stay in L2 for all vectors

// Where the planes of a quantised row begin. Full stripes come first; the last one may have fewer lanes, and every
// plane of it is that much narrower.
struct RowPlan {
  int stripes, full, tail;           // stripes = full + (tail > 0); tail = lanes of the last, narrower one
  size_t high, scale, min;           // bytes from the row's start
  int low_lane, high_lane, parts;    // bytes a lane of the two code planes; scales a lane

  SR_INLINE explicit RowPlan(const NeuronMatrix& w)
      : stripes(w.stripes()),
        full(w.slabs() / kRowLanes),
        tail(w.slabs() % kRowLanes),
        high(size_t(w.slabs()) * (w.kind == WeightKind::q8 ? 32 : 16)),
        scale(w.code_bytes()),
        min(w.code_bytes() + w.scale_bytes()),
        low_lane(w.kind == WeightKind::q8 ? 32 : 16),
        high_lane(w.kind == WeightKind::q5 ? 4 : w.kind == WeightKind::q6 ? 8 : 0),
        parts(kSlabCols / w.group) {}

  SR_INLINE int lanes(int stripe) const { return stripe < full ? kRowLanes : tail; }
};

// Where the code of input c lies in a row: byte `at` of the plane that begins at `plane`, bits from `shift` on.
struct CodePlace {
  size_t at;
  int shift;
};
SR_INLINE CodePlace low_place(const RowPlan& plan, int c) {
  const int stripe = c / kStripeCols, lane = c % kStripeCols / kSlabCols, chunk = c % kSlabCols / 4;
  const bool bytes = plan.low_lane == 32;  // 8 bits: every chunk has its own bytes; else chunk v and v + 4 share them
  const int row = bytes ? chunk : chunk % 4;
  return {size_t(stripe) * kRowLanes * plan.low_lane + size_t(row * plan.lanes(stripe) + lane) * 4 + c % 4,
          bytes ? 0 : chunk / 4 * 4};
}
// 5 bits: bit v of a byte belongs to chunk v. 6 bits: bits 2 v, 2 v + 1 to chunk v of the first half or v + 4 of the
// second.
SR_INLINE CodePlace high_place(const RowPlan& plan, int c) {
  const int stripe = c / kStripeCols, lane = c % kStripeCols / kSlabCols, chunk = c % kSlabCols / 4;
  const bool one_bit = plan.high_lane == 4;
  const int row = one_bit ? 0 : chunk / 4;
  return {plan.high + size_t(stripe) * kRowLanes * plan.high_lane + size_t(row * plan.lanes(stripe) + lane) * 4 + c % 4,
          one_bit ? chunk : chunk % 4 * 2};
}
SR_INLINE unsigned row_code(const RowPlan& plan, const uint8_t* row, int c) {
  const CodePlace low = low_place(plan, c);
  if (plan.low_lane == 32) return row[low.at];
  unsigned u = row[low.at] >> low.shift & 15;
  if (plan.high_lane) {
    const CodePlace high = high_place(plan, c);
    u |= (unsigned(row[high.at]) >> high.shift & (plan.high_lane == 4 ? 1 : 3)) << 4;
  }
  return u;
}
// Index of a scale (or minimum) in its plane.
SR_INLINE size_t scale_place(const RowPlan& plan, int stripe, int part, int lane) {
  return size_t(stripe) * kRowLanes * plan.parts + size_t(part * plan.lanes(stripe) + lane);
}

SR_INLINE const uint8_t* record_of(const NeuronMatrix& w, const int32_t* ids, int k) {
  return w.data + w.offset_of(ids ? ids[k] : k);
}

}  // namespace sr
