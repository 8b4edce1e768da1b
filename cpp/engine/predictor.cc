// The public predictors handle: what is given is checked against the model.
#include "engine/predictor_impl.h"

#include <algorithm>
#include <string>

#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kMaxRank = 1 << 14;

void check(const char* what, int layer, const DecoderConfig& c, const LowRankWeights& w, int n) {
  const std::string where = std::string("the predictor of ") + what + " of layer " + std::to_string(layer);
  if (layer < 0 || layer >= c.n_layers) throw Error(ErrorCode::usage, where + ": this model has no such layer");
  if (w.rank < 1 || w.rank > kMaxRank || w.n != n) {
    throw Error(ErrorCode::usage, where + " has rank " + std::to_string(w.rank) + " and " + std::to_string(w.n) + " " +
                                      what + ", this model has " + std::to_string(n) +
                                      ": was it trained for another model?");
  }
}

void add(std::unique_ptr<LowRank>* place, const LowRankWeights& w, int width, PredictorSet* set) {
  *place = std::make_unique<LowRank>(w, width, &set->memory);
  set->most_rank = std::max(set->most_rank, w.rank);
  set->most_scratch = std::max(set->most_scratch, (*place)->scratch_bytes());
}

}  // namespace

Predictor::Predictor(const Model& model, int dense_tokens) {
  if (dense_tokens < 0) {
    throw Error(ErrorCode::usage, "dense_tokens must be 0 or more, got " + std::to_string(dense_tokens));
  }
  impl_ = std::make_shared<Impl>();
  impl_->model = model.impl_;
  impl_->set.dense_tokens = dense_tokens;
  const size_t layers = size_t(model.impl_->decoder.config().n_layers);
  impl_->set.neurons.resize(layers);
  impl_->set.heads.resize(layers);
}

void Predictor::set_neurons(int layer, const LowRankWeights& w) {
  const Decoder& d = impl_->model->decoder;
  check("neurons", layer, d.config(), w, d.config().n_ff);
  const std::string why = d.site_refusal(layer, Site::N);
  if (!why.empty()) throw Error(ErrorCode::usage, "site N of layer " + std::to_string(layer) + " " + why);
  add(&impl_->set.neurons[size_t(layer)], w, d.config().n_embd, &impl_->set);
}

void Predictor::set_heads(int layer, const LowRankWeights& w) {
  const DecoderConfig& c = impl_->model->decoder.config();
  check("heads", layer, c, w, c.n_heads);
  if (layer == 0) {
    throw Error(ErrorCode::usage, "heads of layer 0 cannot be predicted: there is no layer before it to predict from");
  }
  add(&impl_->set.heads[size_t(layer)], w, c.n_embd, &impl_->set);
}

int Predictor::dense_tokens() const { return impl_->set.dense_tokens; }

size_t Predictor::bytes() const {
  size_t bytes = 0;
  for (const auto* part : {&impl_->set.neurons, &impl_->set.heads}) {
    for (const auto& p : *part) bytes += p ? p->bytes() : 0;
  }
  return bytes;
}

size_t predictor_bytes(int rank, int n, int n_embd) {
  if (rank < 1 || rank > kMaxRank || n < 1 || n_embd < 1) throw Error(ErrorCode::usage, "a predictor has no such size");
  return LowRank::held_bytes(rank, n, n_embd);
}

}  // namespace sr
