// AVX-512 element-wise kernels and attention: simd/ with this set's primitives.
#include "kernels/avx512/kernels.h"
#include "kernels/avx512/vec.h"
#include "kernels/simd/attend.h"
#include "kernels/simd/select.h"
#include "kernels/simd/vector.h"

namespace sr {
namespace avx512 {

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
  const __m512i* p = static_cast<const __m512i*>(data);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  const size_t n = bytes / 256;
  for (size_t i = 0; i < n; ++i, p += 4) {
    a = _mm512_add_epi64(a, _mm512_loadu_si512(p));
    b = _mm512_add_epi64(b, _mm512_loadu_si512(p + 1));
    c = _mm512_add_epi64(c, _mm512_loadu_si512(p + 2));
    d = _mm512_add_epi64(d, _mm512_loadu_si512(p + 3));
  }
  return uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d))));
}

}  // namespace avx512
}  // namespace sr
