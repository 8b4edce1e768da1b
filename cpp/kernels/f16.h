// Half and bfloat16 conversions in plain C++, round to nearest even; the same results as the hardware's.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparse_run/tensor.h"

namespace sr {

SR_INLINE float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
SR_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

SR_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return bits_to_float(sign | (rest + 0x1c000) << 13);
  const float subnormal = float(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
  return sign ? -subnormal : subnormal;
}

SR_INLINE uint16_t f32_to_f16(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  const uint32_t a = u & 0x7fffffff;
  if (a > 0x7f800000) return sign | 0x7e00;  // NaN
  if (a >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (a < 0x38800000) {  // subnormal: adding 0.5 lets the FPU round at the right bit
    const float shifted = bits_to_float(a) + 0.5f;
    return sign | uint16_t(float_to_bits(shifted) - 0x3f000000);
  }
  return sign | uint16_t((a + 0xfff + (a >> 13 & 1) - 0x38000000) >> 13);
}

SR_INLINE float bf16_to_f32(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
SR_INLINE uint16_t f32_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

}  // namespace sr
