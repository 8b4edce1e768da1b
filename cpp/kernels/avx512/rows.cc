// AVX-512 rows of neurons: simd/ with this set's primitives. One register holds the 16 lanes of a stripe.
#include "kernels/avx512/kernels.h"
#include "kernels/avx512/vec.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/rows_float.h"
#include "kernels/simd/rows_gemm.h"

namespace sr {
namespace avx512 {
namespace {

struct RowVec : Vec {
  static constexpr bool kRowsGemmUnroll = true;
  static constexpr int kRowsGemmRows = 4, kRowsGemmVectors = 3, kRowsFloatVectors = 6;

  static I load_i8(const int8_t* p) { return _mm512_loadu_si512(p); }
  static I load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static F int_to_float(I a) { return _mm512_cvtepi32_ps(a); }
  template <int BITS>
  static I minus_bias(I x_sum) {
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(x_sum, BITS - 1));
  }
  // The first n lanes of a, the others of b.
  static F first_lanes(F a, F b, int n) { return _mm512_mask_mov_ps(b, __mmask16((1u << n) - 1), a); }

  // 4 inputs of each of the first n lanes; TAIL: n may be below 16, and nothing behind is touched.
  template <bool TAIL>
  static I load_chunk(const uint8_t* p, int n) {
    return TAIL ? _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p) : _mm512_loadu_si512(p);
  }
  template <bool TAIL>
  static F load_scales(const uint16_t* p, int n) {
    return TAIL ? load_f16_part(p, n) : load_f16(p);
  }
  // Codes of chunks C and C + 4, C < 4; chunks of a plane are `stride` bytes apart.
  template <int BITS, bool TAIL, int C>
  static void codes_of(const uint8_t* low, const uint8_t* high, int stride, int n, I* a, I* b) {
    if constexpr (BITS == 8) {
      *a = load_chunk<TAIL>(low + C * stride, n);
      *b = load_chunk<TAIL>(low + (C + 4) * stride, n);
    } else {
      const I nibble = _mm512_set1_epi8(15), v = load_chunk<TAIL>(low + C * stride, n);
      *a = _mm512_and_si512(v, nibble);
      *b = _mm512_and_si512(_mm512_srli_epi32(v, 4), nibble);
      if constexpr (BITS == 5) {  // bits C and C + 4 of a byte, moved to bit 4
        const I h = load_chunk<TAIL>(high, n), bit = _mm512_set1_epi8(0x10);
        *a = or_and(*a, _mm512_slli_epi32(h, 4 - C), bit);
        *b = or_and(*b, _mm512_srli_epi32(h, C), bit);
      } else if constexpr (BITS == 6) {  // bits 2 C, 2 C + 1 of two planes, moved to bits 4, 5
        const I bits = _mm512_set1_epi8(0x30);
        *a = or_and(*a, to_bit4<2 * C>(load_chunk<TAIL>(high, n)), bits);
        *b = or_and(*b, to_bit4<2 * C>(load_chunk<TAIL>(high + stride, n)), bits);
      }
    }
  }
  template <int FROM>
  static I to_bit4(I h) {
    if constexpr (FROM <= 4) return _mm512_slli_epi32(h, 4 - FROM);
    else return _mm512_srli_epi32(h, FROM - 4);
  }
  static I or_and(I a, I b, I mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xF8); }  // a | (b & mask)

  // Exact sums of u * x, lane by lane.
  template <int BITS>
  struct RowSum {
    I acc;
    void init() { acc = _mm512_setzero_si512(); }
    void add(I u, I x) { acc = _mm512_dpbusd_epi32(acc, u, x); }
    F to_float(I start) const { return _mm512_cvtepi32_ps(_mm512_add_epi32(acc, start)); }
  };

  // A stripe's chunks 0-3 into a, 4-7 into b (the same sum where there is one scale a slab).
  template <int BITS, bool TAIL>
  static void row_chunks(const uint8_t* low, const uint8_t* high, int stride, int n, const int8_t* q, RowSum<BITS>& a,
                         RowSum<BITS>& b) {
    chunk<BITS, TAIL, 0>(low, high, stride, n, q, a, b);
    chunk<BITS, TAIL, 1>(low, high, stride, n, q, a, b);
    chunk<BITS, TAIL, 2>(low, high, stride, n, q, a, b);
    chunk<BITS, TAIL, 3>(low, high, stride, n, q, a, b);
  }
  template <int BITS, bool TAIL, int C>
  static void chunk(const uint8_t* low, const uint8_t* high, int stride, int n, const int8_t* q, RowSum<BITS>& a,
                    RowSum<BITS>& b) {
    I u, v;
    codes_of<BITS, TAIL, C>(low, high, stride, n, &u, &v);
    a.add(u, load_i8(q + 64 * C));
    b.add(v, load_i8(q + 64 * (C + 4)));
  }
  template <int BITS, bool TAIL>
  static void row_unpack(const uint8_t* low, const uint8_t* high, int stride, int n, uint8_t* out) {
    I u[8];
    codes_of<BITS, TAIL, 0>(low, high, stride, n, u, u + 4);
    codes_of<BITS, TAIL, 1>(low, high, stride, n, u + 1, u + 5);
    codes_of<BITS, TAIL, 2>(low, high, stride, n, u + 2, u + 6);
    codes_of<BITS, TAIL, 3>(low, high, stride, n, u + 3, u + 7);
    for (int c = 0; c < 8; ++c) _mm512_storeu_si512(out + 64 * c, u[c]);
  }

  // The tree over 16 lanes: l and l + 8, l and l + 4, l and l + 2, l and l + 1.
  static float reduce_lanes(const F* f) { return reduce_add(f[0]); }
  static void reduce_lanes4(const F* a, const F* b, const F* c, const F* d, float* out) {
    const F ab = _mm512_add_ps(_mm512_shuffle_f32x4(*a, *b, 0x44), _mm512_shuffle_f32x4(*a, *b, 0xEE));
    const F cd = _mm512_add_ps(_mm512_shuffle_f32x4(*c, *d, 0x44), _mm512_shuffle_f32x4(*c, *d, 0xEE));
    F s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4E));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xB1));
    const I first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, s)));
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

}  // namespace avx512
}  // namespace sr
