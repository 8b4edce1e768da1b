// NEON rows of neurons: simd/ with this variant's primitives. Four registers hold the 16 lanes of a stripe.
#include "kernels/neon/kernels.h"
#include "kernels/neon/vec.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/rows_float.h"
#include "kernels/simd/rows_gemm.h"

namespace sr {
namespace SR_NEON {
namespace {

// Multiply-adds of signed bytes want 8-bit codes as u - 128; usdot takes them as they are.
template <int BITS>
constexpr bool kSignedCodes = BITS == 8 && SR_NEON_LEVEL < 2;

#if SR_NEON_LEVEL >= 1
// Exact sums of u * x, lane by lane.
template <int BITS>
struct LaneSum {
  int32x4_t acc;
  void init() { acc = vdupq_n_s32(0); }
  void add(int8x16_t u, int8x16_t x) {
#if SR_NEON_LEVEL >= 2
    acc = vusdotq_s32(acc, vreinterpretq_u8_s8(u), x);
#else
    acc = vdotq_s32(acc, u, x);
#endif
  }
  void add2(int8x16_t u, int8x16_t x, int8x16_t v, int8x16_t y) {
    add(u, x);
    add(v, y);
  }
  int32x4_t sum() const { return acc; }
};
#else
// The same with widening multiplications. Up to 5 bits the 8 chunks of a slab fit int16 (8 * 31 * 127 = 31496); two
// products fit it always (2 * 128 * 127 = 32512).
template <int BITS>
struct LaneSum {
  static constexpr bool kNarrow = BITS <= 5;
  int16x8_t t[2];    // lanes 0 and 1, 2 and 3: four products each
  int32x4_t acc[2];  // the same, two and two products added
  void init() {
    if (kNarrow) t[0] = t[1] = vdupq_n_s16(0);
    else acc[0] = acc[1] = vdupq_n_s32(0);
  }
  void add(int8x16_t u, int8x16_t x) {
    if (kNarrow) {
      t[0] = vmlal_s8(t[0], vget_low_s8(u), vget_low_s8(x));
      t[1] = vmlal_high_s8(t[1], u, x);
    } else {
      acc[0] = vpadalq_s16(acc[0], vmull_s8(vget_low_s8(u), vget_low_s8(x)));
      acc[1] = vpadalq_s16(acc[1], vmull_high_s8(u, x));
    }
  }
  void add2(int8x16_t u, int8x16_t x, int8x16_t v, int8x16_t y) {
    if (kNarrow) {
      add(u, x);
      add(v, y);
    } else {
      const int16x8_t a = vmull_s8(vget_low_s8(u), vget_low_s8(x)), b = vmull_high_s8(u, x);
      acc[0] = vpadalq_s16(acc[0], vmlal_s8(a, vget_low_s8(v), vget_low_s8(y)));
      acc[1] = vpadalq_s16(acc[1], vmlal_high_s8(b, v, y));
    }
  }
  int32x4_t sum() const {
    return kNarrow ? vpaddq_s32(vpaddlq_s16(t[0]), vpaddlq_s16(t[1])) : vpaddq_s32(acc[0], acc[1]);
  }
};
#endif

struct RowVec : Vec {
  static constexpr bool kRowsGemmUnroll = false;
  static constexpr int kRowsGemmRows = 4, kRowsGemmVectors = 2, kRowsFloatVectors = 2;

