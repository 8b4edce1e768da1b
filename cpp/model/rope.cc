// Angles are computed in double: at position 10^5 a float angle would be wrong in the third digit.
#include "model/rope.h"

#include <cmath>

namespace sr {

Rope::Rope(RopeStyle style, int dims, double theta, const float* factors, float mscale)
    : style_(style), dims_(style == RopeStyle::none ? 0 : dims), mscale_(mscale) {
  for (int i = 0; i < dims_ / 2; i++) {
    frequency_.push_back(std::pow(theta, -2.0 * i / dims_) / (factors ? double(factors[i]) : 1.0));
  }
}

void Rope::fill(int pos, float* table) const {
  const int half = dims_ / 2;
  for (int i = 0; i < half; i++) {
    const double angle = pos * frequency_[size_t(i)];
    table[i] = float(std::cos(angle)) * mscale_;
    table[half + i] = float(std::sin(angle)) * mscale_;
  }
}

void Rope::apply(const float* table, float* head) const {
  const int half = dims_ / 2;
  const float *cosine = table, *sine = table + half;
  if (style_ == RopeStyle::half) {
    for (int i = 0; i < half; i++) {
      const float a = head[i], b = head[i + half];
      head[i] = a * cosine[i] - b * sine[i];
      head[i + half] = a * sine[i] + b * cosine[i];
    }
  } else {
    for (int i = 0; i < half; i++) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * cosine[i] - b * sine[i];
      head[2 * i + 1] = a * sine[i] + b * cosine[i];
    }
  }
}

}  // namespace sr
