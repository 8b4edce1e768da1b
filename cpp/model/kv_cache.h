// Keys and values of one session in fp16, in the layout that the attention kernel reads (kernels/table.h, AttendArgs).
#pragma once

#include <cstdint>

#include "base/aligned_buffer.h"

namespace sr {

// Room for n_ctx positions is reserved as address space; memory is used only as positions are written.
class KvCache {
 public:
  // Throws Error(budget) naming the size when there is no room.
  KvCache(int n_layers, int n_kv_heads, int head_dim, int n_ctx);

  int n_ctx() const { return n_ctx_; }
  // [n_ctx / 16, head_dim, 16] and [n_ctx, head_dim] of one head.
  const uint16_t* k(int layer, int head) const { return k_.data() + offset(layer, head); }
  const uint16_t* v(int layer, int head) const { return v_.data() + offset(layer, head); }

  // Stores the key (already rotated) and the value of one position. scratch: head_dim entries.
  void write(int layer, int head, int pos, const float* k, const float* v, uint16_t* scratch);

  // Overwrites positions [begin, end) with zeros: after an overflow, so that nothing that is not finite stays behind.
  void erase(int begin, int end);

  // Bytes that n positions take.
  size_t bytes(int n) const;
  // Gives the memory back to the system, where it can take it; positions must be written again before they are read.
  void clear();

 private:
  size_t offset(int layer, int head) const { return (size_t(layer) * n_kv_heads_ + head) * head_stride_; }

  int n_layers_, n_kv_heads_, head_dim_, n_ctx_;
  size_t head_stride_;  // entries of one head: whole key blocks
  AlignedBuffer<uint16_t> k_, v_;
};

}  // namespace sr
