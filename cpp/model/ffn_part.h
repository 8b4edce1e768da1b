// The FFN of some of a layer's neurons as matrices of their own, cut out in units of 64 neurons: as many rows of gate
// and up, and two slabs of columns of down. Codes and scales stay what they are, so that down of the parts adds up to
// down of the whole but for the order of sums.
#pragma once

#include <vector>

#include "base/aligned_buffer.h"
#include "model/weights.h"

namespace sr {

// Values of all neurons, those of these units.
std::vector<float> pick_neurons(const std::vector<int>& units, const float* all);

class FfnPart {
 public:
  FfnPart() = default;
  // Copies the units, ascending numbers of 64 neurons each. bias: down's comes along; only one of the parts may bring
  // it.
  FfnPart(const LayerWeights& whole, const std::vector<int>& units, bool bias);
  FfnPart(FfnPart&&) = default;
  FfnPart& operator=(FfnPart&&) = default;

  // ffn_in or ffn_rows, and ffn_down, as of a layer of so many neurons; the rest is the whole layer's. Valid as long as
  // this object is.
  const LayerWeights& weights() const { return weights_; }
  const std::vector<int>& units() const { return units_; }
  int neurons() const { return int(units_.size()) * kTileRows; }
  bool empty() const { return units_.empty(); }

 private:
  LayerWeights weights_;
  std::vector<int> units_;
  std::vector<AlignedBuffer<uint8_t>> data_;
  AlignedBuffer<float> bias_;
};

}  // namespace sr
