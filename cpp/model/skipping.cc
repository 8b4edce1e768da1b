// Where thresholds meet the forward pass: which inputs of a matrix are kept, and what that saves.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include "model/decoder.h"
#include "model/decoder_buffers.h"
#include "sparse_run/error.h"

namespace sr {

int Decoder::site_width(Site site) const {
  switch (site) {
    case Site::O: return config_.n_attn();
    case Site::Z:
    case Site::G:
    case Site::N: return config_.n_ff;
    default: return config_.n_embd;
  }
}

const Linear& Decoder::matrix_of(int layer, Site site) const {
  switch (site) {
    case Site::A: return attention_weights(layer).attn_qkv;
    case Site::O: return attention_weights(layer).attn_o;
    case Site::M: return ffn_weights(layer).ffn_in;
    default: return ffn_weights(layer).ffn_down;
  }
}

bool Decoder::site_quantised(int layer, Site site) const {
  const Linear& w = matrix_of(layer, site);
  return w.quantised && !w.floating;
}

std::string Decoder::site_refusal(int layer, Site site) const {
  const bool by_neuron = bool(weights_.layers[size_t(layer)].ffn_rows);
  if (site == Site::M && by_neuron) {
    return "needs gate and up by columns, this model has them by neuron: convert it again with "
           "sparse-run convert --layout panels";
  }
  if (site == Site::G && !config_.ffn_gated) return "needs a gate, which this model's FFN does not have: use site Z";
  if ((site == Site::G || site == Site::N) && !by_neuron) {
    return "needs gate and up by neuron, this model has them by columns: convert it again with "
           "sparse-run convert --layout neurons";
  }
  if (site != Site::G && site != Site::N && !site_quantised(layer, site)) {
    return "has weights in float, which are not skipped: convert the model with fewer bits (sparse-run convert --bits)";
  }
  return "";
}

Thresholds Decoder::threshold_for(const Pass& pass, int layer, Site site, int pos, bool decode) const {
  const SparsityPlan* plan = pass.skipping.plan;
  const bool planned = plan && (decode || pass.skipping.mask_blocks) && pos >= plan->dense_tokens();
  if (planned) {
    if (const Thresholds t = plan->threshold(layer, site)) return t;
  }
  // Neurons that were left out, or are exactly 0, need no column of down; after a sub-norm they are 0 still.
  if (!site_quantised(layer, site)) return {};
  if (site == Site::O && head_predictor(pass, layer, pos, decode)) return kNotZero;
  const bool predicted = !pass.skipping.measure && neuron_predictor(pass, layer, pos, decode);
  const bool zeros = (decode && skips_zeros(pass)) || chosen(pass, layer, decode) || predicted ||
                     (planned && plan->threshold(layer, Site::G).at);
  if (site == Site::Z && zeros) return kNotZero;
  return {};
}

const NeuronSet* Decoder::chosen(const Pass& pass, int layer, bool decode) const {
  const Skipping& s = pass.skipping;
  return s.neurons && (decode || s.mask_neurons) ? s.neurons->of(layer) : nullptr;
}

float Decoder::break_even(const Pass& pass, int layer, Site site) const {
  const SparsityPlan* plan = pass.skipping.plan;
  if (site != Site::N && plan && plan->break_even(site) != SparsityPlan::kByShape) return plan->break_even(site);
  return break_even(layer, site);
}

float Decoder::break_even(int layer, Site site) const {
  if (site != Site::G && site != Site::N) return break_even_[size_t(layer) * 4 + size_t(site)];
  const float measured = rows_break_even_[site == Site::G];
  return measured >= 0 ? measured : break_even_by_row(ffn_weights(layer).ffn_rows, site == Site::G);
}

float Decoder::break_even(Site site) const {
  float least = 1;
  for (int l = 0; l < config_.n_layers; l++) least = std::min(least, break_even(l, site));
  return least;
}

void Decoder::count_held(const Pass& pass, int pos, bool decode, size_t bytes) const {
  SiteCounts* counts = pass.skipping.counts;
  const SparsityPlan* plan = pass.skipping.plan;
  const bool planned = plan && (decode || pass.skipping.mask_blocks) && pos >= plan->dense_tokens();
  const bool chosen = (pass.skipping.neurons && (decode || pass.skipping.mask_neurons)) ||
                      (predicting(pass, pos, decode) && !pass.skipping.measure);
  if (!counts || !(planned || chosen || (decode && skips_zeros(pass)))) return;
  counts->bytes_held.fetch_add(int64_t(bytes), std::memory_order_relaxed);
  counts->bytes_read.fetch_add(int64_t(bytes), std::memory_order_relaxed);
}

void Decoder::count_kept(const Pass& pass, int layer, Site site, int kept) const {
  SiteCounts* counts = pass.skipping.counts;
  if (!counts) return;
  const Linear& w = matrix_of(layer, site);
  const int width = w.cols;
  counts->kept[size_t(site)].fetch_add(kept, std::memory_order_relaxed);
  counts->offered[size_t(site)].fetch_add(width, std::memory_order_relaxed);
  if (float(kept) > break_even(pass, layer, site) * float(width)) return;
  size_t saved = 0;
  for (const PanelMatrix& m : w.parts) {
    const size_t heads = m.heads_bytes(m.padded_rows());
    saved += size_t(double(m.total_bytes() - heads) * (width - kept) / width);
  }
  counts->bytes_read.fetch_sub(int64_t(saved), std::memory_order_relaxed);
}

void Decoder::count_neurons(const Pass& pass, Site site, const NeuronRows& w, int kept, int offered, int rows) const {
  SiteCounts* counts = pass.skipping.counts;
  if (!counts) return;
  counts->kept[size_t(site)].fetch_add(kept, std::memory_order_relaxed);
  counts->offered[size_t(site)].fetch_add(offered, std::memory_order_relaxed);
  const int64_t saved = int64_t(offered - kept) * rows * int64_t(w.m.row_bytes());
  counts->bytes_read.fetch_sub(saved, std::memory_order_relaxed);
}

void Decoder::count_row_neurons(const Pass& pass, int layer, int row) const {
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  if (!w || pass.skipping.measure || !pass.skipping.counts) return;
  const bool gated = config_.ffn_gated, listed = neurons_kept(pass, layer, row) != nullptr;
  const bool chosen = gated && threshold_for(pass, layer, Site::G, pass.pos + row, false);
  const Block::Counts& counts = block_->neurons[size_t(row)];
  const int offered = config_.n_ff, in_set = counts.in_set, kept = counts.kept;
  const bool apart = chosen && float(kept) <= break_even(pass, layer, Site::G) * float(in_set);
  const bool all = float(in_set) > break_even(pass, layer, Site::N) * float(offered);
  if (listed) count_neurons(pass, Site::N, w, in_set, offered, all ? (apart ? 1 : 0) : gated ? 2 : 1);
  if (chosen) count_neurons(pass, Site::G, w, kept, in_set, apart ? 1 : 0);
}

Input Decoder::masked(const Pass& pass, int tid, int layer, Site site, InputBuffer* in, bool selected) const {
  Input x = in->input();
  const Thresholds threshold = threshold_for(pass, layer, site, pass.pos, true);
  if (!threshold) return x;
  if (!selected) in->select(0, threshold, 0, in->width());
  const int kept = in->kept(0);
  if (tid == 0) count_kept(pass, layer, site, kept);
  if (float(kept) <= break_even(pass, layer, site) * float(in->width())) x.active = in->active(0);
  return x;
}

void Decoder::mask_row(const Pass& pass, int layer, Site site, int row, InputBuffer* in) const {
  tap(pass, site, row, *in);
  const Thresholds threshold = threshold_for(pass, layer, site, pass.pos + row, false);
  if (!threshold) return;
  in->select(row, threshold, 0, in->width());
  count_kept(pass, layer, site, in->kept(row));
}

void Decoder::tap(const Pass& pass, Site site, int row, const InputBuffer& in) const {
  if (!pass.one || !pass.one->taps[size_t(site)]) return;
  const size_t width = size_t(in.width());
  std::memcpy(pass.one->taps[size_t(site)] + size_t(row) * width, in.input(row).x, width * sizeof(float));
}

void Decoder::tap_neurons(const Pass& pass, int tap, int row, int begin, int count, const float* values) const {
  if (!pass.one || !pass.one->taps[tap]) return;
  std::copy_n(values, count, pass.one->taps[tap] + size_t(row) * size_t(config_.n_ff) + begin);
}

void Decoder::embed(const int32_t* tokens, int n, int pos, float* out) {
  if (!fetches_rows()) {
    for (int i = 0; i < n; i++) embed_row(tokens[i], pos + i, out + size_t(i) * config_.n_embd);
    return;
  }
  std::lock_guard<FairMutex> lock(turn_);
  const std::string error = flash_->fetch_rows(tokens, n, [] { return false; }, out);
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
  for (int i = 0; i < n; i++) finish_embedding(pos + i, out + size_t(i) * config_.n_embd);
}

void Decoder::run_layer(const LayerRun& run, int n, int pos, KvCache* cache, const Skipping& skipping) {
  std::lock_guard<FairMutex> lock(turn_);
  leave_ = false;
  counter_[0].reset();
  counter_[1].reset();
  const std::function<bool()> never = [] { return false; };
  Pass pass = {nullptr, n, pos, cache, Logits::all, nullptr, &never, skipping};
  pass.one = &run;
  run_pass(pass);
}

}  // namespace sr
