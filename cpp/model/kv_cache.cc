// Each (layer, head) owns a contiguous stretch, so that attention streams and a growing context touches few pages.
#include "model/kv_cache.h"

#include <cstdio>

#include "kernels/table.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

size_t whole_blocks(int n) { return (size_t(n) + kKeyBlock - 1) / kKeyBlock * kKeyBlock; }

// Entries of the keys (and as many of the values), checked against what an address space can hold.
size_t checked_entries(int n_layers, int n_kv_heads, int head_dim, int n_ctx) {
  const double bytes = 4.0 * n_layers * n_kv_heads * head_dim * double(whole_blocks(n_ctx));
  if (bytes > double(size_t(1) << 45)) {
    char text[160];
    std::snprintf(text, sizeof text, "not enough memory for a context of %d tokens (%.1f GB): use a smaller context",
                  n_ctx, bytes / 1e9);
    throw Error(ErrorCode::budget, text);
  }
  return size_t(n_layers) * n_kv_heads * head_dim * whole_blocks(n_ctx);
}

}  // namespace

KvCache::KvCache(int n_layers, int n_kv_heads, int head_dim, int n_ctx)
    : n_layers_(n_layers), n_kv_heads_(n_kv_heads), head_dim_(head_dim), n_ctx_(n_ctx),
      head_stride_(whole_blocks(n_ctx) * head_dim) {
  const size_t entries = checked_entries(n_layers, n_kv_heads, head_dim, n_ctx);
  k_.reset(entries, "the cached keys");
  v_.reset(entries, "the cached values");
}

void KvCache::write(int layer, int head, int pos, const float* k, const float* v, uint16_t* scratch) {
  const KernelTable& table = kernels();
  table.to_f16(k, head_dim_, scratch);
  uint16_t* block = k_.data() + offset(layer, head) + size_t(pos / kKeyBlock) * head_dim_ * kKeyBlock + pos % kKeyBlock;
  for (int d = 0; d < head_dim_; d++) block[size_t(d) * kKeyBlock] = scratch[d];
  table.to_f16(v, head_dim_, v_.data() + offset(layer, head) + size_t(pos) * head_dim_);
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

size_t KvCache::bytes(int n) const { return size_t(4) * n_layers_ * n_kv_heads_ * head_dim_ * whole_blocks(n); }

void KvCache::clear() {
  discard_pages(k_.data(), k_.size() * sizeof(uint16_t));
  discard_pages(v_.data(), v_.size() * sizeof(uint16_t));
}

}  // namespace sr
