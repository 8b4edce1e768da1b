// Predictors beside the forward pass. In decode a layer's neurons are predicted from the stream before its attention:
// the first product runs in the phase of q, k, v, the second beside attention, so that no barrier is added and the list
// is there when the FFN begins. Heads of a layer are predicted one layer earlier, in the same way.
#include <algorithm>
#include <cmath>

#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {
namespace {

constexpr const char* kWhat = "the predictors' working memory";

// The stream at root mean square 1, as the rows kernels take it.
void prepare(const float* x, int n, InputBuffer* in, int row) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += double(x[i]) * x[i];
  const double root = std::sqrt(sum / n + 1e-12);
  float* out = in->row(row);
  for (int i = 0; i < n; i++) out[i] = float(x[i] / root);
  in->quantise(row);
  in->order(row);
}

// Scores of so many items are written in whole tiles.
size_t in_tiles(int n) { return size_t((n + kTileRows - 1) / kTileRows) * kTileRows; }

}  // namespace

void Decoder::make_prediction_buffers(const Pass& pass) {
  const PredictorSet* set = pass.skipping.predictor;
  if (!set) return;
  const DecoderConfig& c = config_;
  const int threads = pool_.size();
  if (!prediction_ || prediction_->rank < set->most_rank) {
    prediction_ = std::make_unique<Prediction>();
    Prediction& p = *prediction_;
    p.rank = set->most_rank;
    p.hidden.reset(size_t(p.rank), kWhat);
    p.head_hidden.reset(size_t(p.rank), kWhat);
    p.scores.reset(in_tiles(c.n_ff), kWhat);
    p.head_scores.reset(in_tiles(c.n_heads), kWhat);
    p.ids.reset(size_t(c.n_ff), kWhat);
    p.count.assign(size_t(threads), 0);
    p.heads.reset(2 * size_t(c.n_heads), kWhat);
    p.x.resize(size_t(threads));
    p.h.resize(size_t(threads));
    for (int t = 0; t < threads; t++) {
      p.x[size_t(t)].reset(1, c.n_embd, kWhat, true);
      p.h[size_t(t)].reset(1, p.rank, kWhat);
    }
  }
  Prediction& p = *prediction_;
  if (pass.n == 1 || p.block || !(pass.skipping.mask_predicted || pass.skipping.measure)) return;
  p.block = std::make_unique<Prediction::OfBlock>();
  Prediction::OfBlock& b = *p.block;
  b.x.reset(kMaxBlock, c.n_embd, kWhat, true);
  b.h.reset(kMaxBlock, p.rank, kWhat);
  b.scores.reset(size_t(kMaxBlock) * in_tiles(std::max(c.n_ff, c.n_heads)), kWhat);
  b.neurons.reset(size_t(kMaxBlock) * size_t(c.n_ff), kWhat);
  b.heads.reset(2 * size_t(kMaxBlock) * size_t(c.n_heads), kWhat);
}

bool Decoder::predicting(const Pass& pass, int pos, bool decode) const {
  const Skipping& s = pass.skipping;
  if (!s.predictor || pass.one || pos < s.predictor->dense_tokens) return false;
  return decode ? !s.measure : s.mask_predicted || s.measure;
}

const LowRank* Decoder::neuron_predictor(const Pass& pass, int layer, int pos, bool decode) const {
  return predicting(pass, pos, decode) ? pass.skipping.predictor->neurons_of(layer) : nullptr;
}

const LowRank* Decoder::head_predictor(const Pass& pass, int layer, int pos, bool decode) const {
  return predicting(pass, pos, decode) && !pass.skipping.measure ? pass.skipping.predictor->heads_of(layer) : nullptr;
}

void Decoder::predict_hidden(int tid, const Pass& pass, int layer) {
  const LowRank *neurons = neuron_predictor(pass, layer, pass.pos, true);
  const LowRank *heads = head_predictor(pass, layer + 1, pass.pos, true);
  if (!neurons && !heads) return;
  Prediction& p = *prediction_;
  InputBuffer& x = p.x[size_t(tid)];
  prepare(thread_[size_t(tid)]->x.data(), config_.n_embd, &x, 0);
  const int threads = pool_.size();
  for (const LowRank* of : {neurons, heads}) {
    if (!of) continue;
    float* hidden = of == neurons ? p.hidden.data() : p.head_hidden.data();
    of->hidden(x.ordered(0), of->rank() * tid / threads, of->rank() * (tid + 1) / threads, hidden);
    if (tid == 0 && pass.skipping.counts) {
      pass.skipping.counts->bytes_read.fetch_add(int64_t(of->bytes()), std::memory_order_relaxed);
    }
  }
}

