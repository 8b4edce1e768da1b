// All tensors of one decoder, found by the names of models/format.md and checked against its configuration.
#pragma once

#include <vector>

#include "model/decoder_config.h"
#include "model/linear.h"
#include "model/neuron_rows.h"

namespace sr {

class PackedModel;

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  explicit operator bool() const { return weight != nullptr; }
};

struct LayerWeights {
  Norm attn_norm, ffn_norm;            // absent without pre_norms; a parallel block may have but one for both branches
  Norm post_attn_norm, post_ffn_norm;  // often absent
  Norm q_norm, k_norm;                 // often absent; over head_dim, or over all heads (QkNorm::full)
  Norm attn_sub_norm, ffn_sub_norm;    // before o and before down (BitNet), mostly absent
  Linear attn_qkv, attn_o;
  // What feeds the FFN's neurons, in one of two layouts; the other one is empty.
  Linear ffn_in;                       // gate_up interleaved in blocks of 64 rows when gated, else up
  NeuronRows ffn_rows;
  Linear ffn_down;
  std::vector<int> head_at;            // [n_heads + 2 n_kv_heads] where a head's rows begin in attn_qkv's output

  bool ffn_in_quantised() const { return ffn_rows ? ffn_rows.quantised() : ffn_in.quantised; }
  size_t ffn_bytes() const { return ffn_in.bytes + ffn_rows.bytes + ffn_down.bytes; }
};

struct DecoderWeights {
  Linear token_embd;
  Linear output;  // empty when tied
  Norm output_norm;
  const float* position_embd = nullptr;  // [n_positions, n_embd]
  int n_positions = 0;
  const float* rope_factors = nullptr;   // [rope_dims / 2]
  const float* rope_factors_local = nullptr;
  const float* rope_factors_long = nullptr;  // instead of both, see DecoderConfig::rope_long_context
  std::vector<LayerWeights> layers;
  size_t bytes_per_token = 0;            // what one decoded token reads

  bool any_neuron_rows() const {
    for (const LayerWeights& l : layers) {
      if (l.ffn_rows) return true;
    }
    return false;
  }
  const Linear& head() const { return output.empty() ? token_embd : output; }
};

// Shares of every matrix are set for `threads` threads.
DecoderWeights load_weights(const PackedModel& model, const DecoderConfig& config, int threads);

}  // namespace sr
