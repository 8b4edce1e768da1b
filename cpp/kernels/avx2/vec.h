// AVX2 (with FMA, F16C) primitives for the kernels of simd/.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/simd/list_bits.h"
#include "kernels/table.h"

namespace sr {
namespace avx2 {

struct Vec {
  static constexpr const char* kName = "avx2";
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kGemmRows = 16, kGemmVectors = 4;  // 8 integer sums in registers; the float sums spill
  static constexpr int kGemmQuads = 1;                    // quads of columns that interleave_tile does at once
  static constexpr int kScoreQueries = 4, kMixQueries = 2, kMixVectors = 4;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // a where x < y, else b (also where either is NaN).
  static F select_less(F x, F y, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ)); }
  // 2^n for integral n in the normal range.
  static F exp2_int(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static float reduce_add(F a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static float reduce_max(F a) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
  }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static void store_f16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The first n (1..8) lanes; callers have n == 8 except in tails.
  static F load_f16_part(const uint16_t* p, int n) {
    uint16_t t[8] = {};
    std::memcpy(t, p, 2 * n);
    return load_f16(t);
  }
  static F load_part(const float* p, int n) {
    float t[8] = {};
    std::memcpy(t, p, 4 * n);
    return load(t);
  }
  static void store_part(float* p, F x, int n) {
    float t[8];
    store(t, x);
    std::memcpy(p, t, 4 * n);
  }

  // Largest |x| of 32 floats as bits, so that a NaN wins.
  static uint32_t abs_max_bits32(const float* p) {
    const I m = _mm256_set1_epi32(0x7fffffff);
    I top = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += 8)
      top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const I*>(p + i)), m));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4E));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0xB1));
    return uint32_t(_mm_cvtsi128_si32(q));
  }
  // 32 floats times `inverse`, rounded to int8; sums of the first and second 16.
  static void quantise32(const float* p, float inverse, int8_t* q, int32_t* sum) {
    const F f = _mm256_set1_ps(inverse);
    for (int h = 0; h < 2; ++h) {
      const I a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p + 16 * h), f));
      const I b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p + 16 * h + 8), f));
      const I w = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * h), bytes);
      const I s = _mm256_add_epi32(a, b);
      __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
      t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
      t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1));
      sum[h] = _mm_cvtsi128_si32(t);
    }
  }

  // Bit j: |x[j]| > t[j], of 32.
  static uint32_t above32(const float* x, const float* t) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i)
      bits |= uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(abs(load(x + 8 * i)), load(t + 8 * i), _CMP_GT_OQ))) << 8 * i;
    return bits;
  }
  // Zeroes the q whose bit is not set; sums of the first and second 16; bits of the q that are not 0.
  static uint32_t mask32(uint32_t keep, int8_t* q, int32_t* sum) {
    // Byte i of the mask: bit i of keep, from the byte i / 8 of it.
    const I spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3,
                                      3, 3, 3, 3, 3);
    const I bit = _mm256_set1_epi64x(int64_t(0x8040201008040201ull));
    const I bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int32_t(keep)), spread), bit);
    const I v = _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const I*>(q)), _mm256_cmpeq_epi8(bytes, bit));
    _mm256_storeu_si256(reinterpret_cast<I*>(q), v);
    const I s = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), v), _mm256_set1_epi16(1));
    for (int h = 0; h < 2; ++h) {
      __m128i t = h ? _mm256_extracti128_si256(s, 1) : _mm256_castsi256_si128(s);
      t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
      sum[h] = _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
    }
    return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  }
  static int list32(uint32_t bits, uint8_t* list) { return simd::list_bits(bits, list); }

  // The first `count` (1..N, N = 16 or 32) entries of cols: off[i] = cols[i] * run and the bytes of x4 the inputs
  // q[cols[i]], up to N entries written; beyond count the last column with an input of 0.
  template <int N>
  static void list_columns(const int8_t* q, const uint8_t* cols, int count, uint32_t run, uint32_t* off, uint32_t* x4) {
    const __m128i *pq = reinterpret_cast<const __m128i*>(q), *pc = reinterpret_cast<const __m128i*>(cols);
    const __m128i q0 = _mm_loadu_si128(pq), q1 = _mm_loadu_si128(pq + 1), last = _mm_set1_epi8(char(cols[count - 1]));
    const I step = _mm256_set1_epi32(int(run));
    for (int h = 0; h < N / 16; ++h) {
      const __m128i at = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m128i listed = _mm_cmpgt_epi8(_mm_set1_epi8(char(count - 16 * h)), at);
      const __m128i c = _mm_blendv_epi8(last, _mm_loadu_si128(pc + h), listed);
      const __m128i second = _mm_slli_epi16(c, 3);  // bit 4 of each byte decides
      const __m128i x = _mm_blendv_epi8(_mm_shuffle_epi8(q0, c), _mm_shuffle_epi8(q1, c), second);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(x4) + h, _mm_and_si128(x, listed));
      I* out = reinterpret_cast<I*>(off + 16 * h);
      _mm256_storeu_si256(out, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(c), step));
      _mm256_storeu_si256(out + 1, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(c, 8)), step));
    }
  }

  // ---- codes of one column for half a tile (rows 32 H .. 32 H + 31), one byte each, in row order ----
  template <int BITS, int H>
  static I codes(const uint8_t* low, const uint8_t* high) {
    if constexpr (BITS == 8) {
      return _mm256_loadu_si256(reinterpret_cast<const I*>(low + 32 * H));
    } else {
      I v = _mm256_loadu_si256(reinterpret_cast<const I*>(low));
      if constexpr (H == 1) v = _mm256_srli_epi16(v, 4);
      I u = _mm256_and_si256(v, _mm256_set1_epi8(15));
      if constexpr (BITS == 5) {  // qword k of half H needs bit 4 H + k, moved to bit 4
        int64_t bits;
        std::memcpy(&bits, high, 8);
        const I b = _mm256_set1_epi64x(bits);
        const I h = H == 0 ? _mm256_sllv_epi64(b, _mm256_set_epi64x(1, 2, 3, 4))
                           : _mm256_srlv_epi64(b, _mm256_set_epi64x(3, 2, 1, 0));
        u = _mm256_or_si256(u, _mm256_and_si256(h, _mm256_set1_epi8(0x10)));
      } else if constexpr (BITS == 6) {  // lane k of half H needs bits 4 H + 2 k and the next, moved to bits 4, 5
        const I b = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high)));
        const I h = H == 0 ? _mm256_sllv_epi64(b, _mm256_set_epi64x(2, 2, 4, 4))
                           : _mm256_srlv_epi64(b, _mm256_set_epi64x(2, 2, 0, 0));
        u = _mm256_or_si256(u, _mm256_and_si256(h, _mm256_set1_epi8(0x30)));
      }
      return u;
    }
  }

  // Bytes of four columns interleaved, 8 rows x 4 columns a register: q[j] lane k holds rows 16 k + 4 j .. + 3.
  static void interleave4(I a, I b, I c, I d, I q[4]) {
    const I ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
    const I cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
    q[0] = _mm256_unpacklo_epi16(ab0, cd0);
    q[1] = _mm256_unpackhi_epi16(ab0, cd0);
    q[2] = _mm256_unpacklo_epi16(ab1, cd1);
    q[3] = _mm256_unpackhi_epi16(ab1, cd1);
  }
  // Lanes of the four registers put in row order: out[i] holds rows 8 i .. 8 i + 7.
  static void lanes_transpose(I q[4]) {
    const I t0 = _mm256_permute2x128_si256(q[0], q[1], 0x20), t1 = _mm256_permute2x128_si256(q[2], q[3], 0x20);
    const I t2 = _mm256_permute2x128_si256(q[0], q[1], 0x31), t3 = _mm256_permute2x128_si256(q[2], q[3], 0x31);
    q[0] = t0;
    q[1] = t1;
    q[2] = t2;
    q[3] = t3;
  }

  // acc + the four products u * x of each 32-bit lane, u unsigned. Up to 6 bits the pairs of maddubs fit int16; for 8
  // bits the sign moves from the weight to x (u - 128 is what is multiplied), since 255 * 127 * 2 does not fit.
  template <int BITS>
  static I dot4(I acc, I u, I x) {
    const I ones = _mm256_set1_epi16(1);
    if constexpr (BITS == 8) {
      const I w = _mm256_xor_si256(u, _mm256_set1_epi8(char(0x80)));
      return _mm256_add_epi32(
          acc, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), ones));
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), ones));
  }

  // Exact sums over some columns of the 64 rows of a tile, in int32, four columns at a time.
  template <int BITS>
  struct Acc {
    I acc[2][4];
    void init(int32_t start) {
      if (BITS == 8) start = 0;  // dot4 multiplies u - 128 already
      for (int h = 0; h < 2; ++h)
        for (int j = 0; j < 4; ++j) acc[h][j] = _mm256_set1_epi32(start);
    }
    template <int H>
    void half(const uint8_t* low, const uint8_t* high, const uint32_t* off, I x) {
      I q[4];
      interleave4(codes<BITS, H>(low + off[0], high + off[0]), codes<BITS, H>(low + off[1], high + off[1]),
                  codes<BITS, H>(low + off[2], high + off[2]), codes<BITS, H>(low + off[3], high + off[3]), q);
      for (int j = 0; j < 4; ++j) acc[H][j] = dot4<BITS>(acc[H][j], q[j], x);
    }
    void add4(const uint8_t* low, const uint8_t* high, const uint32_t* off, uint32_t x4) {
      const I x = _mm256_set1_epi32(int32_t(x4));
      half<0>(low, high, off, x);
      half<1>(low, high, off, x);
    }
    // Sums of rows 8 k .. 8 k + 7 as floats, k = 0..7.
    void to_float(F out[8]) {
      for (int h = 0; h < 2; ++h) {
        lanes_transpose(acc[h]);
        for (int k = 0; k < 4; ++k) out[4 * h + k] = _mm256_cvtepi32_ps(acc[h][k]);
      }
    }
  };

  // ---- prefill ----
  // Four columns of a tile as bytes [64 / kGemmRows][rows][4]; subtiles are sub_stride bytes apart.
  template <int BITS, int H>
  static void interleave_half(const uint8_t* low, const uint8_t* high, size_t run, uint8_t* out, size_t sub_stride) {
    I q[4];
    interleave4(codes<BITS, H>(low, high), codes<BITS, H>(low + run, high + run),
                codes<BITS, H>(low + 2 * run, high + 2 * run), codes<BITS, H>(low + 3 * run, high + 3 * run), q);
    lanes_transpose(q);
    for (int k = 0; k < 4; ++k)
      _mm256_storeu_si256(reinterpret_cast<I*>(out + (2 * H + k / 2) * sub_stride + (k % 2) * 32), q[k]);
  }
  template <int BITS>
  static void interleave_tile(const uint8_t* low, const uint8_t* high, size_t run, uint8_t* out, size_t sub_stride) {
    interleave_half<BITS, 0>(low, high, run, out, sub_stride);
    interleave_half<BITS, 1>(low, high, run, out, sub_stride);
  }
  static I load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  // sum (u - bias) x over a group for 8 rows. Pairs of 4-bit codes stay in int16 for the whole group
  // (8 * 2 * 15 * 127 = 30480).
  template <int BITS>
  struct GemmAcc {
    I acc;
    int32_t start;
    void init(int32_t x_sum) {
      acc = _mm256_setzero_si256();
      start = BITS == 8 ? 0 : -(x_sum << (BITS - 1));
    }
    void add(I u, I x) {
      if constexpr (BITS == 4) acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, x));
      else acc = dot4<BITS>(acc, u, x);
    }
    F to_float() const {
      I sum = acc;
      if constexpr (BITS == 4) sum = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
      return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(start)));
    }
  };
};

