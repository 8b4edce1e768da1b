// What the configuration adds to the kernels: cuts before and after an activation, which norm, and its bias.
#include "model/row_ops.h"

#include <algorithm>

namespace sr {

void norm_row(const DecoderConfig& config, const Norm& norm, const float* x, int n, float* out) {
  const KernelTable& k = kernels();
  if (!norm) {
    if (out != x) std::copy(x, x + n, out);
    return;
  }
  if (config.norm == NormKind::layer) {
    k.layer_norm(x, norm.weight, norm.bias, n, config.norm_eps, out);
  } else {
    k.rms_norm(x, norm.weight, n, config.norm_eps, out);
    for (int i = 0; norm.bias && i < n; i++) out[i] += norm.bias[i];
  }
}

void activate_up(const DecoderConfig& config, float* up, int n) {
  if (!config.up_relu) return;
  for (int i = 0; i < n; i++) up[i] = up[i] < 0 ? 0 : up[i];
}

void activate(const DecoderConfig& config, float* gate, float* up, int n, float* z) {
  const float cut = config.activation_threshold;
  if (cut > 0) {
    for (int i = 0; i < n; i++) gate[i] = gate[i] < cut ? 0 : gate[i];
  }
  if (up) activate_up(config, up, n);
  kernels().activate(config.activation, gate, up, n, z);
}

}  // namespace sr
