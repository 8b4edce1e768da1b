// Element-wise kernels: quantisation of activations, norms, activations, conversions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/f16.h"
#include "kernels/generic/generic.h"

namespace sr {
namespace generic {

void quantise(const float* x, int n, int8_t* q, float* scale, int32_t* sum) {
  const int slabs = (n + kSlabCols - 1) / kSlabCols;
  for (int s = 0; s < slabs; ++s) {
    const int width = std::min(kSlabCols, n - s * kSlabCols);
    uint32_t top = 0;  // compared as bits, so that a NaN wins and is not lost
    for (int i = 0; i < width; ++i) top = std::max(top, float_to_bits(x[s * kSlabCols + i]) & 0x7fffffffu);
    const float amax = bits_to_float(top);
    int8_t* out = q + s * kSlabCols;
    std::memset(out, 0, kSlabCols);
    sum[2 * s] = sum[2 * s + 1] = 0;
    if (!(amax <= std::numeric_limits<float>::max())) {
      scale[s] = std::numeric_limits<float>::quiet_NaN();  // NaN or infinity: shows in every output
      continue;
    }
    scale[s] = amax / 127.0f;
    // A block so small that 127 / amax overflows is a block of zeros at int8 precision.
    const float inverse = amax > 1e-30f ? 127.0f / amax : 0.0f;
    for (int i = 0; i < width; ++i) {
      out[i] = int8_t(std::nearbyint(x[s * kSlabCols + i] * inverse));
      sum[2 * s + i / 16] += out[i];
    }
  }
}

int select(const float* x, const float* threshold, int stride, int n, int8_t* q, int32_t* sum, uint8_t* cols,
           uint8_t* count) {
  int total = 0;
  for (int s = 0; s * kSlabCols < n; ++s) {
    sum[2 * s] = sum[2 * s + 1] = 0;
    int listed = 0;
    for (int c = 0; c < kSlabCols; ++c) {
      const int j = s * kSlabCols + c;
      if (j >= n || !(std::fabs(x[j]) > threshold[j * stride])) q[j] = 0;
      if (q[j] == 0) continue;
      cols[s * kSlabCols + listed++] = uint8_t(c);
      sum[2 * s + c / 16] += q[j];
    }
    count[s] = uint8_t(listed);
    total += listed;
  }
  return total;
}

void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(x[i]) * x[i];
  const float factor = float(1.0 / std::sqrt(sum / n + eps));
  for (int i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) sum += x[i];
  const double mean = sum / n;
  for (int i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = float(1.0 / std::sqrt(squares / n + eps));
  for (int i = 0; i < n; ++i) out[i] = (x[i] - float(mean)) * factor * weight[i] + (bias ? bias[i] : 0.0f);
}

void activate(Activation act, const float* gate, const float* up, int n, float* z) {
  for (int i = 0; i < n; ++i) {
    const float g = gate[i];
    float a = 0;
    switch (act) {
      case Activation::silu: a = g / (1.0f + std::exp(-g)); break;
      case Activation::gelu_tanh:
        a = 0.5f * g * (1.0f + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
        break;
      case Activation::gelu: a = 0.5f * g * (1.0f + std::erf(g * 0.7071067812f)); break;
      case Activation::relu: a = g < 0 ? 0.0f : g; break;  // keeps NaN
      case Activation::relu2: a = g < 0 ? 0.0f : g * g; break;
    }
    z[i] = up ? a * up[i] : a;
  }
}

void attend(const AttendArgs& a) {
  for (int i = 0; i < a.n_q; ++i) {
    const float* q = a.q + i * a.q_stride;
    float* out = a.out + i * a.out_stride;
    float* p = static_cast<float*>(a.scratch);
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
    std::memset(out, 0, sizeof(float) * a.head_dim);
    for (int j = a.first[i]; j < a.last[i]; ++j) {
      float s = 0;
      for (int d = 0; d < a.head_dim; ++d)
        s = std::fma(q[d], f16_to_f32(a.k[(size_t(j / kKeyBlock) * a.head_dim + d) * kKeyBlock + j % kKeyBlock]), s);
      s *= a.scale;
      if (a.softcap > 0) s = a.softcap * std::tanh(s / a.softcap);
      p[j] = s;
      top = std::max(top, s);
    }
    for (int j = a.first[i]; j < a.last[i]; ++j) {
      const float e = std::exp(p[j] - top);
      sum += e;
      for (int d = 0; d < a.head_dim; ++d) out[d] = std::fma(e, f16_to_f32(a.v[size_t(j) * a.head_dim + d]), out[d]);
    }
    a.row_max[i] = top;
    a.row_sum[i] = sum;
  }
}

void to_f16(const float* x, int n, uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

uint64_t read_sum(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint64_t a = 0, b = 0, v[2];
  for (size_t i = 0; i + 16 <= bytes; i += 16) {
    std::memcpy(v, p + i, 16);
    a += v[0];
    b += v[1];
  }
  return a + b;
}

}  // namespace generic
}  // namespace sr
