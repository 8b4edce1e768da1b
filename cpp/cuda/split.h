// Which neurons of a model's FFNs lie on the device where not all of them fit, after PowerInfer: hot ones there, cold
// ones on the CPU. Plain arithmetic, no device is needed.
#pragma once

#include <cstdint>
#include <vector>

#include "model/weights.h"

namespace sr {

class PackedModel;

namespace cuda {

// What a layer's FFN is cut from.
struct FfnUnits {
  int count = 0;          // of 64 neurons
  size_t bytes = 0;       // of each, on the device
  bool whole = false;     // may not be divided: a norm lies between its neurons and down
};

// Units on the device for each layer, together in `room` bytes; all of them where they fit. The first layers stay
// whole; the last ones are divided, as few as give up a quarter of their neurons or more, in equal shares: a layer that
// is divided has the two sides wait for each other once, so that few cold neurons in every layer would cost more than
// many in some.
std::vector<int> plan_split(const std::vector<FfnUnits>& layers, size_t room);

// The units of a layer of n, the ones in most use first: by the mean rank of their 64 neurons. ranks: [64 n], 0 the
// most used; null: as stored.
std::vector<int> hot_order(const uint32_t* ranks, int n);

// The ranks that convert --order wrote beside the weights, [layers, n_ff]; empty without that file. Throws Error(model)
// where it is damaged or of other weights.
std::vector<uint32_t> read_ranks(const PackedModel& model, const DecoderWeights& weights, int n_ff);

}  // namespace cuda
}  // namespace sr
