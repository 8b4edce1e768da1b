// Decoding from the store of single neurons. What a layer needs is known when the layer before it is computed (fixed
// sets, and layers of which all neurons are needed), or after its attention (predictors, which run beside it), and is
// read meanwhile; where gates choose, as soon as a slice of their rows is multiplied.
#include <algorithm>

#include "model/decoder.h"
#include "model/decoder_buffers.h"
#include "model/row_ops.h"

namespace sr {

NeuronStore* Decoder::make_store(const PackedModel& model, std::shared_ptr<ByteSource> source, bool by_gate) {
  store_ = std::make_unique<NeuronStore>(model, weights_, std::move(source), by_gate);
  const size_t n = size_t(config_.n_ff);
  for (int t = 0; by_gate && t < pool_.size(); t++) {
    by_gate_.push_back(std::make_unique<ByGate>());
    ByGate& b = *by_gate_.back();
    for (auto* list : {&b.ids, &b.ordered, &b.slots}) list->reset(n, "the neurons that a token needs");
    b.up.reset(n, "the neurons that a token needs");
  }
  wanted_.reset(n, "the neurons that a token needs");
  slots_.reset(n, "the neurons that a token needs");
  there_first_.reset(n, "the neurons that a token needs");
  place_.reset(n, "the neurons that a token needs");
  return store_.get();
}

void Decoder::drop_store() {
  store_.reset();
  by_gate_.clear();
}

void Decoder::open_store(int slots, int more, int64_t gate_blocks, int readers, size_t unit,
                         const LoadProgress& progress) {
  if (store_->gates()) store_->gates()->open(gate_blocks, pool_.size(), flash_->queue(), progress);
  store_->open(slots, more, readers, unit, progress);
}

// One token of which something says which neurons it needs. Where attention has had to leave memory too, the stream
// that brings it brings the FFNs as well.
bool Decoder::works_from_store(const Pass& pass) const {
  if (!store_ || pass.n != 1 || pass.one || !flash_->holds_all_but_ffn()) return false;
  const bool listed = pass.skipping.neurons || predicting(pass, pass.pos, true);
  if (!store_->gates()) return listed;
  return !listed && chooses_by_gate(pass);
}

// Whether gates leave neurons out, and so many that reading the others one by one costs less than reading the FFNs.
bool Decoder::chooses_by_gate(const Pass& pass) const {
  const SparsityPlan* plan = pass.skipping.plan;
  bool chooses = skips_zeros(pass);
  for (int l = 0; !chooses && plan && config_.ffn_gated && pass.pos >= plan->dense_tokens() && l < config_.n_layers;
       l++) {
    chooses = bool(plan->threshold(l, Site::G));
  }
  if (!chooses) return false;
  double kept = 0;
  for (const auto& t : thread_) {
    for (float share : t->kept_share) kept += double(share);
  }
  kept /= double(thread_.size()) * double(config_.n_layers);
  size_t whole = 0;
  for (const LayerWeights& l : weights_.layers) whole += l.ffn_bytes();
  return store_->token_cost(kept) < whole;
}

void Decoder::request_neurons(const Pass& pass, int layer, Ask ask) {
  if (store_->gates()) {
    if (ask == Ask::predicted) store_->pool().begin_layer(layer);
    return;
  }
  const bool predicted = neuron_predictor(pass, layer, pass.pos, true) != nullptr;
  if (predicted != (ask == Ask::predicted)) return;
  NeuronPool& pool = store_->pool();
  if (predicted) {
    const Prediction& p = *prediction_;
    const int threads = pool_.size(), units = config_.n_ff / kTileRows;
    int n = 0;
    for (int t = 0; t < threads; t++) {
      const int begin = units * t / threads * kTileRows, count = p.count[size_t(t)];
      std::copy_n(p.ids.data() + begin, count, wanted_.data() + n);
      n += count;
    }
    pool.request(layer, wanted_.data(), n, ReadPriority::miss);
    return;
  }
  const NeuronSet* set = chosen(pass, layer, true);
  const ReadPriority priority = layer == 0 ? ReadPriority::miss : ReadPriority::speculative;
  if (set) pool.request(layer, set->ids.data(), int(set->ids.size()), priority);
  else pool.request(layer, nullptr, config_.n_ff, priority);
}

bool Decoder::await_neurons(int tid, const Pass& pass, int layer) {
  const bool there = store_->pool().await(layer, tid == 0 ? pass.should_stop : nullptr);
  if (there && tid == 0 && layer + 1 < config_.n_layers) request_neurons(pass, layer + 1, Ask::known);
  return there;
}

// This thread's neurons: first those that are in memory, while the others are read.
void Decoder::decode_stored(int tid, const Pass& pass, int layer) {
  if (store_->gates()) return decode_by_gate(tid, pass, layer);
  if (store_->pool().failed()) return;  // perhaps before this layer's neurons were asked for
  NeuronShare share = neuron_share(tid, pass, layer, 0, config_.n_ff);
  if (share.list) {
    const NeuronPool& pool = store_->pool();
    int32_t* list = there_first_.data();
    int middle = share.first;
    for (int k = share.first; k < share.last; k++) {
      if (!pool.missing(layer, share.list[k])) list[middle++] = share.list[k];
    }
    int at = middle;
    for (int k = share.first; k < share.last; k++) {
      if (pool.missing(layer, share.list[k])) list[at++] = share.list[k];
    }
    NeuronShare there = share;
    there.list = list;
    there.last = middle;
    decode_neurons(tid, pass, layer, there);
    share.list = list;
    share.first = middle;
    share.more = true;
  }
  if (!await_neurons(tid, pass, layer)) return;
  if (!share.list || share.first < share.last) decode_neurons(tid, pass, layer, share);
  finish_neurons(pass, layer, share.begin, share.end);
}

// This thread's gate rows, slice by slice; up rows and columns of the neurons that are left are on their way as soon as
// their slice is done, and those that are in memory are computed while the others are read.
void Decoder::decode_by_gate(int tid, const Pass& pass, int layer) {
  Thread& t = *thread_[size_t(tid)];
  ByGate& own = *by_gate_[size_t(tid)];
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  GateRows& gates = *store_->gates();
  NeuronPool& pool = store_->pool();
  const bool gated = config_.ffn_gated;
  const Thresholds threshold = gated ? threshold_for(pass, layer, Site::G, pass.pos, true) : Thresholds();
  const std::vector<Slice>& slices = gates.slices(layer);
  const std::function<bool()>* should_stop = tid == 0 ? pass.should_stop : nullptr;
  float *gate = gate_up_.data(), *z = z_.row(0);
  const auto part = [&](const Slice& s, int thread) { return s.share[size_t(thread)] * kTileRows; };
  int kept = 0, offered = 0;
  bool whole = true;
  for (size_t i = 0; i < slices.size(); i++) {
    const Slice& s = slices[i];
    const int begin = part(s, tid), end = part(s, tid + 1), before = kept;
    const bool there = gates.await(s, should_stop);
    whole = whole && there;
    if (there && begin < end) {
      first_rows(w, gates.rows(layer, i), t.in, begin, end, gate);
      activate(gate + begin, nullptr, end - begin, gate + begin);
      std::fill(z + begin, z + end, 0.0f);
      for (int k = begin; k < end; k++) {
        own.ids[size_t(kept)] = k;
        kept += survives(gate[k], threshold ? threshold.of(k) : 0.0f);
      }
      whole = pool.add(layer, own.ids.data() + before, kept - before, ReadPriority::miss) && whole;
      offered += end - begin;
    }
    gates.done(s);
  }
  if (!whole) return;
  if (offered) t.kept_share[size_t(layer)] = float(kept) / float(offered);
  if (gated) count_neurons(pass, Site::G, w, kept, offered, 1);
  int there = 0, at = 0;
  for (int k = 0; k < kept; k++) there += !pool.missing(layer, own.ids[size_t(k)]);
  for (int k = 0, missing = there; k < kept; k++) {
    own.ordered[size_t(pool.missing(layer, own.ids[size_t(k)]) ? missing++ : at++)] = own.ids[size_t(k)];
  }
  const auto some = [&](int begin, int end) {
    if (!gated || begin >= end) return;
    store_->rows(w, layer, t.in, own.ordered.data(), begin, end, nullptr, own.up.data(), own.slots.data());
    activate_up(own.up.data() + begin, end - begin);
  };
  some(0, there);
  if (!pool.await(layer, should_stop)) return;
  some(there, kept);
  for (int k = 0; k < kept; k++) {
    const int id = own.ordered[size_t(k)];
    z[id] = gated ? gate[id] * own.up[size_t(k)] : gate[id];
  }
  for (const Slice& s : slices) finish_neurons(pass, layer, part(s, tid), part(s, tid + 1));
}

void Decoder::multiply_rows(const Pass& pass, int layer, int tid, const int32_t* ids, int begin, int end, float* gate,
                            float* up, int room) {
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  const InputBuffer& x = thread_[size_t(tid)]->in;
  if (pass.stored) store_->rows(w, layer, x, ids, begin, end, gate, up, slots_.data() + room);
  else rows(w, x, ids, begin, end, gate, up);
}

// This thread's tiles of down, times the columns that z keeps.
void Decoder::multiply_columns(int tid, int layer, Input z) {
  if (store_->failed()) return;
  const Linear& w = store_->down(layer);
  z.active = z_.active(0);
  z.active.place = place_.data();
  gemv(w, z, w.share[size_t(tid)], w.share[size_t(tid) + 1], branch_down_.data());
}

}  // namespace sr
