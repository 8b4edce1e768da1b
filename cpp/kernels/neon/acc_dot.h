// Integer sums with dot products (sdot, with i8mm usdot): four columns interleaved, 4 rows a register.
#pragma once

#include "kernels/neon/codes.h"

namespace sr {
namespace SR_NEON {

constexpr int kI8mmRows = 8;  // rows that prefill with smmla does together

// acc + the four products of each 32-bit lane. sdot takes codes as signed bytes: below 128 that is the code itself.
SR_INLINE int32x4_t dot4(int32x4_t acc, uint8x16_t u, int8x8_t x) {
#if SR_NEON_LEVEL >= 2
  return vusdotq_lane_s32(acc, u, x, 0);
#else
  return vdotq_lane_s32(acc, vreinterpretq_s8_u8(u), x, 0);
#endif
}

// Exact int32 sums of the 64 rows of a tile over some columns, four columns at a time.
template <int BITS>
struct TileAcc {
  // 8-bit codes as sdot takes them: u - 128, so that no start is needed.
  static constexpr bool kSigned8 = BITS == 8 && SR_NEON_LEVEL == 1;
  int32x4_t acc[16];  // rows 4 k .. 4 k + 3
  void init(int32_t start) {
    for (int k = 0; k < 16; ++k) acc[k] = vdupq_n_s32(kSigned8 ? 0 : start);
  }
  template <int P>
  void half(const uint8_t* low, const uint8_t* high, const uint32_t* off, int8x8_t x) {
    uint8x16_t u[8];
    quad_codes<BITS, P>(low, high, off, u);
    for (int i = 0; i < 8; ++i) {
      if (kSigned8) u[i] = veorq_u8(u[i], vdupq_n_u8(0x80));
      acc[quad_rows<BITS>(P, i)] = dot4(acc[quad_rows<BITS>(P, i)], u[i], x);
    }
  }
  // low + off[i], high + off[i]: the four columns; x4: their four int8 inputs.
  void add4(const uint8_t* low, const uint8_t* high, const uint32_t* off, uint32_t x4) {
    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(x4));
    half<0>(low, high, off, x);
    half<1>(low, high, off, x);
  }
  void to_float(float32x4_t out[16]) {
    for (int k = 0; k < 16; ++k) out[k] = vcvtq_f32_s32(acc[k]);
  }
};

#if SR_NEON_LEVEL >= 2
// 4 bits with usdot: a byte is l + 16 h with l of row r and h of row r + 32. Whole bytes are multiplied beside l, so
// that h needs no instruction of its own: 16 sum h x = sum (l + 16 h) x - sum l x, exactly.
template <>
struct TileAcc<4> {
  int32x4_t acc[16];  // rows 4 k .. 4 k + 3 of the first 32; then of whole bytes
  void init(int32_t start) {
    for (int k = 0; k < 8; ++k) {
      acc[k] = vdupq_n_s32(start);
      acc[8 + k] = vdupq_n_s32(17 * start);
    }
  }
  void add4(const uint8_t* low, const uint8_t*, const uint32_t* off, uint32_t x4) {
    const int8x8_t x = vreinterpret_s8_u32(vdup_n_u32(x4));
    const uint8x16x2_t a = vld1q_u8_x2(low + off[0]), b = vld1q_u8_x2(low + off[1]);
    const uint8x16x2_t c = vld1q_u8_x2(low + off[2]), d = vld1q_u8_x2(low + off[3]);
    for (int p = 0; p < 2; ++p) {
      uint8x16_t q[4];
      zip4(a.val[p], b.val[p], c.val[p], d.val[p], q);
      for (int m = 0; m < 4; ++m) {
        acc[4 * p + m] = dot4(acc[4 * p + m], vandq_u8(q[m], vdupq_n_u8(15)), x);
        acc[8 + 4 * p + m] = dot4(acc[8 + 4 * p + m], q[m], x);
      }
    }
  }
  void to_float(float32x4_t out[16]) {
    for (int k = 0; k < 8; ++k) {
      out[k] = vcvtq_f32_s32(acc[k]);
      out[8 + k] = vcvtq_n_f32_s32(vsubq_s32(acc[8 + k], acc[k]), 4);  // divided by 16: below 2^24, so exact
    }
  }
};
#endif

// Prefill: sum (u - bias) x over a group for 4 rows, signed codes.
template <int BITS>
struct RowsAcc {
  int32x4_t acc;
  void init(int32_t) { acc = vdupq_n_s32(0); }
  void add(int8x16_t u, int8x16_t x) { acc = vdotq_s32(acc, u, x); }
  float32x4_t to_float() const { return vcvtq_f32_s32(acc); }
};

}  // namespace SR_NEON
}  // namespace sr
