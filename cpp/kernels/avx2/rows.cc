// AVX2 rows of neurons: simd/ with this set's primitives. Two registers hold the 16 lanes of a stripe.
#include "kernels/avx2/kernels.h"
#include "kernels/avx2/vec.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/rows_float.h"
#include "kernels/simd/rows_gemm.h"

namespace sr {
namespace avx2 {
namespace {

struct RowVec : Vec {
  static constexpr bool kRowsGemmUnroll = false;
  static constexpr int kRowsGemmRows = 4, kRowsGemmVectors = 2, kRowsFloatVectors = 2;

  static I load_i8(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static F int_to_float(I a) { return _mm256_cvtepi32_ps(a); }
  // 8 bits: the products are those of u - 128 already.
  template <int BITS>
  static I minus_bias(I x_sum) {
    if (BITS == 8) return _mm256_setzero_si256();
    return _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(x_sum, BITS - 1));
  }
  static I first_mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // The first n lanes of a, the others of b.
  static F first_lanes(F a, F b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_mask(n))); }

  // 4 inputs of each of the first n lanes; TAIL: n may be below 8, and nothing behind is touched.
  template <bool TAIL>
  static I load_chunk(const uint8_t* p, int n) {
    return TAIL ? _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_mask(n))
                : _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  }
  // TAIL: the 16 bytes that end with the n-th half, which lie inside the row, moved down.
  template <bool TAIL>
  static F load_scales(const uint16_t* p, int n) {
    if (!TAIL) return load_f16(p);
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + n - 8));
    const __m128i down = _mm_add_epi8(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      _mm_set1_epi8(char(16 - 2 * n)));
    // Indices beyond 15 get their highest bit, which makes zeros.
    return _mm256_cvtph_ps(_mm_shuffle_epi8(v, _mm_adds_epu8(down, _mm_set1_epi8(0x70))));
  }
  // Codes of chunks C and C + 4, C < 4; chunks of a plane are `stride` bytes apart.
  template <int BITS, bool TAIL, int C>
  static void codes_of(const uint8_t* low, const uint8_t* high, int stride, int n, I* a, I* b) {
    if constexpr (BITS == 8) {
      *a = load_chunk<TAIL>(low + C * stride, n);
      *b = load_chunk<TAIL>(low + (C + 4) * stride, n);
    } else {
      const I nibble = _mm256_set1_epi8(15), v = load_chunk<TAIL>(low + C * stride, n);
      *a = _mm256_and_si256(v, nibble);
      *b = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
      if constexpr (BITS == 5) {  // bits C and C + 4 of a byte, moved to bit 4
        const I h = load_chunk<TAIL>(high, n), bit = _mm256_set1_epi8(0x10);
        *a = or_and(*a, _mm256_slli_epi16(h, 4 - C), bit);
        *b = or_and(*b, _mm256_srli_epi16(h, C), bit);
      } else if constexpr (BITS == 6) {  // bits 2 C, 2 C + 1 of two planes, moved to bits 4, 5
        const I bits = _mm256_set1_epi8(0x30);
        *a = or_and(*a, to_bit4<2 * C>(load_chunk<TAIL>(high, n)), bits);
        *b = or_and(*b, to_bit4<2 * C>(load_chunk<TAIL>(high + stride, n)), bits);
      }
    }
  }
  template <int FROM>
  static I to_bit4(I h) {
    if constexpr (FROM <= 4) return _mm256_slli_epi16(h, 4 - FROM);
    else return _mm256_srli_epi16(h, FROM - 4);
  }
  static I or_and(I a, I b, I mask) { return _mm256_or_si256(a, _mm256_and_si256(b, mask)); }

  // Exact sums of u * x, lane by lane. 4 bits: pairs stay in int16 for a whole slab (8 * 2 * 15 * 127 = 30480).
  template <int BITS>
  struct RowSum {
    I acc;
    void init() { acc = _mm256_setzero_si256(); }
    void add(I u, I x) {
      if constexpr (BITS == 4) acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u, x));
      else acc = dot4<BITS>(acc, u, x);
    }
    // Two chunks: up to 6 bits their pairs still fit int16 together (2 * 2 * 63 * 127 = 32004).
    void add2(I u, I x, I v, I y) {
      if constexpr (BITS == 4 || BITS == 8) {
        add(u, x);
        add(v, y);
      } else {
        const I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(u, x), _mm256_maddubs_epi16(v, y));
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    F to_float(I start) const {
      const I sum = BITS == 4 ? _mm256_madd_epi16(acc, _mm256_set1_epi16(1)) : acc;
      return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, start));
    }
  };

  // A stripe's chunks 0-3 into a, 4-7 into b (the same sum where there is one scale a slab).
  template <int BITS, bool TAIL>
  static void row_chunks(const uint8_t* low, const uint8_t* high, int stride, int n, const int8_t* q, RowSum<BITS>& a,
                         RowSum<BITS>& b) {
    two_chunks<BITS, TAIL, 0>(low, high, stride, n, q, a, b);
    two_chunks<BITS, TAIL, 2>(low, high, stride, n, q, a, b);
  }
  template <int BITS, bool TAIL, int C>
  static void two_chunks(const uint8_t* low, const uint8_t* high, int stride, int n, const int8_t* q, RowSum<BITS>& a,
                         RowSum<BITS>& b) {
    I u[2], v[2];
    codes_of<BITS, TAIL, C>(low, high, stride, n, u, v);
    codes_of<BITS, TAIL, C + 1>(low, high, stride, n, u + 1, v + 1);
    a.add2(u[0], load_i8(q + 64 * C), u[1], load_i8(q + 64 * (C + 1)));
    b.add2(v[0], load_i8(q + 64 * (C + 4)), v[1], load_i8(q + 64 * (C + 5)));
  }
  template <int BITS, bool TAIL>
  static void row_unpack(const uint8_t* low, const uint8_t* high, int stride, int n, uint8_t* out) {
    I u[8];
    codes_of<BITS, TAIL, 0>(low, high, stride, n, u, u + 4);
    codes_of<BITS, TAIL, 1>(low, high, stride, n, u + 1, u + 5);
    codes_of<BITS, TAIL, 2>(low, high, stride, n, u + 2, u + 6);
    codes_of<BITS, TAIL, 3>(low, high, stride, n, u + 3, u + 7);
    for (int c = 0; c < 8; ++c) _mm256_storeu_si256(reinterpret_cast<I*>(out + 64 * c), u[c]);
  }

  // The tree over 16 lanes: l and l + 8, l and l + 4, l and l + 2, l and l + 1.
  static float reduce_lanes(const F* f) { return reduce_add(_mm256_add_ps(f[0], f[1])); }
  static void reduce_lanes4(const F* a, const F* b, const F* c, const F* d, float* out) {
    const F a8 = _mm256_add_ps(a[0], a[1]), b8 = _mm256_add_ps(b[0], b[1]);
    const F c8 = _mm256_add_ps(c[0], c[1]), d8 = _mm256_add_ps(d[0], d[1]);
    const F ab = _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
    const F cd = _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
    const F two = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    const F one = _mm256_add_ps(_mm256_shuffle_ps(two, two, 0x88), _mm256_shuffle_ps(two, two, 0xDD));
    const __m128 ac = _mm256_castps256_ps128(one), bd = _mm256_extractf128_ps(one, 1);
    _mm_storeu_ps(out, _mm_unpacklo_ps(ac, bd));  // one: a c a c | b d b d
  }
};

}  // namespace

void rows_q(const NeuronMatrix& w, const RowVector& x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  simd::rows_q<RowVec>(w, x, ids, begin, end, gate, up);
}
void rows_f(const NeuronMatrix& w, const float* x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  simd::rows_f<RowVec>(w, x, ids, begin, end, gate, up);
}
void rows_gemm_q(const NeuronMatrix& w, const RowVector& x, int n, const int32_t* ids, int begin, int end, float* gate,
                 float* up, size_t ldy, void* scratch) {
  simd::rows_gemm_q<RowVec>(w, x, n, ids, begin, end, gate, up, ldy, scratch);
}
void rows_gemm_f(const NeuronMatrix& w, const float* x, size_t ldx, int n, const int32_t* ids, int begin, int end,
                 float* gate, float* up, size_t ldy, void* scratch) {
  simd::rows_gemm_f<RowVec>(w, x, ldx, n, ids, begin, end, gate, up, ldy, scratch);
}

}  // namespace avx2
}  // namespace sr
