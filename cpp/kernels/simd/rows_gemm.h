// Rows of neurons times many vectors (prefill), for any Vec.
//
// A block of rows is unpacked once into bytes with fp32 scales and stays in L2; vectors pass by in groups that stay in
// L1. Per stripe and scale group the operations on each lane are those of rows.h in the same order: the results are the
// same bits.
#pragma once

#include <algorithm>

#include "kernels/simd/rows.h"

namespace sr {
namespace simd {

// Bytes of vectors that are kept in L1 while the block's rows pass by.
constexpr int kVectorBytes = 20 * 1024;

// kGemmRowBlock rows unpacked: codes as bytes in the order of RowVector::q, per group fp32 scale and (moved) minimum.
// Lanes that the last stripe lacks are never looked at.
template <class V, int BITS, bool MIN, int GROUP>
struct RowBlock {
  static constexpr int kParts = kSlabCols / GROUP;
  uint8_t* codes;  // [row, stripes, 512]
  float* scale;    // [row, stripes, parts, 16]
  float* min;
  size_t code_stride, scale_stride;  // of a row

  RowBlock(const RowPlan& plan, void* memory) {
    code_stride = size_t(plan.stripes) * kStripeCols;
    scale_stride = size_t(plan.stripes) * kParts * kRowLanes;
    codes = static_cast<uint8_t*>(memory);
    scale = reinterpret_cast<float*>(codes + kGemmRowBlock * code_stride);
    min = scale + kGemmRowBlock * scale_stride;
  }

  template <bool TAIL>
  void unpack_stripe(const RowPlan& plan, const uint8_t* row, int i, int s) const {
    using P = RowPlanes<V, BITS>;
    constexpr int L = V::kLanes;
    const int lanes = TAIL ? plan.tail : kRowLanes;
    const auto bias = V::set1(float(1 << (BITS - 1)));
    for (int h = 0; h < Lanes<V>::kCount; ++h) {
      const int n = TAIL ? std::min(L, lanes - h * L) : L;
      if (TAIL && n <= 0) break;
      V::template row_unpack<BITS, TAIL>(row + size_t(s) * kRowLanes * P::kLow + h * L * 4,
                                         row + plan.high + size_t(s) * kRowLanes * P::kHigh + h * L * 4, 4 * lanes, n,
                                         codes + i * code_stride + size_t(s) * kStripeCols + h * L * 4);
      const uint16_t* sc = reinterpret_cast<const uint16_t*>(row + plan.scale) + s * kRowLanes * kParts + h * L;
      const uint16_t* mn = reinterpret_cast<const uint16_t*>(row + plan.min) + s * kRowLanes * kParts + h * L;
      for (int p = 0; p < kParts; ++p) {
        const size_t to = i * scale_stride + size_t(s * kParts + p) * kRowLanes + h * L;
        const auto a = V::template load_scales<TAIL>(sc + p * lanes, n);
        V::store(scale + to, a);
        if (MIN) {
          const auto b = V::template load_scales<TAIL>(mn + p * lanes, n);
          V::store(min + to, V::fma(a, bias, b));
        }
      }
    }
  }
  void unpack(const RowPlan& plan, const uint8_t* row, int i) const {
    for (int s = 0; s < plan.full; ++s) unpack_stripe<false>(plan, row, i, s);
    if (plan.tail) unpack_stripe<true>(plan, row, i, plan.full);
  }
};

// One stripe of MR unpacked rows x NT vectors.
template <class V, int BITS, bool MIN, int GROUP, int MR, int NT, bool TAIL>
SR_INLINE void gemm_stripe(const RowPlan& plan, const RowBlock<V, BITS, MIN, GROUP>& block, int first_row,
                           const RowVector& x, int s, Lanes<V> (*acc)[NT]) {
  constexpr int L = V::kLanes, kParts = kSlabCols / GROUP, kChunks = kStripeChunks / kParts;
  for (int h = 0; h < Lanes<V>::kCount; ++h) {
    const int n = TAIL ? std::min(L, plan.tail - h * L) : L;
    if (TAIL && n <= 0) break;
    for (int p = 0; p < kParts; ++p) {
      const size_t at = size_t(s) * kStripeCols + p * kChunks * 4 * kRowLanes + h * L * 4;
      const uint8_t* codes = block.codes + first_row * block.code_stride + at;
      typename V::template RowSum<BITS> sum[MR][NT];
      for (int m = 0; m < MR; ++m)
        for (int t = 0; t < NT; ++t) sum[m][t].init();
      auto chunk = [&](int c) {
        typename V::I u[MR];
        for (int m = 0; m < MR; ++m) u[m] = V::load_codes(codes + m * block.code_stride + c * 4 * kRowLanes);
        for (int t = 0; t < NT; ++t) {
          const auto xq = V::load_i8(x.q + size_t(t) * plan.stripes * kStripeCols + at + c * 4 * kRowLanes);
          for (int m = 0; m < MR; ++m) sum[m][t].add(u[m], xq);
        }
      };
      // GCC copies the sums of a rolled loop and then lacks registers for the codes; unrolled, it puts AVX2's products
      // before all additions and spills those.
      if constexpr (V::kRowsGemmUnroll) {
#pragma GCC unroll 8
        for (int c = 0; c < kChunks; ++c) chunk(c);
      } else {
#pragma GCC unroll 1
        for (int c = 0; c < kChunks; ++c) chunk(c);
      }
      for (int t = 0; t < NT; ++t) {
        const size_t lane = (size_t(t) * plan.stripes + s) * kRowLanes + h * L;
        const int32_t* sums = x.sum + 2 * (size_t(t) * plan.stripes + s) * kRowLanes + h * L;
        auto x_sum = V::load_int(sums + (kParts == 1 ? 0 : p * kRowLanes));
        if (kParts == 1) x_sum = V::add_int(x_sum, V::load_int(sums + kRowLanes));
        const auto start = V::template minus_bias<BITS>(x_sum);
        const auto xs = V::load(x.scale + lane);
        auto share = V::zero();
        if (MIN) share = V::mul(xs, V::int_to_float(x_sum));
        for (int m = 0; m < MR; ++m) {
          const size_t g = (first_row + m) * block.scale_stride + size_t(s * kParts + p) * kRowLanes + h * L;
          const auto old = acc[m][t].f[h];
          auto lanes = V::fma(V::mul(sum[m][t].to_float(start), V::load(block.scale + g)), xs, old);
          if (MIN) lanes = V::fma(V::load(block.min + g), share, lanes);
          acc[m][t].f[h] = TAIL ? V::first_lanes(lanes, old, n) : lanes;
        }
      }
    }
  }
}

// MR unpacked rows x NT vectors: y[row][v * ldy].
template <class V, int BITS, bool MIN, int GROUP, int MR, int NT>
void gemm_rows(const RowPlan& plan, const RowBlock<V, BITS, MIN, GROUP>& block, int first_row, const RowVector& x,
               float* const* y, size_t ldy) {
  Lanes<V> acc[MR][NT];
  for (int m = 0; m < MR; ++m)
    for (int t = 0; t < NT; ++t) acc[m][t].clear();
  for (int s = 0; s < plan.full; ++s) {
    gemm_stripe<V, BITS, MIN, GROUP, MR, NT, false>(plan, block, first_row, x, s, acc);
  }
  if (plan.tail) gemm_stripe<V, BITS, MIN, GROUP, MR, NT, true>(plan, block, first_row, x, plan.full, acc);
  for (int t = 0; t < NT; ++t) {
    float out[MR];
    if constexpr (MR == 4) {
      V::reduce_lanes4(acc[0][t].f, acc[1][t].f, acc[2][t].f, acc[3][t].f, out);
    } else {
      for (int m = 0; m < MR; ++m) out[m] = V::reduce_lanes(acc[m][t].f);
    }
    for (int m = 0; m < MR; ++m) y[m][t * ldy] = out[m];
  }
}

template <class V, int BITS, bool MIN, int GROUP>
struct RowsGemmLayout {
  using Block = RowBlock<V, BITS, MIN, GROUP>;

