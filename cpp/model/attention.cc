// The arithmetic that every path shares.
#include "model/attention.h"

#include <cmath>

namespace sr {

void merge_chunk(AttentionSums* sums, bool first, const float* out, float max, float sum, int head_dim) {
  if (first) {
    for (int d = 0; d < head_dim; d++) sums->out[d] = out[d];
    sums->max = max;
    sums->sum = sum;
    return;
  }
  const float top = max > sums->max ? max : sums->max;
  const float old_factor = std::exp(sums->max - top), new_factor = std::exp(max - top);
  for (int d = 0; d < head_dim; d++) sums->out[d] = sums->out[d] * old_factor + out[d] * new_factor;
  sums->sum = sums->sum * old_factor + sum * new_factor;
  sums->max = top;
}

void finish_attention(const AttentionSums& sums, int head_dim, float* out) {
  const float factor = 1.0f / sums.sum;
  for (int d = 0; d < head_dim; d++) out[d] = sums.out[d] * factor;
}

}  // namespace sr
