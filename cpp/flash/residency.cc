// Panels leave memory one by one, rank after rank, each round taking one from every layer, until the rest fits.
#include "flash/residency.h"

#include <algorithm>
#include <numeric>

#include "base/direct_file.h"

namespace sr {
namespace {

constexpr size_t kUnit = size_t(2) << 20;      // smaller panels are read together up to this
constexpr size_t kUsualRing = size_t(8) << 20;

// 0 .. n-1 so ordered that every beginning of the list is spread evenly (indices by their mirrored bits).
std::vector<int> spread(int n) {
  std::vector<int> order(size_t(std::max(n, 0)));
  std::iota(order.begin(), order.end(), 0);
  const auto mirrored = [](unsigned v) {
    unsigned out = 0;
    for (int b = 0; b < 16; b++) out |= (v >> b & 1u) << (15 - b);
    return out;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return mirrored(unsigned(a)) < mirrored(unsigned(b)); });
  return order;
}

}  // namespace

ResidencyPlan plan_residency(const std::vector<ResidencyItem>& items, size_t room) {
  ResidencyPlan plan;
  int layers = 1;
  size_t total = 0;
  for (const ResidencyItem& item : items) {
    layers = std::max(layers, item.layer + 1);
    plan.resident.push_back(int(item.panels.size()));
    for (size_t p : item.panels) plan.resident_bytes += p;
  }
  total = plan.resident_bytes;
  size_t largest = 0;
  // A unit may begin and end inside a block of the file: two blocks more.
  const auto unit = [&] { return largest ? std::max(largest, std::min(kUnit, total / 64)) + 2 * kReadAlign : 0; };
  const auto ring = [&] { return largest ? std::max(3 * unit(), std::min(kUsualRing, total / 32)) : 0; };
  // Page tables and blocks that begin outside a matrix.
  const auto fits = [&] { return plan.resident_bytes + ring() <= room; };

  const std::vector<int> order = spread(layers);
  for (WeightRank rank : {WeightRank::embedding, WeightRank::ffn, WeightRank::attention, WeightRank::head}) {
    for (bool more = true; more && !fits();) {
      more = false;
      for (size_t at = 0; at < order.size() && !fits(); at++) {
        for (size_t i = 0; i < items.size(); i++) {
          if (items[i].rank != rank || items[i].layer != order[at] || plan.resident[i] == 0) continue;
          const size_t bytes = items[i].panels[size_t(--plan.resident[i])];
          plan.resident_bytes -= bytes;
          if (rank != WeightRank::embedding) {
            plan.streamed_bytes += bytes;
            largest = std::max(largest, bytes);
          }
          more = true;
          break;
        }
      }
    }
  }
  plan.unit_bytes = unit();
  plan.ring_bytes = ring();
  if (!fits()) plan.ring_bytes = 2 * unit();
  return plan;
}

}  // namespace sr