  // MR rows from `row` on x NT vectors from v on.
  template <int MR, int NT>
  static void tile(const RowPlan& plan, const Block& block, int row, const RowVector& x, int v, float* const* y,
                   size_t ldy) {
    const size_t at = size_t(v) * plan.stripes;
    const RowVector some{x.q + at * kStripeCols, x.scale + at * kRowLanes, x.sum + at * 2 * kRowLanes};
    float* out[MR];
    for (int m = 0; m < MR; ++m) out[m] = y[row + m] + v * ldy;
    gemm_rows<V, BITS, MIN, GROUP, MR, NT>(plan, block, row, some, out, ldy);
  }
  static void run(const NeuronMatrix& w, const RowVector& x, int n, const int32_t* ids, int begin, int end, float* gate,
                  float* up, size_t ldy, void* memory) {
    constexpr int MR = V::kRowsGemmRows, NT = V::kRowsGemmVectors;
    const RowPlan plan(w);
    const int group = std::max(1, kVectorBytes / (plan.stripes * kStripeCols) / NT) * NT;
    const Block block(plan, memory);
    const int per = gate && up ? 2 : 1;
    for (int k = begin; k < end; k += kGemmRowBlock / per) {
      const int neurons = std::min(kGemmRowBlock / per, end - k);
      float* y[kGemmRowBlock];
      for (int i = 0; i < neurons; ++i) {
        const uint8_t* record = record_of(w, ids, k + i);
        if (gate) {
          block.unpack(plan, record, i * per);
          y[i * per] = gate + k + i;
        }
        if (up) {
          block.unpack(plan, record + w.up_offset(), i * per + per - 1);
          y[i * per + per - 1] = up + k + i;
        }
      }
      for (int first = 0; first < n; first += group)
        for (int r = 0; r < neurons * per;) {
          const bool whole = r + MR <= neurons * per;
          const int end_v = std::min(n, first + group);
          int v = first;
          if (whole)
            for (; v + NT <= end_v; v += NT) tile<MR, NT>(plan, block, r, x, v, y, ldy);
          for (; v < end_v; ++v)
            if (whole) tile<MR, 1>(plan, block, r, x, v, y, ldy);
            else tile<1, 1>(plan, block, r, x, v, y, ldy);
          r += whole ? MR : 1;
        }
    }
  }
};

template <class V>
void rows_gemm_q(const NeuronMatrix& w, const RowVector& x, int n, const int32_t* ids, int begin, int end, float* gate,
                 float* up, size_t ldy, void* scratch) {
  if (gate || up) dispatch_rows<RowsGemmLayout, V>(w, x, n, ids, begin, end, gate, up, ldy, scratch);
}

}  // namespace simd
}  // namespace sr
