// Keys and values of one session in fp16, in the layout that the attention kernel reads (kernels/table.h, AttendArgs).
#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"

namespace sr {

// Bytes that n positions take: whole segments.
size_t kv_cache_bytes(int n_layers, int n_kv_heads, int head_dim, int n);

// Positions are kept in segments of kAttentionChunk, each with all layers and heads side by side. A growing context
// takes contiguous memory, so that huge pages waste next to nothing; they make attention a tenth faster at 300 and at
// 2000 positions. Room for n_ctx positions is reserved as address space; memory is used as segments are written.
class KvCache {
 public:
  // Throws Error(budget) naming the size when there is no room.
  KvCache(int n_layers, int n_kv_heads, int head_dim, int n_ctx);

  int n_ctx() const { return n_ctx_; }
  // One head's keys [kAttentionChunk / 16, head_dim, 16] and values [kAttentionChunk, head_dim] of a segment.
  const uint16_t* k(int layer, int head, int segment) const { return data_.data() + offset(layer, head, segment); }
  const uint16_t* v(int layer, int head, int segment) const { return k(layer, head, segment) + head_entries_; }

  // Stores the key (already rotated) and the value of one position. scratch: head_dim entries.
  void write(int layer, int head, int pos, const float* k, const float* v, uint16_t* scratch);

  // Overwrites positions [begin, end) with zeros: after an overflow, so that nothing that is not finite stays behind.
  void erase(int begin, int end);

  size_t bytes(int n) const { return kv_cache_bytes(n_layers_, n_kv_heads_, head_dim_, n); }
  // Gives the memory of what follows the first n positions back to the system, where it can take it; those positions
  // must be written again before they are read.
  void keep(int n);

 private:
  size_t offset(int layer, int head, int segment) const {
    return 2 * head_entries_ * ((size_t(segment) * n_layers_ + layer) * n_kv_heads_ + head);
  }

  int n_layers_, n_kv_heads_, head_dim_, n_ctx_;
  size_t head_entries_;  // of one head's keys in one segment, and of its values
  AlignedBuffer<uint16_t> data_;
};

}  // namespace sr
