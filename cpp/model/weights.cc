// Absent optional tensors stay null; a missing required one is named in the error.
#include "model/weights.h"

#include <string>

#include "format/packed_model.h"

namespace sr {
namespace {

Norm load_norm(const PackedModel& model, const std::string& name, int n, bool required) {
  Norm norm;
  norm.weight = model.vector(name, {n}, required);
  if (norm.weight) norm.bias = model.vector(name + ".bias", {n}, false);
  return norm;
}

LayerWeights load_layer(const PackedModel& model, const DecoderConfig& c, const std::string& at, int threads) {
  LayerWeights l;
  if (c.pre_norms) {
    l.attn_norm = load_norm(model, at + "attn_norm", c.n_embd, true);
    l.ffn_norm = load_norm(model, at + "ffn_norm", c.n_embd, !c.parallel_block);
  }
  l.post_attn_norm = load_norm(model, at + "post_attn_norm", c.n_embd, false);
  l.post_ffn_norm = load_norm(model, at + "post_ffn_norm", c.n_embd, false);
  const bool full = c.qk_norm == QkNorm::full;
  l.q_norm = load_norm(model, at + "q_norm", full ? c.n_attn() : c.head_dim, full);
  l.k_norm = load_norm(model, at + "k_norm", full ? c.n_kv() : c.head_dim, full);
  l.attn_sub_norm = load_norm(model, at + "attn_sub_norm", c.n_attn(), false);
  l.ffn_sub_norm = load_norm(model, at + "ffn_sub_norm", c.n_ff, false);

  l.attn_qkv = load_linear(model, at + "attn_qkv", c.n_qkv(), c.n_embd, c.head_dim);
  l.attn_o = load_linear(model, at + "attn_o", c.n_embd, c.n_attn(), kTileRows);
  const std::string ffn_in = at + (c.ffn_gated ? "ffn_gate_up" : "ffn_up");
  if (model.has_neurons(ffn_in)) {
    l.ffn_rows = load_neuron_rows(model, ffn_in, c.n_ff, c.n_embd, c.ffn_gated);
  } else {
    const int each = c.ffn_gated ? 2 : 1;
    l.ffn_in = load_linear(model, ffn_in, each * c.n_ff, c.n_embd, each * kTileRows);
    set_shares(&l.ffn_in, threads, each);
  }
  l.ffn_down = load_linear(model, at + "ffn_down", c.n_embd, c.n_ff, kTileRows);
  for (Linear* w : {&l.attn_qkv, &l.attn_o, &l.ffn_down}) {
    set_stretches(w, stretches_that_pay(w->rows, w->cols));
    set_shares(w, threads, 1);
  }
  for (int h = 0; h < c.n_heads + 2 * c.n_kv_heads; h++) {
    l.head_at.push_back(l.attn_qkv.output_index(h * c.head_dim));
    // A norm over all heads needs them side by side.
    const bool first = h == 0 || h == c.n_heads || h == c.n_heads + c.n_kv_heads;
    if (full && !first && l.head_at[size_t(h)] != l.head_at[size_t(h) - 1] + c.head_dim) {
      model.weights().damaged(at + "attn_qkv has a part that ends within q or k, which qk_norm \"full\" forbids");
    }
  }
  return l;
}

}  // namespace

DecoderWeights load_weights(const PackedModel& model, const DecoderConfig& c, int threads) {
  DecoderWeights w;
  w.token_embd = load_linear(model, "token_embd", c.n_vocab, c.n_embd, kTileRows);
  if (!c.tied_embeddings) w.output = load_linear(model, "output", c.n_vocab, c.n_embd, kTileRows);
  set_shares(w.output.empty() ? &w.token_embd : &w.output, threads, 1);
  w.output_norm = load_norm(model, "output_norm", c.n_embd, true);

  if (const TensorView* t = model.weights().find("position_embd")) {
    if (t->shape.size() != 2 || t->shape[0] < 1 || t->shape[0] > (1 << 26)) {
      model.weights().damaged("position_embd has an impossible shape");
    }
    w.n_positions = int(t->shape[0]);
    w.position_embd = model.vector("position_embd", {t->shape[0], c.n_embd}, true);
  }
  if (c.rope_style != RopeStyle::none) {
    w.rope_factors = model.vector("rope_factors", {c.rope_dims / 2}, false);
    w.rope_factors_local = model.vector("rope_factors_local", {c.rope_dims / 2}, false);
    if (c.rope_long_context) w.rope_factors_long = model.vector("rope_factors_long", {c.rope_dims / 2}, true);
  }
  for (int i = 0; i < c.n_layers; i++) {
    w.layers.push_back(load_layer(model, c, "layers." + std::to_string(i) + ".", threads));
  }

  // Everything but the embedding rows, of which a token reads one, and the same of the learned positions.
  w.bytes_per_token = model.tensor_bytes();
  if (!w.output.empty()) w.bytes_per_token -= w.token_embd.bytes - w.token_embd.bytes / size_t(c.n_vocab);
  if (w.position_embd) w.bytes_per_token -= size_t(w.n_positions - 1) * size_t(c.n_embd) * sizeof(float);
  return w;
}

}  // namespace sr
