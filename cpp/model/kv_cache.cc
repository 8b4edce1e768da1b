// A segment of one head, keys then values, is what one call of attend reads.
#include "model/kv_cache.h"

#include <algorithm>
#include <cstdio>

#include "kernels/table.h"
#include "model/attention.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

size_t segments(int n) { return (size_t(n) + kAttentionChunk - 1) / kAttentionChunk; }

// Entries of all keys and values, checked against what an address space can hold.
size_t checked_entries(int n_layers, int n_kv_heads, int head_dim, int n_ctx) {
  const double bytes = 4.0 * n_layers * n_kv_heads * head_dim * double(segments(n_ctx) * kAttentionChunk);
  if (bytes > double(size_t(1) << 45)) {
    char text[160];
    std::snprintf(text, sizeof text, "not enough memory for a context of %d tokens (%.1f GB): use a smaller context",
                  n_ctx, bytes / 1e9);
    throw Error(ErrorCode::budget, text);
  }
  return size_t(bytes) / sizeof(uint16_t);
}

}  // namespace

KvCache::KvCache(int n_layers, int n_kv_heads, int head_dim, int n_ctx)
    : n_layers_(n_layers), n_kv_heads_(n_kv_heads), head_dim_(head_dim), n_ctx_(n_ctx),
      head_entries_(size_t(kAttentionChunk) * head_dim) {
  data_.reset(checked_entries(n_layers, n_kv_heads, head_dim, n_ctx), "the cached keys and values");
  prefer_huge_pages(data_.data(), data_.size() * sizeof(uint16_t));
}

void KvCache::write(int layer, int head, int pos, const float* k, const float* v, uint16_t* scratch) {
  const KernelTable& table = kernels();
  table.to_f16(k, head_dim_, scratch);
  uint16_t* keys = data_.data() + offset(layer, head, pos / kAttentionChunk);
  const int at = pos % kAttentionChunk;
  uint16_t* block = keys + size_t(at / kKeyBlock) * head_dim_ * kKeyBlock + at % kKeyBlock;
  for (int d = 0; d < head_dim_; d++) block[size_t(d) * kKeyBlock] = scratch[d];
  table.to_f16(v, head_dim_, keys + head_entries_ + size_t(at) * head_dim_);
}

void KvCache::erase(int begin, int end) {
  const AlignedBuffer<float> zero(size_t(head_dim_), "the cached keys");
  AlignedBuffer<uint16_t> scratch(size_t(head_dim_), "the cached keys");
  for (int l = 0; l < n_layers_; l++) {
    for (int h = 0; h < n_kv_heads_; h++) {
      for (int pos = begin; pos < end; pos++) write(l, h, pos, zero.data(), zero.data(), scratch.data());
    }
  }
}

size_t kv_cache_bytes(int n_layers, int n_kv_heads, int head_dim, int n) {
  return segments(n) * 4 * size_t(n_layers) * size_t(n_kv_heads) * kAttentionChunk * size_t(head_dim);
}

void KvCache::keep(int n) {
  const size_t all = data_.size() * sizeof(uint16_t), kept = std::min(bytes(n), all);
  discard_pages(reinterpret_cast<uint8_t*>(data_.data()) + kept, all - kept);
}

}  // namespace sr
