// Predictors of a whole model at run time: their weights as the rows kernels read them, 8 bits each.
#pragma once

#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/table.h"

namespace sr {

struct LowRankWeights;

// One predictor. Both products may be shared among threads by ranges of their rows.
class LowRank {
 public:
  // Copies the weights, each row with a scale of its own; x has `width` inputs.
  LowRank(const LowRankWeights& w, int width);

  int rank() const { return a_.neurons; }
  int n() const { return b_.neurons; }
  size_t bytes() const { return a_.total_bytes() + b_.total_bytes(); }
  // hidden[k] = a_scale[k] * (A x)[k] for k in [begin, end), for one vector or `count` of them, hidden [count, ld].
  void hidden(const RowVector& x, int begin, int end, float* hidden) const;
  void hidden(const RowVector& x, int count, float* hidden, size_t ld, void* scratch) const;
  // scores[i] = (B hidden)[i], i in [begin, end), which `predicted` scales and compares.
  void scores(const RowVector& hidden, int begin, int end, float* scores) const;
  void scores(const RowVector& hidden, int count, float* scores, size_t ld, void* scratch) const;
  bool predicted(int i, float score) const { return score * b_scale_[size_t(i)] > threshold_[size_t(i)]; }
  size_t scratch_bytes() const;

 private:
  NeuronMatrix a_, b_;
  AlignedBuffer<uint8_t> a_data_, b_data_;
  std::vector<float> a_scale_, b_scale_, threshold_;
};

// Of every layer, or null.
struct PredictorSet {
  std::vector<std::unique_ptr<LowRank>> neurons, heads;
  int dense_tokens = 0;
  int most_rank = 0;
  size_t most_scratch = 0;

  const LowRank* neurons_of(int layer) const { return neurons[size_t(layer)].get(); }
  // The heads of the layer after the last one are nobody's.
  const LowRank* heads_of(int layer) const {
    return size_t(layer) < heads.size() ? heads[size_t(layer)].get() : nullptr;
  }
};

}  // namespace sr