  static I load_i8(const int8_t* p) { return vld1q_s8(p); }
  static I load_int(const int32_t* p) { return vreinterpretq_s8_s32(vld1q_s32(p)); }
  static I add_int(I a, I b) {
    return vreinterpretq_s8_s32(vaddq_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
  }
  static F int_to_float(I a) { return vcvtq_f32_s32(vreinterpretq_s32_s8(a)); }
  template <int BITS>
  static I minus_bias(I x_sum) {
    if (kSignedCodes<BITS>) return vdupq_n_s8(0);
    return vreinterpretq_s8_s32(vnegq_s32(vshlq_n_s32(vreinterpretq_s32_s8(x_sum), BITS - 1)));
  }
  // The first n lanes of a, the others of b.
  static F first_lanes(F a, F b, int n) {
    const uint32x4_t lane = vcombine_u32(vcreate_u32(uint64_t(1) << 32), vcreate_u32(uint64_t(3) << 32 | 2));
    return vbslq_f32(vcltq_u32(lane, vdupq_n_u32(uint32_t(n))), a, b);
  }

  // 4 inputs of each of the first n lanes; TAIL: n may be below 4, and nothing behind is touched.
  template <bool TAIL>
  static uint8x16_t load_chunk(const uint8_t* p, int n) {
    if (!TAIL || n == kLanes) return vld1q_u8(p);
    uint8_t t[16] = {};
    std::memcpy(t, p, size_t(4 * n));
    return vld1q_u8(t);
  }
  template <bool TAIL>
  static F load_scales(const uint16_t* p, int n) {
    return TAIL && n < kLanes ? load_f16_part(p, n) : load_f16(p);
  }
  // Codes of chunks C and C + 4, C < 4; chunks of a plane are `stride` bytes apart.
  template <int BITS, bool TAIL, int C>
  static void codes_of(const uint8_t* low, const uint8_t* high, int stride, int n, I* a, I* b) {
    uint8x16_t u, v;
    if constexpr (BITS == 8) {
      u = load_chunk<TAIL>(low + C * stride, n);
      v = load_chunk<TAIL>(low + (C + 4) * stride, n);
      if (kSignedCodes<BITS>) {
        u = veorq_u8(u, vdupq_n_u8(0x80));
        v = veorq_u8(v, vdupq_n_u8(0x80));
      }
    } else {
      const uint8x16_t both = load_chunk<TAIL>(low + C * stride, n);
      u = vandq_u8(both, vdupq_n_u8(15));
      v = vshrq_n_u8(both, 4);
      if constexpr (BITS == 5) {  // bits C and C + 4 of a byte, moved to bit 4
        const uint8x16_t h = load_chunk<TAIL>(high, n), bit = vdupq_n_u8(0x10);
        u = vbslq_u8(bit, shifted<4 - C>(h), u);
        v = vbslq_u8(bit, shifted<-C>(h), v);
      } else if constexpr (BITS == 6) {  // bits 2 C, 2 C + 1 of two planes, moved to bits 4, 5
        const uint8x16_t bits = vdupq_n_u8(0x30);
        u = vbslq_u8(bits, shifted<4 - 2 * C>(load_chunk<TAIL>(high, n)), u);
        v = vbslq_u8(bits, shifted<4 - 2 * C>(load_chunk<TAIL>(high + stride, n)), v);
      }
    }
    *a = vreinterpretq_s8_u8(u);
    *b = vreinterpretq_s8_u8(v);
  }

  template <int BITS>
  struct RowSum : LaneSum<BITS> {
    F to_float(I start) const { return vcvtq_f32_s32(vaddq_s32(LaneSum<BITS>::sum(), vreinterpretq_s32_s8(start))); }
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
    for (int c = 0; c < 8; ++c) vst1q_s8(reinterpret_cast<int8_t*>(out) + 64 * c, u[c]);
  }

  // The tree over 16 lanes: l and l + 8, l and l + 4, l and l + 2, l and l + 1.
  static F four_lanes(const F* f) { return vaddq_f32(vaddq_f32(f[0], f[2]), vaddq_f32(f[1], f[3])); }
  static float reduce_lanes(const F* f) {
    const F s = four_lanes(f);
    return vpadds_f32(vadd_f32(vget_low_f32(s), vget_high_f32(s)));
  }
  // Lanes l and l + 2 of a, then of b.
  static F two_lanes(F a, F b) {
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
  }
  static void reduce_lanes4(const F* a, const F* b, const F* c, const F* d, float* out) {
    vst1q_f32(out, vpaddq_f32(two_lanes(four_lanes(a), four_lanes(b)), two_lanes(four_lanes(c), four_lanes(d))));
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

}  // namespace SR_NEON
}  // namespace sr
