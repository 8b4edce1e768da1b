// AVX-512 (F, BW, VL, DQ, VNNI) primitives for the kernels of simd/.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/table.h"

namespace sr {
namespace avx512 {

struct Vec {
  static constexpr const char* kName = "avx512";
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kGemmRows = 32, kGemmVectors = 6;  // 12 integer and 12 float sums in 32 registers
  static constexpr int kGemmQuads = 1;                    // quads of columns that interleave_tile does at once
  static constexpr int kScoreQueries = 8, kMixQueries = 4, kMixVectors = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  // a where x < y, else b (also where either is NaN).
  static F select_less(F x, F y, F a, F b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a); }
  // 2^n for integral n in the normal range.
  static F exp2_int(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static float reduce_add(F a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The first n (1..16) lanes; the others read as 0 and are not touched in memory.
  static F load_f16_part(const uint16_t* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
  }
  static F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
  static void store_part(float* p, F x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x); }

  // Largest |x| of 32 floats as bits, so that a NaN wins.
  static uint32_t abs_max_bits32(const float* p) {
    const I m = _mm512_set1_epi32(0x7fffffff);
    const I a = _mm512_and_si512(_mm512_loadu_si512(p), m), b = _mm512_and_si512(_mm512_loadu_si512(p + 16), m);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
  }
  // 32 floats times `inverse`, rounded to int8; sums of the first and second 16.
  static void quantise32(const float* p, float inverse, int8_t* q, int32_t* sum) {
    for (int h = 0; h < 2; ++h) {
      const I v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + 16 * h), _mm512_set1_ps(inverse)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * h), _mm512_cvtsepi32_epi8(v));
      sum[h] = _mm512_reduce_add_epi32(v);
    }
  }

  // Bit j: |x[j]| > t[j], of 32.
  static uint32_t above32(const float* x, const float* t) {
    const uint32_t a = _mm512_cmp_ps_mask(abs(load(x)), load(t), _CMP_GT_OQ);
    return a | uint32_t(_mm512_cmp_ps_mask(abs(load(x + 16)), load(t + 16), _CMP_GT_OQ)) << 16;
  }
  // Zeroes the q whose bit is not set; sums of the first and second 16; bits of the q that are not 0.
  static uint32_t mask32(uint32_t keep, int8_t* q, int32_t* sum) {
    const __m256i v = _mm256_maskz_mov_epi8(keep, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), v);
    const __m256i s = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), v);
    for (int h = 0; h < 2; ++h) {
      __m128i t = h ? _mm256_extracti128_si256(s, 1) : _mm256_castsi256_si128(s);
      t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
      sum[h] = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
    }
    return _mm256_test_epi8_mask(v, v);
  }
  // As list_bits (simd/list_bits.h), without its table of 2 KiB, which weights push out of the caches between two uses.
  static int list32(uint32_t bits, uint8_t* list) {
    const I first = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 low = __mmask16(bits), high = __mmask16(bits >> 16);
    const int n = __builtin_popcount(low);
    const I a = _mm512_maskz_compress_epi32(low, first);
    const I b = _mm512_maskz_compress_epi32(high, _mm512_add_epi32(first, _mm512_set1_epi32(16)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(list), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(list + n), _mm512_cvtepi32_epi8(b));
    return n + __builtin_popcount(high);
  }

  // The first `count` (1..N, N = 16 or 32) entries of cols: off[i] = cols[i] * run and the bytes of x4 the inputs
  // q[cols[i]], up to N entries written; beyond count the last column with an input of 0.
  template <int N>
  static void list_columns(const int8_t* q, const uint8_t* cols, int count, uint32_t run, uint32_t* off, uint32_t* x4) {
    const __mmask32 listed = uint32_t(0xFFFFFFFFu >> (32 - count));
    const __m128i *pq = reinterpret_cast<const __m128i*>(q), *pc = reinterpret_cast<const __m128i*>(cols);
    const __m256i given = N == 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cols))
                                  : _mm256_castsi128_si256(_mm_loadu_si128(pc));
    const __m256i c = _mm256_mask_mov_epi8(_mm256_set1_epi8(char(cols[count - 1])), listed, given);
    const __m256i first = _mm256_maskz_shuffle_epi8(listed, _mm256_broadcastsi128_si256(_mm_loadu_si128(pq)), c);
    const __mmask32 second = _mm256_mask_test_epi8_mask(listed, c, _mm256_set1_epi8(16));
    const __m256i x = _mm256_mask_shuffle_epi8(first, second, _mm256_broadcastsi128_si256(_mm_loadu_si128(pq + 1)), c);
    const I step = _mm512_set1_epi32(int(run));
    _mm512_storeu_si512(off, _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(c)), step));
    if (N == 32) {
      _mm512_storeu_si512(off + 16, _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(c, 1)), step));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x4), x);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(x4), _mm256_castsi256_si128(x));
    }
  }

  // ---- codes of one column for the 64 rows of a tile, one byte each, in row order ----
  template <int BITS>
  static I codes(const uint8_t* low, const uint8_t* high) {
    if constexpr (BITS == 8) {
      return _mm512_loadu_si512(low);
    } else {
      const I shifts = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);
      const I both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
      I u = _mm512_and_si512(_mm512_srlv_epi64(both, shifts), _mm512_set1_epi8(15));
      if constexpr (BITS == 5) {  // byte i of qword k needs bit k, moved to bit 4
        int64_t bits;
        std::memcpy(&bits, high, 8);
        const I h = _mm512_rolv_epi64(_mm512_set1_epi64(bits), _mm512_set_epi64(61, 62, 63, 0, 1, 2, 3, 4));
        u = _mm512_ternarylogic_epi32(u, h, _mm512_set1_epi8(0x10), 0xF8);  // u | (h & mask)
      } else if constexpr (BITS == 6) {  // byte i of lane k needs bits 2k, 2k + 1, moved to bits 4, 5
        const I b = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
        const I h = _mm512_rolv_epi64(b, _mm512_set_epi64(62, 62, 0, 0, 2, 2, 4, 4));
        u = _mm512_ternarylogic_epi32(u, h, _mm512_set1_epi8(0x30), 0xF8);
      }
      return u;
    }
  }

  // Bytes of four columns interleaved: 16 rows x 4 columns a register; q[j] lane k holds rows 16 k + 4 j .. + 3.
  static void interleave4(I a, I b, I c, I d, I q[4]) {
    const I ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
    const I cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
    q[0] = _mm512_unpacklo_epi16(ab0, cd0);
    q[1] = _mm512_unpackhi_epi16(ab0, cd0);
    q[2] = _mm512_unpacklo_epi16(ab1, cd1);
    q[3] = _mm512_unpackhi_epi16(ab1, cd1);
  }
  // 4 x 4 transpose of 128-bit lanes: rows in order afterwards.
  static void lanes_transpose(I q[4]) {
    const I t0 = _mm512_shuffle_i32x4(q[0], q[1], 0x88), t1 = _mm512_shuffle_i32x4(q[0], q[1], 0xDD);
    const I t2 = _mm512_shuffle_i32x4(q[2], q[3], 0x88), t3 = _mm512_shuffle_i32x4(q[2], q[3], 0xDD);
    // t0 = q0.0 q0.2 q1.0 q1.2, t1 = q0.1 q0.3 q1.1 q1.3, t2, t3 likewise of q2, q3
    q[0] = _mm512_shuffle_i32x4(t0, t2, 0x88);  // q0.0 q1.0 q2.0 q3.0
    q[2] = _mm512_shuffle_i32x4(t0, t2, 0xDD);
    q[1] = _mm512_shuffle_i32x4(t1, t3, 0x88);
    q[3] = _mm512_shuffle_i32x4(t1, t3, 0xDD);
  }

  // Exact int32 sums of the 64 rows of a tile over some columns, four columns at a time.
  template <int BITS>
  struct Acc {
    I acc[4];
    void init(int32_t start) { acc[0] = acc[1] = acc[2] = acc[3] = _mm512_set1_epi32(start); }
    // low + off[i], high + off[i]: the four columns; x4: their four int8 inputs.
    void add4(const uint8_t* low, const uint8_t* high, const uint32_t* off, uint32_t x4) {
      I q[4];
      interleave4(codes<BITS>(low + off[0], high + off[0]), codes<BITS>(low + off[1], high + off[1]),
                  codes<BITS>(low + off[2], high + off[2]), codes<BITS>(low + off[3], high + off[3]), q);
      const I x = _mm512_set1_epi32(int32_t(x4));
      for (int j = 0; j < 4; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], q[j], x);
    }
    // Sums of rows 16 k .. 16 k + 15 as floats, k = 0..3.
    void to_float(F out[4]) {
      lanes_transpose(acc);
      for (int k = 0; k < 4; ++k) out[k] = _mm512_cvtepi32_ps(acc[k]);
    }
  };

  // ---- prefill ----
  // Four columns of a tile as bytes [64 / kGemmRows][rows][4]; subtiles are sub_stride bytes apart.
  template <int BITS>
  static void interleave_tile(const uint8_t* low, const uint8_t* high, size_t run, uint8_t* out, size_t sub_stride) {
    I q[4];
    interleave4(codes<BITS>(low, high), codes<BITS>(low + run, high + run), codes<BITS>(low + 2 * run, high + 2 * run),
                codes<BITS>(low + 3 * run, high + 3 * run), q);
    lanes_transpose(q);
    for (int k = 0; k < 4; ++k) _mm512_storeu_si512(out + (k / 2) * sub_stride + (k % 2) * 64, q[k]);
  }
  static I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I load4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  // sum (u - bias) x over a group for 16 rows.
  template <int BITS>
  struct GemmAcc {
    I acc;
    void init(int32_t x_sum) { acc = _mm512_set1_epi32(-(x_sum << (BITS - 1))); }
    void add(I u, I x) { acc = _mm512_dpbusd_epi32(acc, u, x); }
    F to_float() const { return _mm512_cvtepi32_ps(acc); }
  };
};

