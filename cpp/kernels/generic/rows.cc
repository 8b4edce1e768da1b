// Rows of neurons times vectors, one row at a time: the canonical order of kernels/table.h, spelt out.
#include "kernels/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/f16.h"
#include "kernels/generic/generic.h"

namespace sr {
namespace generic {
namespace {

float half_at(const uint8_t* p, size_t i) {
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return f16_to_f32(h);
}

float reduce(float* lane) {
  for (int step = kRowLanes / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  return lane[0];
}

// One stripe's codes, signed (u - bias), in the order of RowVector::q. Lanes that the stripe lacks are left as they
// are.
void unpack_stripe(const NeuronMatrix& w, const RowPlan& plan, const uint8_t* row, int stripe, int8_t* out) {
  const int bytes = 4 * plan.lanes(stripe), bias = code_bias(w.kind);
  constexpr int kChunk = 4 * kRowLanes;
  const uint8_t* low = row + size_t(stripe) * kRowLanes * plan.low_lane;
  const uint8_t* high = row + plan.high + size_t(stripe) * kRowLanes * plan.high_lane;
  if (w.kind == WeightKind::q8) {
    for (int v = 0; v < kStripeChunks; ++v)
      for (int i = 0; i < bytes; ++i) out[v * kChunk + i] = int8_t(low[v * bytes + i] - bias);
    return;
  }
  for (int v = 0; v < kStripeChunks; ++v) {
    const int half = v / 4, quarter = v % 4;
    for (int i = 0; i < bytes; ++i) {
      int u = low[quarter * bytes + i] >> 4 * half & 15;
      if (w.kind == WeightKind::q5) u |= (high[i] >> v & 1) << 4;
      if (w.kind == WeightKind::q6) u |= (high[half * bytes + i] >> 2 * quarter & 3) << 4;
      out[v * kChunk + i] = int8_t(u - bias);
    }
  }
}

constexpr int kVectors = 8;  // vectors that share one unpacking

// The dot products of a row with n <= kVectors vectors.
void dots_q(const NeuronMatrix& w, const RowPlan& plan, const uint8_t* row, const RowVector& x, int n, float* y,
            size_t ldy) {
  float lane[kVectors][kRowLanes] = {};
  int8_t codes[kStripeCols];
  const int bias = code_bias(w.kind), chunks = kStripeChunks / plan.parts;
  for (int s = 0; s < plan.stripes; ++s) {
    unpack_stripe(w, plan, row, s, codes);
    for (int v = 0; v < n; ++v) {
      const size_t at = size_t(v) * plan.stripes + s;
      const int8_t* q = x.q + at * kStripeCols;
      const int32_t* sums = x.sum + at * 2 * kRowLanes;
      for (int l = 0; l < plan.lanes(s); ++l) {
        const float x_scale = x.scale[at * kRowLanes + l];
        for (int p = 0; p < plan.parts; ++p) {
          int sum = 0;
          for (int chunk = p * chunks; chunk < (p + 1) * chunks; ++chunk)
            for (int i = (chunk * kRowLanes + l) * 4, j = 0; j < 4; ++j) sum += codes[i + j] * q[i + j];
          const float scale = half_at(row + plan.scale, scale_place(plan, s, p, l));
          lane[v][l] = std::fma(float(sum) * scale, x_scale, lane[v][l]);
          if (w.has_min) {
            const int x_sum = plan.parts == 1 ? sums[l] + sums[kRowLanes + l] : sums[p * kRowLanes + l];
            const float min = std::fma(scale, float(bias), half_at(row + plan.min, scale_place(plan, s, p, l)));
            lane[v][l] = std::fma(min, x_scale * float(x_sum), lane[v][l]);
          }
        }
      }
    }
  }
  for (int v = 0; v < n; ++v) y[v * ldy] = reduce(lane[v]);
}

float dot_f(const NeuronMatrix& w, const uint8_t* row, const float* x) {
  float lane[kRowLanes] = {};
  for (int c = 0; c < w.cols; ++c) {
    float v;
    if (w.kind == WeightKind::f32) {
      std::memcpy(&v, row + 4 * size_t(c), 4);
    } else {
      uint16_t h;
      std::memcpy(&h, row + 2 * size_t(c), 2);
      v = w.kind == WeightKind::f16 ? f16_to_f32(h) : bf16_to_f32(h);
    }
    lane[c % kRowLanes] = std::fma(v, x[c], lane[c % kRowLanes]);
  }
  return reduce(lane);
}

}  // namespace

void rows_gemm_q(const NeuronMatrix& w, const RowVector& x, int n, const int32_t* ids, int begin, int end, float* gate,
                 float* up, size_t ldy, void*) {
  const RowPlan plan(w);
  for (int first = 0; first < n; first += kVectors) {
    const size_t at = size_t(first) * plan.stripes;
    const RowVector some{x.q + at * kStripeCols, x.scale + at * kRowLanes, x.sum + at * 2 * kRowLanes};
    const int count = std::min(kVectors, n - first);
    for (int k = begin; k < end; ++k) {
      const uint8_t* record = record_of(w, ids, k);
      if (gate) dots_q(w, plan, record, some, count, gate + first * ldy + k, ldy);
      if (up) dots_q(w, plan, record + w.up_offset(), some, count, up + first * ldy + k, ldy);
    }
  }
}

void rows_gemm_f(const NeuronMatrix& w, const float* x, size_t ldx, int n, const int32_t* ids, int begin, int end,
                 float* gate, float* up, size_t ldy, void*) {
  for (int v = 0; v < n; ++v)
    for (int k = begin; k < end; ++k) {
      const uint8_t* record = record_of(w, ids, k);
      if (gate) gate[v * ldy + k] = dot_f(w, record, x + v * ldx);
      if (up) up[v * ldy + k] = dot_f(w, record + w.up_offset(), x + v * ldx);
    }
}

void rows_q(const NeuronMatrix& w, const RowVector& x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  rows_gemm_q(w, x, 1, ids, begin, end, gate, up, 0, nullptr);
}

void rows_f(const NeuronMatrix& w, const float* x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  rows_gemm_f(w, x, 0, 1, ids, begin, end, gate, up, 0, nullptr);
}

}  // namespace generic
}  // namespace sr
