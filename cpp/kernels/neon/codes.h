// Codes of stored columns as bytes: four columns interleaved, the order that dot products and prefill want.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels/neon/variant.h"
#include "sparse_run/tensor.h"

namespace sr {
namespace SR_NEON {

// Bytes shifted left by S bits, right if S is negative.
template <int S>
SR_INLINE uint8x16_t shifted(uint8x16_t v) {
  if constexpr (S > 0) return vshlq_n_u8(v, S);
  else if constexpr (S < 0) return vshrq_n_u8(v, -S);
  else return v;
}

SR_INLINE uint8x16_t zip_low16(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
SR_INLINE uint8x16_t zip_high16(uint8x16_t a, uint8x16_t b) {
  return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}

// 16 bytes of each of four columns: q[m] holds bytes 4 m .. 4 m + 3 of each, byte after byte.
SR_INLINE void zip4(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d, uint8x16_t q[4]) {
  const uint8x16_t ab0 = vzip1q_u8(a, b), ab1 = vzip2q_u8(a, b), cd0 = vzip1q_u8(c, d), cd1 = vzip2q_u8(c, d);
  q[0] = zip_low16(ab0, cd0);
  q[1] = zip_high16(ab0, cd0);
  q[2] = zip_low16(ab1, cd1);
  q[3] = zip_high16(ab1, cd1);
}
SR_INLINE void interleave4(const uint8_t* p, const uint32_t* off, uint8x16_t q[4]) {
  zip4(vld1q_u8(p + off[0]), vld1q_u8(p + off[1]), vld1q_u8(p + off[2]), vld1q_u8(p + off[3]), q);
}
// The same of 8 bytes each, into q[0] and q[1].
SR_INLINE void interleave4_short(const uint8_t* p, const uint32_t* off, uint8x16_t q[2]) {
  const uint8x16_t a = vcombine_u8(vld1_u8(p + off[0]), vdup_n_u8(0)),
                   b = vcombine_u8(vld1_u8(p + off[1]), vdup_n_u8(0));
  const uint8x16_t c = vcombine_u8(vld1_u8(p + off[2]), vdup_n_u8(0)),
                   d = vcombine_u8(vld1_u8(p + off[3]), vdup_n_u8(0));
  const uint8x16_t ab = vzip1q_u8(a, b), cd = vzip1q_u8(c, d);
  q[0] = zip_low16(ab, cd);
  q[1] = zip_high16(ab, cd);
}

// Which rows element i of quad_codes<BITS, P> holds: 4 of them from 4 times this.
template <int BITS>
constexpr int quad_rows(int P, int i) {
  if (BITS == 8) return 8 * P + i;
  return i / 4 * 8 + 4 * P + i % 4;  // a byte holds rows r and r + 32
}

// Half P of a tile, four columns: u[i] holds 4 rows x 4 columns of codes, rows by quad_rows.
template <int BITS, int P>
SR_INLINE void quad_codes(const uint8_t* low, const uint8_t* high, const uint32_t* off, uint8x16_t u[8]) {
  if constexpr (BITS == 8) {
    interleave4(low + 32 * P, off, u);
    interleave4(low + 32 * P + 16, off, u + 4);
  } else {
    uint8x16_t q[4];
    interleave4(low + 16 * P, off, q);
    for (int m = 0; m < 4; ++m) {
      u[m] = vandq_u8(q[m], vdupq_n_u8(15));
      u[4 + m] = vshrq_n_u8(q[m], 4);
    }
    if constexpr (BITS == 5) {  // byte r % 8 of the second plane, bit r / 8, moved to bit 4
      uint8x16_t h[2];
      interleave4_short(high, off, h);
      const uint8x16_t bit = vdupq_n_u8(0x10);
      for (int m = 0; m < 2; ++m) {
        u[m] = vbslq_u8(bit, shifted<4 - 2 * P>(h[m]), u[m]);
        u[2 + m] = vbslq_u8(bit, shifted<3 - 2 * P>(h[m]), u[2 + m]);
        u[4 + m] = vbslq_u8(bit, shifted<-2 * P>(h[m]), u[4 + m]);
        u[6 + m] = vbslq_u8(bit, shifted<-1 - 2 * P>(h[m]), u[6 + m]);
      }
    }
    if constexpr (BITS == 6) {  // byte r % 16, bits 2 (r / 16) and the next, moved to bits 4 and 5
      uint8x16_t h[4];
      interleave4(high, off, h);
      const uint8x16_t bits = vdupq_n_u8(0x30);
      for (int m = 0; m < 4; ++m) {
        u[m] = vbslq_u8(bits, shifted<4 - 2 * P>(h[m]), u[m]);
        u[4 + m] = vbslq_u8(bits, shifted<-2 * P>(h[m]), u[4 + m]);
      }
    }
  }
}

}  // namespace SR_NEON
}  // namespace sr
