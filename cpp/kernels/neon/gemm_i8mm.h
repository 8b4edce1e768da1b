// Prefill with smmla: 2 rows x 2 vectors x 8 columns an instruction, twice the products of sdot.
//
// The same blocks, order of float operations and bits as simd/gemm.h; a register of sums holds (row, vector) pairs
// (0, 0), (0, 1), (1, 0), (1, 1).
#pragma once

#include <algorithm>

#include "kernels/neon/vec.h"
#include "kernels/simd/gemm.h"

namespace sr {
namespace SR_NEON {

// NP pairs of vectors x 8 rows over all columns; of the last pair only `last` (1 or 2) vectors exist.
template <int BITS, bool MIN, int GROUP, int NP>
void i8mm_block(const PanelMatrix& w, const QuantVector& x, int first, int last, const uint8_t* codes,
                const float* scale, const float* min, float* y, size_t ldy) {
  constexpr int R = kI8mmRows / 2, kParts = kSlabCols / GROUP;
  const int slabs = w.slabs();
  const size_t padded = w.padded_cols();
  const int8_t* q[2 * NP];
  const float* xs[2 * NP];
  const int32_t* sums[2 * NP];
  for (int t = 0; t < 2 * NP; ++t) {
    const size_t v = size_t(first + (t == 2 * NP - 1 && last == 1 ? t - 1 : t));  // a missing one: the one before again
    q[t] = x.q + v * padded;
    xs[t] = x.scale + v * slabs;
    sums[t] = x.sum + 2 * v * slabs;
  }
  float32x4_t out[NP][R];
  for (int stretch = 0, s = 0; stretch < w.stretches; ++stretch) {
    const int end = w.stretch_slab(stretch + 1);
    for (int t = 0; t < NP; ++t)
      for (int r = 0; r < R; ++r) out[t][r] = vdupq_n_f32(0);
    for (; s < end; ++s)
      for (int p = 0; p < kParts; ++p) {
        int32x4_t acc[NP][R];
        for (int t = 0; t < NP; ++t)
          for (int r = 0; r < R; ++r) acc[t][r] = vdupq_n_s32(0);
        // Not unrolled: see simd/gemm.h.
#pragma GCC unroll 1
        for (int i = 0; i < GROUP / 8; ++i) {
          int8x16_t u[R];
          for (int r = 0; r < R; ++r) u[r] = Vec::load_codes(codes + 16 * r);
          codes += kI8mmRows * 8;
          const int at = s * kSlabCols + p * GROUP + 8 * i;
          for (int t = 0; t < NP; ++t) {
            const int8x16_t pair = vcombine_s8(vld1_s8(q[2 * t] + at), vld1_s8(q[2 * t + 1] + at));
            for (int r = 0; r < R; ++r) acc[t][r] = vmmlaq_s32(acc[t][r], u[r], pair);
          }
        }
        const size_t at = size_t(s * kParts + p) * kTileRows;
        float32x4_t x_scale[NP], x_sum[NP];
        for (int t = 0; t < NP; ++t) {
          const float32x2_t f = vld1_lane_f32(xs[2 * t + 1] + s, vld1_dup_f32(xs[2 * t] + s), 1);
          x_scale[t] = vcombine_f32(f, f);
          if (!MIN) continue;
          const int32_t *a = sums[2 * t] + 2 * s, *b = sums[2 * t + 1] + 2 * s;
          const int32x2_t sum = kParts == 1 ? vpadd_s32(vld1_s32(a), vld1_s32(b))
                                            : vld1_lane_s32(b + p, vld1_dup_s32(a + p), 1);
          const float32x2_t product = vmul_f32(f, vcvt_f32_s32(sum));
          x_sum[t] = vcombine_f32(product, product);
        }
        for (int r = 0; r < R; ++r) {
          const float32x2_t sc = vld1_f32(scale + at + 2 * r);
          const float32x4_t pairs = vcombine_f32(vdup_lane_f32(sc, 0), vdup_lane_f32(sc, 1));
          for (int t = 0; t < NP; ++t)
            out[t][r] = vfmaq_f32(out[t][r], vmulq_f32(vcvtq_f32_s32(acc[t][r]), pairs), x_scale[t]);
          if (MIN) {
            const float32x2_t mn = vld1_f32(min + at + 2 * r);
            const float32x4_t both = vcombine_f32(vdup_lane_f32(mn, 0), vdup_lane_f32(mn, 1));
            for (int t = 0; t < NP; ++t) out[t][r] = vfmaq_f32(out[t][r], both, x_sum[t]);
          }
        }
      }
    for (int t = 0; t < NP; ++t)
      for (int r = 0; r < R; r += 2) {
        const auto put = [&](float* to, float32x4_t sum) {
          vst1q_f32(to, stretch ? vaddq_f32(vld1q_f32(to), sum) : sum);
        };
        float* to = y + (first + 2 * t) * ldy + 2 * r;
        put(to, vuzp1q_f32(out[t][r], out[t][r + 1]));
        if (t < NP - 1 || last == 2) put(to + ldy, vuzp2q_f32(out[t][r], out[t][r + 1]));
      }
  }
}

template <class V, int BITS, bool MIN, int GROUP>
struct I8mmLayout {
  static void run(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
                  void* memory) {
    const simd::TileScratch<V> scratch(w, memory);
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      simd::unpack_tile<V, BITS, MIN, GROUP>(w, place_tile(w, tile), scratch);
      for (int first = 0; first < n; first += V::kGemmVectors)
        for (int r = 0; r < kTileRows; r += kI8mmRows) {
          const int left = std::min(V::kGemmVectors, n - first), last = 2 - left % 2;
          const uint8_t* codes = scratch.codes + size_t(r) * w.padded_cols();
          const float *scale = scratch.scale + r, *min = scratch.min + r;
          float* out = y + size_t(tile) * kTileRows + r;
          if (left > 4) i8mm_block<BITS, MIN, GROUP, 3>(w, x, first, last, codes, scale, min, out, ldy);
          else if (left > 2) i8mm_block<BITS, MIN, GROUP, 2>(w, x, first, last, codes, scale, min, out, ldy);
          else i8mm_block<BITS, MIN, GROUP, 1>(w, x, first, last, codes, scale, min, out, ldy);
        }
    }
  }
};

}  // namespace SR_NEON
}  // namespace sr
