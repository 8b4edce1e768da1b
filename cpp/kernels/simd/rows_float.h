// Rows of float weights times vectors, for any Vec: lane l of 16 sums columns l, l + 16 ... in order.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/f16.h"
#include "kernels/simd/gemv.h"
#include "kernels/simd/rows.h"

namespace sr {
namespace simd {

// n (1..kLanes) weights from column c on, the other lanes 0.
template <class V, int KIND>
SR_INLINE typename V::F load_weight_part(const uint8_t* p, size_t c, int n) {
  if constexpr (KIND == int(WeightKind::f32)) return V::load_part(reinterpret_cast<const float*>(p) + c, n);
  if constexpr (KIND == int(WeightKind::f16)) return V::load_f16_part(reinterpret_cast<const uint16_t*>(p) + c, n);
  if constexpr (KIND == int(WeightKind::bf16)) {
    uint16_t t[V::kLanes] = {};
    std::memcpy(t, reinterpret_cast<const uint16_t*>(p) + c, 2 * n);
    return V::load_bf16(t);
  }
}

// acc[r][t] += row r times vector t over 16 columns from c on; TAIL: over the columns that are left.
template <class V, int KIND, int R, int NT, bool TAIL>
SR_INLINE void add_columns(const uint8_t* const* row, const float* x, size_t ldx, int cols, int c,
                           Lanes<V> (*acc)[NT]) {
  constexpr int L = V::kLanes;
  for (int h = 0; h < Lanes<V>::kCount; ++h) {
    const size_t at = c + h * L;
    const int n = TAIL ? std::min(L, cols - int(at)) : L;
    if (TAIL && n <= 0) break;
    typename V::F w[R];
    for (int r = 0; r < R; ++r)
      w[r] = TAIL ? load_weight_part<V, KIND>(row[r], at, n) : load_weight<V, KIND>(row[r], at);
    for (int t = 0; t < NT; ++t) {
      const auto xv = TAIL ? V::load_part(x + t * ldx + at, n) : V::load(x + t * ldx + at);
      for (int r = 0; r < R; ++r) {
        const auto sum = V::fma(w[r], xv, acc[r][t].f[h]);
        acc[r][t].f[h] = TAIL ? V::first_lanes(sum, acc[r][t].f[h], n) : sum;
      }
    }
  }
}

template <class V, int KIND, int R, int NT>
SR_INLINE void float_dots(const uint8_t* const* row, const uint8_t* const* next, int lines, const float* x, size_t ldx,
                          int cols, float (*y)[NT]) {
  Lanes<V> acc[R][NT];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < NT; ++t) acc[r][t].clear();
  int c = 0, fetched = 0;
  for (; c + kRowLanes <= cols; c += kRowLanes) {
    if (next && fetched < lines) {
      for (int r = 0; r < R; ++r)
        __builtin_prefetch(next[r] + 64 * fetched, 0, 2);
      ++fetched;
    }
    add_columns<V, KIND, R, NT, false>(row, x, ldx, cols, c, acc);
  }
  if (c < cols) add_columns<V, KIND, R, NT, true>(row, x, ldx, cols, c, acc);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < NT; ++t) y[r][t] = V::reduce_lanes(acc[r][t].f);
}

template <class V, int KIND>
struct FloatDots {
  const float* x;
  int cols, lines;
  template <int R>
  SR_INLINE void of(const uint8_t* const* row, const uint8_t* const* next, float* y) const {
    float out[R][1];
    float_dots<V, KIND, R, 1>(row, next, lines, x, 0, cols, out);
    for (int r = 0; r < R; ++r) y[r] = out[r][0];
  }
};

template <class V, int KIND>
void rows_float(const NeuronMatrix& w, const float* x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  const RowWalk walk(w, ids, end, gate != nullptr, up != nullptr);
  walk_rows(walk, begin, gate, up, FloatDots<V, KIND>{x, w.cols, walk.lines});
}

template <class V>
void rows_f(const NeuronMatrix& w, const float* x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  if (!gate && !up) return;
  switch (w.kind) {
    case WeightKind::f32: return rows_float<V, int(WeightKind::f32)>(w, x, ids, begin, end, gate, up);
    case WeightKind::f16: return rows_float<V, int(WeightKind::f16)>(w, x, ids, begin, end, gate, up);
    default: return rows_float<V, int(WeightKind::bf16)>(w, x, ids, begin, end, gate, up);
  }
}

// Rows widened to fp32 in blocks that stay in L2, R rows x NT vectors at a time.
template <class V, int R, int NT>
SR_INLINE void float_block(const uint8_t* const* row, const float* x, size_t ldx, int cols, float* const* y, size_t at,
                           size_t ldy) {
  float out[R][NT];
  float_dots<V, int(WeightKind::f32), R, NT>(row, nullptr, 0, x, ldx, cols, out);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < NT; ++t) y[r][at + t * ldy] = out[r][t];
}

template <class V>
void widen_row(WeightKind kind, const uint8_t* row, int cols, float* out) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  int c = 0;
  for (; c + V::kLanes <= cols; c += V::kLanes)
    V::store(out + c, kind == WeightKind::f16 ? V::load_f16(halves + c) : V::load_bf16(halves + c));
  for (; c < cols; ++c) out[c] = kind == WeightKind::f16 ? f16_to_f32(halves[c]) : bf16_to_f32(halves[c]);
}

template <class V>
void rows_gemm_f(const NeuronMatrix& w, const float* x, size_t ldx, int n, const int32_t* ids, int begin, int end,
                 float* gate, float* up, size_t ldy, void* memory) {
  if (!gate && !up) return;
  constexpr int R = 2, NT = V::kRowsFloatVectors;
  const int per = gate && up ? 2 : 1;
  const size_t stride = (w.cols + kRowLanes - 1) / kRowLanes * kRowLanes;
  for (int k = begin; k < end; k += kGemmRowBlock / per) {
    const int rows = std::min(kGemmRowBlock / per, end - k) * per;
    const uint8_t* row[kGemmRowBlock];
    float* y[kGemmRowBlock];
    for (int i = 0; i < rows; ++i) {
      const bool is_gate = gate && i % per == 0;
      row[i] = record_of(w, ids, k + i / per) + (is_gate ? 0 : w.up_offset());
      y[i] = (is_gate ? gate : up) + k + i / per;
      if (w.kind == WeightKind::f32) continue;
      float* wide = static_cast<float*>(memory) + i * stride;
      widen_row<V>(w.kind, row[i], w.cols, wide);
      row[i] = reinterpret_cast<const uint8_t*>(wide);
    }
    for (int first = 0; first < n;) {
      const bool many = n - first >= NT;
      for (int i = 0; i < rows;) {
        const bool pair = rows - i >= R;
        const float* v = x + first * ldx;
        const size_t at = first * ldy;
        if (many && pair) float_block<V, R, NT>(row + i, v, ldx, w.cols, y + i, at, ldy);
        else if (many) float_block<V, 1, NT>(row + i, v, ldx, w.cols, y + i, at, ldy);
        else if (pair) float_block<V, R, 1>(row + i, v, ldx, w.cols, y + i, at, ldy);
        else float_block<V, 1, 1>(row + i, v, ldx, w.cols, y + i, at, ldy);
        i += pair ? R : 1;
      }
      first += many ? NT : 1;
    }
  }
}

}  // namespace simd
}  // namespace sr
