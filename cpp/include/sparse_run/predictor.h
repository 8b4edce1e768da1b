// Low-rank predictors of what a token needs in a layer, made beforehand (predictors/dejavu) and run with the model.
#pragma once

#include <cstdint>
#include <memory>

#include "sparse_run/engine.h"

namespace sr {

// scores = b_scale * (B (a_scale * (A h))), h being the residual stream at root mean square 1; item i is predicted
// where scores[i] > threshold[i]. A matrix whose codes are all in -8 .. 7 is kept, and read, in 4 bits a weight.
struct LowRankWeights {
  int rank = 0, n = 0;
  const int8_t* a = nullptr;         // [rank, n_embd]
  const float* a_scale = nullptr;    // [rank]
  const int8_t* b = nullptr;         // [n, rank]
  const float* b_scale = nullptr;    // [n]
  const float* threshold = nullptr;  // [n]
};

// Bound to one model; shared by sessions, not to be changed any more once a session has it.
class Predictor {
 public:
  // Positions before dense_tokens stay dense. Throws Error(usage).
  Predictor(const Model& model, int dense_tokens);
  // Neurons of a layer's FFN (n = n_ff), from the stream before the layer's attention, so that predicting goes on
  // beside it. Throws Error(usage) where the FFN is stored in panels, or weights do not fit or are not finite.
  void set_neurons(int layer, const LowRankWeights& w);
  // Attention heads of a layer (n = n_heads) other than the first, from the stream before the layer before it.
  void set_heads(int layer, const LowRankWeights& w);
  int dense_tokens() const;
  size_t bytes() const;

 private:
  friend class Session;
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// Memory that a predictor of n items of one layer takes.
size_t predictor_bytes(int rank, int n, int n_embd);

}  // namespace sr
