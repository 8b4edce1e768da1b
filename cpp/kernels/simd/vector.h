// Element-wise kernels for any Vec: quantisation, norms, activations, conversions, and the exponential they share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/f16.h"
#include "kernels/table.h"

namespace sr {
namespace simd {

// e^x to 2 ulp for x <= 88; 0 below -87.33 (so also for -inf), NaN stays NaN. Cody-Waite reduction, degree-6
// polynomial.
template <class V>
inline typename V::F exp(typename V::F x) {
  const auto low = V::set1(-87.33f);
  const auto clamped = V::min(V::set1(88.37f), V::max(low, x));  // the second operand is what a NaN yields
  const auto n = V::round(V::mul(clamped, V::set1(1.44269504f)));
  auto r = V::fma(n, V::set1(-0.693359375f), clamped);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  auto p = V::set1(1.3981999507e-3f);
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(V::mul(p, r), r, V::add(r, V::set1(1.0f)));
  // Two factors, so that n = 127 and -126 stay in range.
  const auto half = V::round(V::mul(n, V::set1(0.5f)));
  const auto e = V::mul(V::mul(p, V::exp2_int(half)), V::exp2_int(V::sub(n, half)));
  return V::select_less(x, low, V::zero(), e);
}

// tanh through the exponential; |error| < 1e-6.
template <class V>
inline typename V::F tanh(typename V::F x) {
  const auto cut = V::min(V::set1(9.0f), V::max(V::set1(-9.0f), x));
  const auto e = exp<V>(V::add(cut, cut));
  return V::div(V::sub(e, V::set1(1.0f)), V::add(e, V::set1(1.0f)));
}

template <class V>
void quantise(const float* x, int n, int8_t* q, float* scale, int32_t* sum) {
  const int slabs = (n + kSlabCols - 1) / kSlabCols;
  float tail[kSlabCols];
  for (int s = 0; s < slabs; ++s) {
    const float* p = x + s * kSlabCols;
    if (n - s * kSlabCols < kSlabCols) {
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, p, sizeof(float) * (n - s * kSlabCols));
      p = tail;
    }
    const float amax = bits_to_float(V::abs_max_bits32(p));
    if (!(amax <= std::numeric_limits<float>::max())) {
      scale[s] = std::numeric_limits<float>::quiet_NaN();
      std::memset(q + s * kSlabCols, 0, kSlabCols);
      sum[2 * s] = sum[2 * s + 1] = 0;
      continue;
    }
    scale[s] = amax / 127.0f;
    V::quantise32(p, amax > 1e-30f ? 127.0f / amax : 0.0f, q + s * kSlabCols, sum + 2 * s);
  }
}

template <class V>
inline void rms_norm(const float* x, const float* weight, int n, float eps, float* out) {
  constexpr int L = V::kLanes;
  typename V::F acc[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int k = 0; k < 4; ++k) {
      const auto v = V::load(x + i + k * L);
      acc[k] = V::fma(v, v, acc[k]);
    }
  for (; i + L <= n; i += L) {
    const auto v = V::load(x + i);
    acc[0] = V::fma(v, v, acc[0]);
  }
  double sum = V::reduce_add(V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3])));
  for (; i < n; ++i) sum += double(x[i]) * x[i];
  const float factor = float(1.0 / std::sqrt(sum / n + eps));
  const auto f = V::set1(factor);
  for (i = 0; i + L <= n; i += L) V::store(out + i, V::mul(V::mul(V::load(x + i), f), V::load(weight + i)));
  for (; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

template <class V>
inline void layer_norm(const float* x, const float* weight, const float* bias, int n, float eps, float* out) {
  constexpr int L = V::kLanes;
  auto acc = V::zero();
  int i = 0;
  for (; i + L <= n; i += L) acc = V::add(acc, V::load(x + i));
  double sum = V::reduce_add(acc);
  for (; i < n; ++i) sum += x[i];
  const float mean = float(sum / n);
  const auto m = V::set1(mean);
  acc = V::zero();
  for (i = 0; i + L <= n; i += L) {
    const auto v = V::sub(V::load(x + i), m);
    acc = V::fma(v, v, acc);
  }
  double squares = V::reduce_add(acc);
  for (; i < n; ++i) squares += double(x[i] - mean) * (x[i] - mean);
  const float factor = float(1.0 / std::sqrt(squares / n + eps));
  const auto f = V::set1(factor);
  for (i = 0; i + L <= n; i += L) {
    auto v = V::mul(V::mul(V::sub(V::load(x + i), m), f), V::load(weight + i));
    if (bias) v = V::add(v, V::load(bias + i));
    V::store(out + i, v);
  }
  for (; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0.0f);
}

template <class V>
inline typename V::F apply(Activation act, typename V::F g) {
  const auto one = V::set1(1.0f);
  switch (act) {
    case Activation::silu: return V::div(g, V::add(one, exp<V>(V::sub(V::zero(), g))));
    case Activation::gelu_tanh: {
      const auto cube = V::mul(V::mul(g, g), g);
      const auto t = tanh<V>(V::mul(V::set1(0.7978845608f), V::fma(V::set1(0.044715f), cube, g)));
      return V::mul(V::mul(V::set1(0.5f), g), V::add(one, t));
    }
    case Activation::relu: return V::select_less(g, V::zero(), V::zero(), g);
    case Activation::relu2: return V::select_less(g, V::zero(), V::zero(), V::mul(g, g));
    case Activation::gelu: break;  // erf: the caller takes the scalar path
  }
  return g;
}

template <class V>
void activate(Activation act, const float* gate, const float* up, int n, float* z) {
  constexpr int L = V::kLanes;
  int i = 0;
  if (act != Activation::gelu)
    for (; i < n; i += L) {
      const int count = std::min(L, n - i);
      const bool whole = count == L;
      auto a = apply<V>(act, whole ? V::load(gate + i) : V::load_part(gate + i, count));
      if (up) a = V::mul(a, whole ? V::load(up + i) : V::load_part(up + i, count));
      if (whole) V::store(z + i, a);
      else V::store_part(z + i, a, count);
    }
  for (; i < n; ++i) {
    const float a = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.7071067812f));
    z[i] = up ? a * up[i] : a;
  }
}

template <class V>
void to_f16(const float* x, int n, uint16_t* out) {
  int i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store_f16(out + i, V::load(x + i));
  for (; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

}  // namespace simd
}  // namespace sr
