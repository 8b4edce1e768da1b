// Which neurons of an FFN a token computes where others have decided it: sets that were chosen beforehand.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace sr {

// Neurons in ascending order, and the same as a flag for each; shared by the threads.
struct NeuronSet {
  std::vector<int32_t> ids;
  std::vector<uint8_t> keep;  // [n_ff], 1 or 0
};

// One set a layer, or none: then all neurons of the layer are computed. Immutable once built.
class NeuronSets {
 public:
  NeuronSets(int n_layers, int n_ff) : n_ff_(n_ff), sets_(size_t(n_layers)) {}

  // Throws Error(usage) where ids are not ascending numbers of neurons.
  void set(int layer, const int32_t* ids, size_t n);
  // Null: all neurons.
  const NeuronSet* of(int layer) const { return sets_[size_t(layer)].get(); }

 private:
  int n_ff_;
  std::vector<std::unique_ptr<NeuronSet>> sets_;
};

}  // namespace sr
