// NEON primitives for the kernels of simd/. Floats and lists here; codes and their sums in codes.h and the two acc_*.h.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/neon/codes.h"
#include "kernels/neon/variant.h"
#include "kernels/simd/list_bits.h"
#include "kernels/table.h"
#if SR_NEON_LEVEL == 0
#include "kernels/neon/acc_long.h"
#else
#include "kernels/neon/acc_dot.h"
#endif

namespace sr {
namespace SR_NEON {

struct Vec {
  using F = float32x4_t;
  using I = int8x16_t;  // codes of 4 rows x 4 columns, or four inputs four times
  static constexpr int kLanes = 4;
  static constexpr int kScoreQueries = 4, kMixQueries = 4, kMixVectors = 4;
#if SR_NEON_LEVEL == 0
  static constexpr int kGemmRows = 8, kGemmVectors = 4;  // 16 registers of 16-bit sums, 8 of float sums
#elif SR_NEON_LEVEL == 1
  static constexpr int kGemmRows = 16, kGemmVectors = 3;  // 12 registers of integer and 12 of float sums
#else
  static constexpr int kGemmRows = kI8mmRows, kGemmVectors = 6;
#endif
  static constexpr int kGemmQuads = SR_NEON_LEVEL == 2 ? 2 : 1;

  static F zero() { return vdupq_n_f32(0); }
  static F set1(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F round(F a) { return vrndnq_f32(a); }
  static F abs(F a) { return vabsq_f32(a); }
  // a where x < y, else b (also where either is NaN).
  static F select_less(F x, F y, F a, F b) { return vbslq_f32(vcltq_f32(x, y), a, b); }
  // 2^n for integral n in the normal range.
  static F exp2_int(F n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static float reduce_add(F a) { return vaddvq_f32(a); }
  static float reduce_max(F a) { return vmaxvq_f32(a); }
  static F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F load_s8(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void store_f16(uint16_t* p, F x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  // The first n (1..4) lanes; callers have n == 4 except in tails.
  static F load_f16_part(const uint16_t* p, int n) {
    uint16_t t[4] = {};
    std::memcpy(t, p, 2 * n);
    return load_f16(t);
  }
  static F load_part(const float* p, int n) {
    float t[4] = {};
    std::memcpy(t, p, 4 * n);
    return load(t);
  }
  static void store_part(float* p, F x, int n) {
    float t[4];
    store(t, x);
    std::memcpy(p, t, 4 * n);
  }

  // Largest |x| of 32 floats as bits, so that a NaN wins.
  static uint32_t abs_max_bits32(const float* p) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int i = 0; i < 32; i += 4) top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(p + i))));
    return vmaxvq_u32(top);
  }
  // 32 floats times `inverse`, rounded to int8; sums of the first and second 16.
  static void quantise32(const float* p, float inverse, int8_t* q, int32_t* sum) {
    for (int h = 0; h < 2; ++h) {
      int32x4_t v[4];
      for (int i = 0; i < 4; ++i) v[i] = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + 16 * h + 4 * i), inverse));
      const int16x8_t a = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1])),
                      b = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
      const int8x16_t bytes = vcombine_s8(vmovn_s16(a), vmovn_s16(b));
      vst1q_s8(q + 16 * h, bytes);
      sum[h] = vaddlvq_s8(bytes);
    }
  }

  // Bit i of the result: whether byte i, of 0 or 255 each, is set.
  static uint32_t bits_of(uint8x16_t a, uint8x16_t b) {
    const uint8x16_t weight = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
    uint8x16_t s = vpaddq_u8(vandq_u8(a, weight), vandq_u8(b, weight));
    s = vpaddq_u8(s, s);
    s = vpaddq_u8(s, s);
    return vgetq_lane_u32(vreinterpretq_u32_u8(s), 0);
  }
  // Bit j: |x[j]| > t[j], of 32.
  static uint32_t above32(const float* x, const float* t) {
    uint8x16_t bytes[2];
    for (int h = 0; h < 2; ++h) {
      uint16x8_t half[2];
      for (int i = 0; i < 2; ++i) {
        const int at = 16 * h + 8 * i;
        const uint32x4_t a = vcgtq_f32(abs(load(x + at)), load(t + at));
        const uint32x4_t b = vcgtq_f32(abs(load(x + at + 4)), load(t + at + 4));
        half[i] = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
      }
      bytes[h] = vuzp1q_u8(vreinterpretq_u8_u16(half[0]), vreinterpretq_u8_u16(half[1]));
    }
    return bits_of(bytes[0], bytes[1]);
  }
  // Zeroes the q whose bit is not set; sums of the first and second 16; bits of the q that are not 0.
  static uint32_t mask32(uint32_t keep, int8_t* q, int32_t* sum) {
    const uint8x16_t weight = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
    const uint8x16_t byte_of = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));  // which byte of keep holds the bit
    const uint8x16_t all = vreinterpretq_u8_u32(vdupq_n_u32(keep));
    uint8x16_t set[2];
    for (int h = 0; h < 2; ++h) {
      const uint8x16_t spread = vqtbl1q_u8(all, vaddq_u8(byte_of, vdupq_n_u8(uint8_t(2 * h))));
      const int8x16_t v = vandq_s8(vld1q_s8(q + 16 * h), vreinterpretq_s8_u8(vtstq_u8(spread, weight)));
      vst1q_s8(q + 16 * h, v);
      sum[h] = vaddlvq_s8(v);
      set[h] = vtstq_u8(vreinterpretq_u8_s8(v), vreinterpretq_u8_s8(v));
    }
    return bits_of(set[0], set[1]);
  }
  static int list32(uint32_t bits, uint8_t* list) { return simd::list_bits(bits, list); }

  // The first `count` (1..N, N = 16 or 32) entries of cols: off[i] = cols[i] * run and the bytes of x4 the inputs
  // q[cols[i]], up to N entries written; beyond count the last column with an input of 0.
  template <int N>
  static void list_columns(const int8_t* q, const uint8_t* cols, int count, uint32_t run, uint32_t* off, uint32_t* x4) {
    const uint8x16_t at = vcombine_u8(vcreate_u8(0x0706050403020100ull), vcreate_u8(0x0F0E0D0C0B0A0908ull));
    const uint8x16_t last = vdupq_n_u8(cols[count - 1]);
    const int8x16x2_t inputs = {{vld1q_s8(q), vld1q_s8(q + 16)}};
    for (int h = 0; h < N / 16; ++h) {
      const uint8x16_t listed = vcltq_s8(vreinterpretq_s8_u8(at), vdupq_n_s8(int8_t(count - 16 * h)));
      const uint8x16_t c = vbslq_u8(listed, vld1q_u8(cols + 16 * h), last);
      vst1q_s8(reinterpret_cast<int8_t*>(x4) + 16 * h, vandq_s8(vqtbl2q_s8(inputs, c), vreinterpretq_s8_u8(listed)));
      const uint16x8_t half[2] = {vmovl_u8(vget_low_u8(c)), vmovl_u8(vget_high_u8(c))};
      for (int k = 0; k < 2; ++k) {
        vst1q_u32(off + 16 * h + 8 * k, vmulq_n_u32(vmovl_u16(vget_low_u16(half[k])), run));
        vst1q_u32(off + 16 * h + 8 * k + 4, vmulq_n_u32(vmovl_u16(vget_high_u16(half[k])), run));
      }
    }
  }

  // Exact sums over some columns of the 64 rows of a tile, four columns at a time.
  template <int BITS>
  using Acc = TileAcc<BITS>;

  // ---- prefill ----
  // 4 kGemmQuads columns of a tile as signed codes [64 / kGemmRows][rows][columns]; subtiles are sub_stride bytes
  // apart.
  template <int BITS>
  static void interleave_tile(const uint8_t* low, const uint8_t* high, size_t run, uint8_t* out, size_t sub_stride) {
    interleave_half<BITS, 0>(low, high, run, out, sub_stride);
    interleave_half<BITS, 1>(low, high, run, out, sub_stride);
  }
  template <int BITS, int P>
  static void interleave_half(const uint8_t* low, const uint8_t* high, size_t run, uint8_t* out, size_t sub_stride) {
    const uint8x16_t bias = vdupq_n_u8(1 << (BITS - 1));
    const uint32_t r = uint32_t(run), off[8] = {0, r, 2 * r, 3 * r, 4 * r, 5 * r, 6 * r, 7 * r};
    uint8x16_t u[8 * kGemmQuads];
    for (int q = 0; q < kGemmQuads; ++q) quad_codes<BITS, P>(low, high, off + 4 * q, u + 8 * q);
    for (int i = 0; i < 8; ++i) {
      const int row = 4 * quad_rows<BITS>(P, i);
      uint8_t* to = out + row / kGemmRows * sub_stride + row % kGemmRows * 4 * kGemmQuads;
      if constexpr (kGemmQuads == 1) {
        vst1q_u8(to, vsubq_u8(u[i], bias));
      } else {
        const uint32x4_t a = vreinterpretq_u32_u8(vsubq_u8(u[i], bias));
        const uint32x4_t b = vreinterpretq_u32_u8(vsubq_u8(u[8 + i], bias));
        vst1q_u8(to, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
        vst1q_u8(to + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
      }
    }
  }
  static I load_codes(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
  static I load4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
  }
  template <int BITS>
  using GemmAcc = RowsAcc<BITS>;
};

}  // namespace SR_NEON
}  // namespace sr
