// Which weights stay in memory and which are read anew in every pass, when not all of them fit.
#pragma once

#include <cstddef>
#include <vector>

namespace sr {

// Streamed first to last: a row of an embedding that is not the head is read alone, the rest costs all its bytes a
// pass.
enum class WeightRank { embedding, ffn, attention, head };

// One matrix, in the order of use; its panels, or what else cannot be parted, in the order of rows.
struct ResidencyItem {
  WeightRank rank = WeightRank::ffn;
  int layer = 0;  // 0 where there are none
  std::vector<size_t> panels;
};

struct ResidencyPlan {
  std::vector<int> resident;   // by item: how many of its first panels stay
  size_t resident_bytes = 0;
  size_t streamed_bytes = 0;   // of a pass; embeddings not counted
  size_t unit_bytes = 0;       // the most bytes that are waited for at once, 0 where nothing is streamed
  size_t ring_bytes = 0;
};

// As much as possible stays: resident_bytes + ring_bytes <= room. Where even the smallest ring does not fit, ring_bytes
// exceeds the room and resident_bytes is 0. What is streamed is spread over the layers, so that reading never waits
// long for computing.
ResidencyPlan plan_residency(const std::vector<ResidencyItem>& items, size_t room);

}  // namespace sr
