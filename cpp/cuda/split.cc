// Room is divided by units of 64 neurons, whose rows and columns can be cut out of panels and records as they lie.
#include "cuda/split.h"

#include <algorithm>
#include <fstream>
#include <numeric>

#include "base/direct_file.h"
#include "format/neuron_file.h"
#include "format/packed_model.h"

namespace sr {
namespace cuda {
namespace {

constexpr size_t kLeastCold = 4;  // a divided layer gives up a fourth of its units at least

}  // namespace

std::vector<int> plan_split(const std::vector<FfnUnits>& layers, size_t room) {
  std::vector<int> hot;
  size_t total = 0;
  for (const FfnUnits& l : layers) {
    hot.push_back(l.count);
    total += size_t(l.count) * l.bytes;
  }
  if (total <= room) return hot;
  size_t missing = total - room;
  // From the last layer on: whole ones where they must be, else as many as the missing bytes are a quarter of.
  std::vector<size_t> divided;
  size_t in_divided = 0;
  for (size_t l = layers.size(); l-- > 0 && missing > 0;) {
    const size_t bytes = size_t(layers[l].count) * layers[l].bytes;
    if (layers[l].whole) {
      hot[l] = 0;
      missing -= std::min(missing, bytes);
    } else if (in_divided < kLeastCold * missing) {
      divided.push_back(l);
      in_divided += bytes;
    }
  }
  size_t spread = missing;
  for (size_t i = 0; i < divided.size(); i++) {
    const FfnUnits& l = layers[divided[i]];
    const size_t bytes = size_t(l.count) * l.bytes;
    // This layer's share of what is still missing, rounded up to units; the layers after it need less by so much.
    const size_t share = (spread * bytes + in_divided - 1) / std::max<size_t>(in_divided, 1);
    const int cold = int(std::min(size_t(l.count), (share + l.bytes - 1) / l.bytes));
    hot[divided[i]] = l.count - cold;
    spread -= std::min(spread, size_t(cold) * l.bytes);
    in_divided -= bytes;
  }
  return hot;
}

std::vector<int> hot_order(const uint32_t* ranks, int n) {
  std::vector<int> units(static_cast<size_t>(n));
  std::iota(units.begin(), units.end(), 0);
  if (!ranks) return units;
  std::vector<uint64_t> sum(static_cast<size_t>(n));
  for (int i = 0; i < n * kTileRows; i++) sum[size_t(i / kTileRows)] += ranks[i];
  std::stable_sort(units.begin(), units.end(), [&](int a, int b) { return sum[size_t(a)] < sum[size_t(b)]; });
  return units;
}

std::vector<uint32_t> read_ranks(const PackedModel& model, const DecoderWeights& weights, int n_ff) {
  const std::string path = NeuronFile::path_in(model.directory());
  if (!std::ifstream(path)) return {};
  const int layers = int(weights.layers.size());
  const NeuronFile file(open_direct(path), layers, n_ff);
  for (int l = 0; l < layers; l++) {
    const LayerWeights& w = weights.layers[size_t(l)];
    if (w.ffn_rows && w.ffn_down.parts.size() == 1) file.check(l, model, w.ffn_rows.m, w.ffn_down.parts[0]);
  }
  return std::vector<uint32_t>(file.positions(), file.positions() + size_t(layers) * size_t(n_ff));
}

}  // namespace cuda
}  // namespace sr