// 4 bits: pairs of columns in int16. The sum of a slab, sum (u - 8) x <= 8 * 127 * 32, fits int16, so the additions may
// wrap on the way: 20 instructions per 2 columns x 64 rows against 28 in int32.
template <>
struct Vec::Acc<4> {
  I acc[4];
  void init(int32_t start) { acc[0] = acc[1] = acc[2] = acc[3] = _mm256_set1_epi16(int16_t(start)); }
  void pair(const uint8_t* a, const uint8_t* b, I x) {
    const I mask = _mm256_set1_epi8(15);
    const I va = _mm256_loadu_si256(reinterpret_cast<const I*>(a)),
            vb = _mm256_loadu_si256(reinterpret_cast<const I*>(b));
    const I a0 = _mm256_and_si256(va, mask), a1 = _mm256_and_si256(_mm256_srli_epi16(va, 4), mask);
    const I b0 = _mm256_and_si256(vb, mask), b1 = _mm256_and_si256(_mm256_srli_epi16(vb, 4), mask);
    acc[0] = _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a0, b0), x));
    acc[1] = _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a0, b0), x));
    acc[2] = _mm256_add_epi16(acc[2], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(a1, b1), x));
    acc[3] = _mm256_add_epi16(acc[3], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(a1, b1), x));
  }
  void add4(const uint8_t* low, const uint8_t*, const uint32_t* off, uint32_t x4) {
    pair(low + off[0], low + off[1], _mm256_set1_epi16(int16_t(x4)));
    pair(low + off[2], low + off[3], _mm256_set1_epi16(int16_t(x4 >> 16)));
  }
  void to_float(F out[8]) {
    for (int h = 0; h < 2; ++h) {  // acc[2 h]: rows 0-7 and 16-23 of the half, acc[2 h + 1]: 8-15 and 24-31
      out[4 * h + 0] = widen(_mm256_castsi256_si128(acc[2 * h]));
      out[4 * h + 1] = widen(_mm256_castsi256_si128(acc[2 * h + 1]));
      out[4 * h + 2] = widen(_mm256_extracti128_si256(acc[2 * h], 1));
      out[4 * h + 3] = widen(_mm256_extracti128_si256(acc[2 * h + 1], 1));
    }
  }
  static F widen(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(v)); }
};

}  // namespace avx2
}  // namespace sr
