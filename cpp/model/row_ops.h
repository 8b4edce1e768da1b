// Operations on one row of activations that depend on nothing but the model's configuration.
#pragma once

#include <cmath>

#include "model/weights.h"

namespace sr {

// Whether the activation makes neurons exactly 0.
inline bool has_true_zeros(const DecoderConfig& c) {
  return c.activation == Activation::relu || c.activation == Activation::relu2 || c.activation_threshold > 0 ||
         c.up_relu;
}

// Whether a neuron is kept: |g| above its threshold. What is not a number is kept, not hidden.
inline bool survives(float g, float threshold) { return !(std::fabs(g) <= threshold); }

// x and out may be the same; without a norm, x is copied.
void norm_row(const DecoderConfig& config, const Norm& norm, const float* x, int n, float* out);
// What multiplies act(gate), in place.
void activate_up(const DecoderConfig& config, float* up, int n);
// z = act(gate) * up, or act(gate) where up is null. Changes gate and up where the activation is more than a kernel's.
void activate(const DecoderConfig& config, float* gate, float* up, int n, float* z);

}  // namespace sr
