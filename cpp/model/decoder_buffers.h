// The working memory of a decoder: what belongs to one thread, and what a block of prompt tokens needs.
#pragma once

#include <array>
#include <atomic>

#include "model/decoder.h"

namespace sr {

// Every thread keeps its own copy of the residual stream in decode, so that norms need no barrier of their own.
struct Decoder::Thread {
  AlignedBuffer<float> x;        // [n_embd]
  AlignedBuffer<float> scratch;  // [n_embd]
  AlignedBuffer<float> sum;      // [padded rows of q, k and v or of n_embd]: where products come in partial sums
  InputBuffer in;                // 1 row of n_embd: what attention, FFN or head multiply
  InputBuffer att;               // 1 row of n_attn: what attn_o multiplies
  AlignedBuffer<float> q;        // [heads_per_kv, at most kMaxQueries; head_dim]
  AlignedBuffer<float> k;        // [head_dim]
  AlignedBuffer<float> qk;       // [n_attn + n_kv]: q and k after a norm over all heads; empty where there is none
  InputBuffer z;                 // 1 row of n_ff: what down multiplies after a norm of its own; else empty
  AlignedBuffer<uint16_t> half;  // [head_dim]
  std::vector<float> kept_share; // [n_layers] share of this thread's neurons that the last token kept
  AlignedBuffer<char> attend_scratch;
  // Prefill only; pages that decode never touches.
  AlignedBuffer<float> tile;     // [kMaxBlock, 2 tiles]: gate and up of one pair
  AlignedBuffer<float> sums;     // [2, kMaxQueries, head_dim]
  AlignedBuffer<char> gemm_scratch;
};

// One thread's survivors where gates choose the neurons that are read.
struct Decoder::ByGate {
  AlignedBuffer<int32_t> ids;      // [n_ff] as they were found
  AlignedBuffer<int32_t> ordered;  // [n_ff] those in memory before the others
  AlignedBuffer<int32_t> slots;    // [n_ff] of `ordered`
  AlignedBuffer<float> up;         // [n_ff] in the order of `ordered`
};

// What predictors work on. Of a decoded token: shared by the threads but for x and h.
struct Decoder::Prediction {
  int rank = 0;                       // the largest
  AlignedBuffer<float> hidden, head_hidden;  // [rank]
  AlignedBuffer<float> scores, head_scores;  // [n_ff], [n_heads]
  AlignedBuffer<int32_t> ids;         // [n_ff] predicted neurons of each thread's range, from its beginning on
  std::vector<int> count;             // [threads] how many
  AlignedBuffer<uint8_t> heads;       // [2, n_heads] flags; a layer's are at its number's parity
  std::vector<InputBuffer> x, h;      // [threads] one row of n_embd, of rank
  struct OfBlock {
    InputBuffer x, h;                 // kMaxBlock rows of n_embd, of rank
    AlignedBuffer<float> scores;      // [kMaxBlock, n_ff or n_heads, the larger]
    AlignedBuffer<uint8_t> neurons;   // [kMaxBlock, n_ff] flags
    AlignedBuffer<uint8_t> heads;     // [2, kMaxBlock, n_heads]
  };
  std::unique_ptr<OfBlock> block;
};

struct Decoder::Block {
  struct Counts {
    std::atomic<int> in_set{0}, kept{0};
  };
  std::array<Counts, kMaxBlock> neurons;  // of a row: those that others have chosen, and those of them that are kept
  AlignedBuffer<float> x;         // [kMaxBlock, n_embd] residual stream
  InputBuffer in, att, z;         // rows of n_embd, n_attn, n_ff
  AlignedBuffer<float> qkv;       // [kMaxBlock, padded rows of attn_qkv]
  AlignedBuffer<float> branch_o, branch_down;  // [kMaxBlock, padded n_embd]
  AlignedBuffer<float> rope_table, rope_table_local;
  size_t ld_qkv = 0, ld_branch = 0;
};

}  // namespace sr