void Decoder::predict_scores(int tid, const Pass& pass, int layer) {
  const LowRank *neurons = neuron_predictor(pass, layer, pass.pos, true);
  const LowRank *heads = head_predictor(pass, layer + 1, pass.pos, true);
  if (!neurons && !heads) return;
  Prediction& p = *prediction_;
  InputBuffer& h = p.h[size_t(tid)];
  // What is beyond a smaller rank is multiplied by nothing.
  const auto take = [&](const LowRank& of, const float* hidden) {
    std::copy(hidden, hidden + of.rank(), h.row(0));
    std::fill(h.row(0) + of.rank(), h.row(0) + h.width(), 0.0f);
    h.quantise(0);
  };
  if (neurons) {
    take(*neurons, p.hidden.data());
    const int units = config_.n_ff / kTileRows, threads = pool_.size();
    const int begin = units * tid / threads * kTileRows, end = units * (tid + 1) / threads * kTileRows;
    neurons->scores(h.input().q, begin / kTileRows, end / kTileRows, p.scores.data());
    p.count[size_t(tid)] = neurons->list(begin, end, p.scores.data(), p.ids.data() + begin);
  }
  if (heads && tid == 0) {
    take(*heads, p.head_hidden.data());
    heads->scores(h.input().q, 0, int(in_tiles(heads->n())) / kTileRows, p.head_scores.data());
    uint8_t* keep = p.heads.data() + size_t((layer + 1) & 1) * size_t(config_.n_heads);
    for (int i = 0; i < heads->n(); i++) keep[i] = heads->predicted(i, p.head_scores[size_t(i)]);
  }
}

const uint8_t* Decoder::heads_kept(const Pass& pass, int layer, int row, bool decode) const {
  if (!head_predictor(pass, layer, pass.pos + row, decode)) return nullptr;
  const size_t heads = size_t(config_.n_heads), parity = size_t(layer & 1);
  if (decode) return prediction_->heads.data() + parity * heads;
  return prediction_->block->heads.data() + (parity * kMaxBlock + size_t(row)) * heads;
}

const uint8_t* Decoder::neurons_kept(const Pass& pass, int layer, int row) const {
  if (neuron_predictor(pass, layer, pass.pos + row, false)) {
    return prediction_->block->neurons.data() + size_t(row) * size_t(config_.n_ff);
  }
  const NeuronSet* set = chosen(pass, layer, false);
  return set ? set->keep.data() : nullptr;
}

// Rows [begin, end) of a block: flags of the neurons of this layer, and of the heads of the next.
void Decoder::predict_block(Thread& t, const Pass& pass, int layer, int begin, int end) {
  if (!pass.skipping.predictor) return;
  begin = std::max(begin, pass.skipping.predictor->dense_tokens - pass.pos);
  if (begin >= end) return;
  const LowRank *neurons = neuron_predictor(pass, layer, pass.pos + begin, false);
  const LowRank *heads = head_predictor(pass, layer + 1, pass.pos + begin, false);
  if (!neurons && !heads) return;
  Prediction::OfBlock& b = *prediction_->block;
  const int n = end - begin;
  if (t.gemm_scratch.size() < pass.skipping.predictor->most_scratch) {
    t.gemm_scratch.reset(pass.skipping.predictor->most_scratch, kWhat);
  }
  for (int i = begin; i < end; i++) prepare(block_->x.data() + size_t(i) * config_.n_embd, config_.n_embd, &b.x, i);
  const size_t ld_h = b.h.input().ldx;
  for (const LowRank* of : {neurons, heads}) {
    if (!of) continue;
    of->hidden(b.x.ordered(begin), n, b.h.row(begin), ld_h, t.gemm_scratch.data());
    for (int i = begin; i < end; i++) {
      std::fill(b.h.row(i) + of->rank(), b.h.row(i) + b.h.width(), 0.0f);
      b.h.quantise(i);
    }
    // Rows of scores have the same length for both, so that threads stay apart.
    const size_t ld = in_tiles(std::max(config_.n_ff, config_.n_heads)), items = size_t(of->n());
    float* scores = b.scores.data() + size_t(begin) * ld;
    if ((of->rank() - 1) / kSlabCols == (b.h.width() - 1) / kSlabCols) {
      of->scores(b.h.input(begin).q, n, scores, ld, t.gemm_scratch.data());
    } else {  // the rows of h are longer than this predictor's
      const int tiles = int(in_tiles(of->n())) / kTileRows;
      for (int i = begin; i < end; i++) of->scores(b.h.input(i).q, 0, tiles, scores + size_t(i - begin) * ld);
    }
    for (int i = begin; i < end; i++, scores += ld) {
      uint8_t* keep = of == neurons ? b.neurons.data() + size_t(i) * items
                                    : b.heads.data() + (size_t((layer + 1) & 1) * kMaxBlock + size_t(i)) * items;
      for (int k = 0; k < of->n(); k++) keep[k] = of->predicted(k, scores[k]);
    }
    if (pass.skipping.counts && !pass.skipping.measure) {
      pass.skipping.counts->bytes_read.fetch_add(int64_t(of->bytes()) * n, std::memory_order_relaxed);
    }
  }
}

// What a skipped head would have added is 0.
void Decoder::mask_heads(const Pass& pass, int layer, int row, bool count, float* attention) const {
  const uint8_t* keep = heads_kept(pass, layer, row, pass.n == 1);
  if (!keep) return;
  int kept = 0;
  for (int h = 0; h < config_.n_heads; h++) {
    kept += keep[h];
    if (!keep[h]) std::fill_n(attention + size_t(h) * config_.head_dim, config_.head_dim, 0.0f);
  }
  if (!count || !pass.skipping.counts) return;
  pass.skipping.counts->kept[size_t(Site::H)].fetch_add(kept, std::memory_order_relaxed);
  pass.skipping.counts->offered[size_t(Site::H)].fetch_add(config_.n_heads, std::memory_order_relaxed);
}

}  // namespace sr