// 4 bits: the codes of rows 32-63 stay in the upper half of their bytes (16 u, which dpbusd takes as well as u), so
// that no shift competes with the interleaving for the two shuffle ports; their sums are divided by 16 at the end,
// exactly.
template <>
struct Vec::Acc<4> {
  I acc[4];
  void init(int32_t start) {
    const I s = _mm512_set1_epi32(start);
    acc[0] = acc[1] = acc[2] = acc[3] = _mm512_mask_slli_epi32(s, 0xFF00, s, 4);
  }
  static I raw(const uint8_t* low) {
    const I both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const int64_t lo = 0x0F0F0F0F0F0F0F0F, hi = int64_t(0xF0F0F0F0F0F0F0F0ull);
    return _mm512_and_si512(both, _mm512_set_epi64(hi, hi, hi, hi, lo, lo, lo, lo));
  }
  void add4(const uint8_t* low, const uint8_t*, const uint32_t* off, uint32_t x4) {
    I q[4];
    interleave4(raw(low + off[0]), raw(low + off[1]), raw(low + off[2]), raw(low + off[3]), q);
    const I x = _mm512_set1_epi32(int32_t(x4));
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], q[j], x);
  }
  void to_float(F out[4]) {
    lanes_transpose(acc);
    for (int k = 0; k < 4; ++k) out[k] = _mm512_cvtepi32_ps(k < 2 ? acc[k] : _mm512_srai_epi32(acc[k], 4));
  }
};

}  // namespace avx512
}  // namespace sr
