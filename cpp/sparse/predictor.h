// Predictors of a whole model at run time. A has long rows and lies by rows; rows of B are as short as the rank, so it
// lies in panels, in which no register is half empty and no row is padded to a line.
#pragma once

#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/table.h"

namespace sr {

struct LowRankWeights;

// Where the weights of all layers lie together: one layer's alone would be too small for huge pages.
class PredictorMemory {
 public:
  // Zeroed bytes, 64-byte aligned, which live as long as this.
  uint8_t* take(size_t bytes);

 private:
  std::vector<AlignedBuffer<uint8_t>> chunks_;
  uint8_t* at_ = nullptr;
  size_t left_ = 0;
};

// One predictor. Both products may be shared among threads: A's by ranges of its rows, B's by tiles of 64.
class LowRank {
 public:
  // Copies the weights, each row with a scale of its own; x has `width` inputs. A matrix whose codes are all in -8 .. 7
  // takes 4 bits a weight, another 8.
  LowRank(const LowRankWeights& w, int width, PredictorMemory* memory);
  // What such a predictor takes at most, its tables included.
  static size_t held_bytes(int rank, int n, int width);

  int rank() const { return a_.neurons; }
  int n() const { return b_.rows; }
  size_t bytes() const { return a_.total_bytes() + b_.total_bytes(); }
  // hidden[k] = a_scale[k] * (A x)[k] for k in [begin, end), for one vector or `count` of them, hidden [count, ld].
  void hidden(const RowVector& x, int begin, int end, float* hidden) const;
  void hidden(const RowVector& x, int count, float* hidden, size_t ld, void* scratch) const;
  // scores[i] = (B hidden)[i] of the tiles' items, which `predicted` scales and compares; scores has room for whole
  // tiles. Of `count` vectors, their rows as long as B's.
  void scores(const QuantVector& hidden, int tile_begin, int tile_end, float* scores) const;
  void scores(const QuantVector& hidden, int count, float* scores, size_t ld, void* scratch) const;
  bool predicted(int i, float score) const { return score * b_scale_[size_t(i)] > threshold_[size_t(i)]; }
  // Those of the items [begin, end) that are predicted, in order; how many.
  int list(int begin, int end, const float* scores, int32_t* ids) const;
  size_t scratch_bytes() const;

 private:
  NeuronMatrix a_;
  PanelMatrix b_;
  std::vector<float> a_scale_, b_scale_, threshold_;
};

// Of every layer, or null.
struct PredictorSet {
  PredictorMemory memory;
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
