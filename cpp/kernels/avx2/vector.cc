// AVX2 element-wise kernels and attention: simd/ with this set's primitives.
#include "kernels/avx2/kernels.h"
#include "kernels/avx2/vec.h"
#include "kernels/simd/attend.h"
#include "kernels/simd/select.h"
#include "kernels/simd/vector.h"

namespace sr {
namespace avx2 {

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
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  const size_t n = bytes / 128;
  for (size_t i = 0; i < n; ++i, p += 4) {
    a = _mm256_add_epi64(a, _mm256_loadu_si256(p));
    b = _mm256_add_epi64(b, _mm256_loadu_si256(p + 1));
    c = _mm256_add_epi64(c, _mm256_loadu_si256(p + 2));
    d = _mm256_add_epi64(d, _mm256_loadu_si256(p + 3));
  }
  uint64_t parts[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts),
                      _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
  return parts[0] + parts[1] + parts[2] + parts[3];
}

}  // namespace avx2
}  // namespace sr
