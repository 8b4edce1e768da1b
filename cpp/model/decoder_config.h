// The hyper-parameters of one decoder (config.json of models/format.md), checked.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/table.h"

namespace sr {

class PackedModel;

enum class NormKind : uint8_t { rms, layer };
enum class RopeStyle : uint8_t { none, interleaved, half };
enum class QkNorm : uint8_t { head, full };  // one head at a time, or all heads of q (of k) together

struct DecoderConfig {
  int n_layers = 0, n_embd = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, n_ff = 0, n_vocab = 0, n_ctx_train = 0;
  NormKind norm = NormKind::rms;
  float norm_eps = 1e-5f;
  Activation activation = Activation::silu;
  float activation_threshold = 0;  // act's input counts as 0 below it (FATReLU); 0 = off
  bool up_relu = false;            // up passes through a ReLU of its own (dReLU)
  bool ffn_gated = true;
  QkNorm qk_norm = QkNorm::head;
  RopeStyle rope_style = RopeStyle::none;
  int rope_dims = 0;
  double rope_theta = 10000, rope_theta_local = 10000;
  float rope_mscale = 1, rope_mscale_local = 1;
  int rope_long_context = 0;  // sessions with more room than this rotate by rope_factors_long; 0 = none do
  float attn_scale = 1;
  float attn_softcap = 0, logit_softcap = 0;
  float embedding_scale = 1, residual_scale = 1, logit_scale = 1;
  std::vector<int> window;        // [n_layers], 0 = all positions
  std::vector<bool> rope_layers;  // [n_layers]
  bool pre_norms = true;           // false: branches read the stream as it is (OLMo 2)
  bool parallel_block = false;
  bool tied_embeddings = false;

  int n_attn() const { return n_heads * head_dim; }               // length of the attention output
  int n_kv() const { return n_kv_heads * head_dim; }
  int n_qkv() const { return (n_heads + 2 * n_kv_heads) * head_dim; }
  int heads_per_kv() const { return n_heads / n_kv_heads; }
};

// Throws Error(model) naming file and key where a value is missing or impossible.
DecoderConfig read_decoder_config(const PackedModel& model);

}  // namespace sr
