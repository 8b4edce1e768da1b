// NEON element-wise kernels and attention: simd/ with this variant's primitives.
#include "kernels/neon/kernels.h"
#include "kernels/neon/vec.h"
#include "kernels/simd/attend.h"
#include "kernels/simd/select.h"
#include "kernels/simd/vector.h"

namespace sr {
namespace SR_NEON {

void quantise(const float* x, int n, int8_t* q, float* scale, int32_t* sum) {
  simd::quantise<Vec>(x, n, q, scale, sum);
}
int select(const float* x, const float* threshold, int stride, int n, int8_t* q, int32_t* sum, uint8_t* cols,
           uint8_t* count) {
  return simd::select<Vec>(x, threshold, stride, n, q, sum, cols, count);
}
void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  simd::rms_norm<Vec>(x, weight, n, eps, out);
}
void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  simd::layer_norm<Vec>(x, weight, bias, n, eps, out);
}
void activate(Activation act, const float* gate, const float* up, int n, float* z) {
  simd::activate<Vec>(act, gate, up, n, z);
}
void attend(const AttendArgs& args) { simd::attend<Vec>(args); }
void to_f16(const float* x, int n, uint16_t* out) { simd::to_f16<Vec>(x, n, out); }

uint64_t read_sum(const void* data, size_t bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64x2_t a = vdupq_n_u64(0), b = a, c = a, d = a;
  for (size_t i = 0; i < bytes / 64; ++i, p += 8) {
    a = vaddq_u64(a, vld1q_u64(p));
    b = vaddq_u64(b, vld1q_u64(p + 2));
    c = vaddq_u64(c, vld1q_u64(p + 4));
    d = vaddq_u64(d, vld1q_u64(p + 6));
  }
  return vaddvq_u64(vaddq_u64(vaddq_u64(a, b), vaddq_u64(c, d)));
}

}  // namespace SR_NEON
}  // namespace sr
