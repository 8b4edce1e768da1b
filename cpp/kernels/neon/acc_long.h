// Integer sums with ARMv8.0's widening multiply-adds (smull, smlal): column by column, rows in lanes, no interleaving.
#pragma once

#include "kernels/neon/codes.h"

namespace sr {
namespace SR_NEON {

// 16 rows of one column times its input, added to two registers of 16-bit sums.
SR_INLINE void add16(int16x8_t* t, int8x16_t u, int8x16_t x) {
  t[0] = vmlal_s8(t[0], vget_low_s8(u), vget_low_s8(x));
  t[1] = vmlal_high_s8(t[1], u, x);
}
SR_INLINE void mul16(int16x8_t* t, int8x16_t u, int8x16_t x) {
  t[0] = vmull_s8(vget_low_s8(u), vget_low_s8(x));
  t[1] = vmull_high_s8(u, x);
}
// 16-bit sums of 16 rows added to their 32-bit sums.
SR_INLINE void widen16(int32x4_t* acc, const int16x8_t* t) {
  for (int i = 0; i < 2; ++i) {
    acc[2 * i] = vaddw_s16(acc[2 * i], vget_low_s16(t[i]));
    acc[2 * i + 1] = vaddw_high_s16(acc[2 * i + 1], t[i]);
  }
}

// The four inputs of a quad, each in all lanes.
struct QuadInputs {
  int8x16_t x[4];
  explicit QuadInputs(uint32_t x4) {
    const int8x8_t v = vreinterpret_s8_u32(vdup_n_u32(x4));
    x[0] = vdupq_lane_s8(v, 0);
    x[1] = vdupq_lane_s8(v, 1);
    x[2] = vdupq_lane_s8(v, 2);
    x[3] = vdupq_lane_s8(v, 3);
  }
};

// Sums of the 64 rows of a tile in int32, the products of a quad first in int16: 4 * 63 * 127 = 32004 fits, and so does
// 2 * 128 * 127 of signed 8-bit codes.
template <int BITS>
struct TileAcc {
  int32x4_t acc[16];  // rows 4 k .. 4 k + 3
  void init(int32_t start) {
    if (BITS == 8) start = 0;  // u - 128 is what is multiplied
    for (int k = 0; k < 16; ++k) acc[k] = vdupq_n_s32(start);
  }
  // Rows 16 K .. 16 K + 15 of one 8-bit column.
  static int8x16_t signed8(const uint8_t* p) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
  }
  // Rows 16 P .. 16 P + 15 and 32 more of a column.
  template <int P>
  static void codes(const uint8_t* low, const uint8_t* high, int8x16_t u[2]) {
    const uint8x16_t v = vld1q_u8(low + 16 * P);
    uint8x16_t a = vandq_u8(v, vdupq_n_u8(15)), b = vshrq_n_u8(v, 4);
    if constexpr (BITS == 5) {  // the second plane's byte r % 8, bit r / 8, moved to bit 4
      const uint8x16_t h = vcombine_u8(vld1_u8(high), vld1_u8(high)), bit = vdupq_n_u8(0x10);
      const int8x16_t left = vcombine_s8(vdup_n_s8(4 - 2 * P), vdup_n_s8(3 - 2 * P));
      a = vbslq_u8(bit, vshlq_u8(h, left), a);
      b = vbslq_u8(bit, vshlq_u8(h, vsubq_s8(left, vdupq_n_s8(4))), b);
    } else {  // byte r % 16, bits 2 (r / 16) and the next, moved to bits 4 and 5
      const uint8x16_t h = vld1q_u8(high), bits = vdupq_n_u8(0x30);
      a = vbslq_u8(bits, shifted<4 - 2 * P>(h), a);
      b = vbslq_u8(bits, shifted<-2 * P>(h), b);
    }
    u[0] = vreinterpretq_s8_u8(a);
    u[1] = vreinterpretq_s8_u8(b);
  }
  template <int P>
  void half(const uint8_t* low, const uint8_t* high, const uint32_t* off, const QuadInputs& in) {
    int16x8_t t[4];
    int8x16_t u[2];
    for (int c = 0; c < 4; ++c) {
      codes<P>(low + off[c], high + off[c], u);
      for (int i = 0; i < 2; ++i)
        if (c == 0) mul16(t + 2 * i, u[i], in.x[c]);
        else add16(t + 2 * i, u[i], in.x[c]);
    }
    widen16(acc + 4 * P, t);
    widen16(acc + 8 + 4 * P, t + 2);
  }
  void add4(const uint8_t* low, const uint8_t* high, const uint32_t* off, uint32_t x4) {
    const QuadInputs in(x4);
    if constexpr (BITS == 8) {
      for (int k = 0; k < 4; ++k)
        for (int c = 0; c < 4; c += 2) {
          int16x8_t t[2];
          mul16(t, signed8(low + off[c] + 16 * k), in.x[c]);
          add16(t, signed8(low + off[c + 1] + 16 * k), in.x[c + 1]);
          widen16(acc + 4 * k, t);
        }
    } else {
      half<0>(low, high, off, in);
      half<1>(low, high, off, in);
    }
  }
  void to_float(float32x4_t out[16]) {
    for (int k = 0; k < 16; ++k) out[k] = vcvtq_f32_s32(acc[k]);
  }
};

// 4 bits: the sum of a slab, sum (u - 8) x <= 8 * 127 * 32, fits int16, so the additions may wrap on the way.
template <>
struct TileAcc<4> {
  int16x8_t acc[8];  // rows 8 k .. 8 k + 7
  void init(int32_t start) {
    for (int k = 0; k < 8; ++k) acc[k] = vdupq_n_s16(int16_t(start));
  }
  void column(const uint8_t* low, int8x16_t x) {
    const uint8x16x2_t v = vld1q_u8_x2(low);
    const uint8x16_t a = v.val[0], b = v.val[1], mask = vdupq_n_u8(15);
    add16(acc, vreinterpretq_s8_u8(vandq_u8(a, mask)), x);
    add16(acc + 2, vreinterpretq_s8_u8(vandq_u8(b, mask)), x);
    add16(acc + 4, vreinterpretq_s8_u8(vshrq_n_u8(a, 4)), x);
    add16(acc + 6, vreinterpretq_s8_u8(vshrq_n_u8(b, 4)), x);
  }
  void add4(const uint8_t* low, const uint8_t*, const uint32_t* off, uint32_t x4) {
    const QuadInputs in(x4);
    for (int c = 0; c < 4; ++c) column(low + off[c], in.x[c]);
  }
  void to_float(float32x4_t out[16]) {
    for (int k = 0; k < 8; ++k) {
      out[2 * k] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(acc[k])));
      out[2 * k + 1] = vcvtq_f32_s32(vmovl_high_s16(acc[k]));
    }
  }
};

// Prefill: sum (u - bias) x over a group for 4 rows, signed codes. Up to 6 bits a lane adds at most 8 products of one
// column of four, 8 * 32 * 127 = 32512, in int16 for the whole group.
template <int BITS>
struct RowsAcc {
  int16x8_t lo, hi;
  void init(int32_t) { lo = hi = vdupq_n_s16(0); }
  void add(int8x16_t u, int8x16_t x) {
    lo = vmlal_s8(lo, vget_low_s8(u), vget_low_s8(x));
    hi = vmlal_high_s8(hi, u, x);
  }
  float32x4_t to_float() const { return vcvtq_f32_s32(vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi))); }
};
template <>
struct RowsAcc<8> {
  int32x4_t lo, hi;
  void init(int32_t) { lo = hi = vdupq_n_s32(0); }
  void add(int8x16_t u, int8x16_t x) {
    lo = vpadalq_s16(lo, vmull_s8(vget_low_s8(u), vget_low_s8(x)));
    hi = vpadalq_s16(hi, vmull_high_s8(u, x));
  }
  float32x4_t to_float() const { return vcvtq_f32_s32(vpaddq_s32(lo, hi)); }
};

}  // namespace SR_NEON
}  // namespace sr
