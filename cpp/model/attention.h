// Attention over the cache is cut into chunks at fixed positions; their softmax sums are merged in order. Decode and
// prefill, and any number of threads, therefore give the same bits.
#pragma once

#include "kernels/table.h"

namespace sr {

constexpr int kAttentionChunk = 128;  // positions; one chunk of one key head is decode's unit of work
static_assert(kAttentionChunk <= kChunkKeys && kAttentionChunk % kKeyBlock == 0, "a chunk is one call of attend");

// One query's share of the chunks seen so far: out is the sum of exp(s - max) v, not normalised.
struct AttentionSums {
  float* out;  // [head_dim]
  float max;
  float sum;
};

// Adds the next chunk (in ascending order of position) to `sums`; `first` says that sums is still empty.
void merge_chunk(AttentionSums* sums, bool first, const float* out, float max, float sum, int head_dim);

// out[d] = sums.out[d] / sums.sum.
void finish_attention(const AttentionSums& sums, int head_dim, float* out);

}  // namespace sr
