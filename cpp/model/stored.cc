// Decoding from the store of single neurons. What a layer needs is known when the layer before it is computed (fixed sets,
// and layers of which all neurons are needed), or after its attention (predictors, which run beside it), and is read meanwhile.
#include <algorithm>

#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {

NeuronStore* Decoder::make_store(const PackedModel& model, std::shared_ptr<ByteSource> source) {
  store_ = std::make_unique<NeuronStore>(model, weights_, std::move(source));
  const size_t n = size_t(config_.n_ff);
  wanted_.reset(n, "the neurons that a token needs");
  slots_.reset(n, "the neurons that a token needs");
  there_first_.reset(n, "the neurons that a token needs");
  place_.reset(n, "the neurons that a token needs");
  return store_.get();
}

// One token of which something says which neurons it needs. Where attention has had to leave memory too, the stream
// that brings it brings the FFNs as well.
bool Decoder::works_from_store(const Pass& pass) const {
  if (!store_ || pass.n != 1 || pass.one || !flash_->holds_all_but_ffn()) return false;
  return pass.skipping.neurons || predicting(pass, pass.pos, true);
}

void Decoder::request_neurons(const Pass& pass, int layer, Ask ask) {
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

void Decoder::multiply_rows(const Pass& pass, int layer, int tid, const int32_t* ids, int begin, int end, float* gate,
                            float* up, int room) {
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  const InputBuffer& x = thread_[size_t(tid)]->in;
  if (pass.stored) store_->rows(w, layer, x, ids, begin, end, gate, up, slots_.data() + room);
  else rows(w, x, ids, begin, end, gate, up);
}

// This thread's tiles of down, times the columns that z keeps.
void Decoder::multiply_columns(int tid, int layer, Input z) {
  if (store_->pool().failed()) return;
  const Linear& w = store_->down(layer);
  z.active = z_.active(0);
  z.active.place = place_.data();
  gemv(w, z, w.share[size_t(tid)], w.share[size_t(tid) + 1], branch_down_.data());
}

}  // namespace sr
