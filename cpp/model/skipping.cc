// Where thresholds meet the forward pass: which inputs of a matrix are kept, and what that saves.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {
namespace {

// Above this share of kept columns exact skipping of zeros does not pay.
constexpr float kExactBreakEven = 0.85f;

}  // namespace

int Decoder::site_width(Site site) const {
  switch (site) {
    case Site::O: return config_.n_attn();
    case Site::Z: return config_.n_ff;
    default: return config_.n_embd;
  }
}

const Linear& Decoder::matrix_of(int layer, Site site) const {
  const LayerWeights& w = weights_.layers[size_t(layer)];
  switch (site) {
    case Site::A: return w.attn_qkv;
    case Site::O: return w.attn_o;
    case Site::M: return w.ffn_in;
    default: return w.ffn_down;
  }
}

bool Decoder::site_quantised(int layer, Site site) const {
  const Linear& w = matrix_of(layer, site);
  return w.quantised && !w.floating;
}

const float* Decoder::threshold_for(const Pass& pass, int layer, Site site, int pos, bool decode) const {
  const SparsityPlan* plan = pass.skipping.plan;
  if (plan && (decode || pass.skipping.mask_blocks) && pos >= plan->dense_tokens()) {
    if (const float* t = plan->threshold(layer, site)) return t;
  }
  if (decode && site == Site::Z && no_threshold_.size() && site_quantised(layer, site)) return no_threshold_.data();
  return nullptr;
}

void Decoder::count_kept(const Pass& pass, int layer, Site site, int kept) const {
  SiteCounts* counts = pass.skipping.counts;
  if (!counts) return;
  const Linear& w = matrix_of(layer, site);
  const int width = w.cols;
  counts->kept[size_t(site)].fetch_add(kept, std::memory_order_relaxed);
  counts->offered[size_t(site)].fetch_add(width, std::memory_order_relaxed);
  const float limit = pass.skipping.plan ? pass.skipping.plan->break_even() : kExactBreakEven;
  size_t read = w.bytes;
  if (float(kept) <= limit * float(width)) {
    read = 0;
    for (const PanelMatrix& m : w.parts) {
      const size_t heads = size_t(m.slabs()) * m.slab_head_bytes(m.padded_rows());
      read += heads + size_t(double(m.total_bytes() - heads) * kept / width);
    }
  }
  counts->bytes_read.fetch_add(int64_t(read), std::memory_order_relaxed);
  counts->bytes_held.fetch_add(int64_t(w.bytes), std::memory_order_relaxed);
}

Input Decoder::masked(const Pass& pass, int tid, int layer, Site site, InputBuffer* in, bool selected) const {
  Input x = in->input();
  const float* threshold = threshold_for(pass, layer, site, pass.pos, true);
  if (!threshold) return x;
  if (!selected) in->select(0, threshold, 0, in->width());
  const int kept = in->kept(0);
  if (tid == 0) count_kept(pass, layer, site, kept);
  const float limit = threshold == no_threshold_.data() || !pass.skipping.plan ? kExactBreakEven
                                                                              : pass.skipping.plan->break_even();
  if (float(kept) <= limit * float(in->width())) x.active = in->active(0);
  return x;
}

void Decoder::mask_row(const Pass& pass, int layer, Site site, int row, InputBuffer* in) const {
  tap(pass, site, row, *in);
  const float* threshold = threshold_for(pass, layer, site, pass.pos + row, false);
  if (!threshold) return;
  in->select(row, threshold, 0, in->width());
  count_kept(pass, layer, site, in->kept(row));
}

void Decoder::tap(const Pass& pass, Site site, int row, const InputBuffer& in) const {
  if (!pass.one || !pass.one->taps[size_t(site)]) return;
  const size_t width = size_t(in.width());
  std::memcpy(pass.one->taps[size_t(site)] + size_t(row) * width, in.input(row).x, width * sizeof(float));
}

void Decoder::embed(const int32_t* tokens, int n, int pos, float* out) const {
  for (int i = 0; i < n; i++) embed_row(tokens[i], pos + i, out + size_t(i) * config_.n_embd);
}

void Decoder::run_layer(const LayerRun& run, int n, int pos, KvCache* cache, const Skipping& skipping) {
  std::lock_guard<FairMutex> lock(turn_);
  leave_ = false;
  counter_[0].reset();
  counter_[1].reset();
  const std::function<bool()> never = [] { return false; };
  Pass pass = {nullptr, n, pos, cache, Logits::all, nullptr, &never, skipping};
  pass.one = &run;
  pool_.run([&](int tid) { prefill(tid, pass); });
}

}  // namespace sr
