// Which inputs of a layer's matrices a token may leave out: thresholds by site and layer, and what they save.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"

namespace sr {

// Thresholds work at the first five sites: A, O, M and Z choose columns, G chooses neurons by |act(gate)|. N are
// neurons that others have chosen, H
// heads.
enum class Site : uint8_t { A, O, M, Z, G, N, H };
constexpr int kSites = 5;
constexpr int kAllSites = 7;
constexpr const char* kSiteNames[kAllSites] = {"A", "O", "M", "Z", "G", "N", "H"};

// Immutable once built; shared by sessions.
class SparsityPlan {
 public:
  // widths: inputs of each site. Positions before dense_tokens stay dense; a product whose share of kept columns is
  // above break_even runs dense on the masked input, which gives the same bits.
  SparsityPlan(int n_layers, const std::array<int, kSites>& widths, int dense_tokens, float break_even);

  int n_layers() const { return n_layers_; }
  // Differs from that of every other plan, and changes when thresholds are set: what copies of them are known by.
  uint64_t serial() const { return serial_; }
  int width(Site site) const { return widths_[size_t(site)]; }
  int dense_tokens() const { return dense_tokens_; }
  float break_even() const { return break_even_; }
  // Thresholds [width] of a site, one value repeated where n is 1. Throws Error(usage) on another n, a negative or NaN.
  void set(int layer, Site site, const float* thresholds, size_t n);
  // [width], or null where the site is dense.
  const float* threshold(int layer, Site site) const {
    const AlignedBuffer<float>& t = thresholds_[size_t(layer) * kSites + size_t(site)];
    return t.size() ? t.data() : nullptr;
  }

 private:
  int n_layers_, dense_tokens_;
  float break_even_;
  std::array<int, kSites> widths_;
  std::vector<AlignedBuffer<float>> thresholds_;
  uint64_t serial_;
};

// Columns or neurons kept and offered where something was to be skipped, and bytes read and held of the layers of such
// tokens.
struct SiteCounts {
  std::array<std::atomic<int64_t>, kAllSites> kept{}, offered{};
  std::atomic<int64_t> bytes_read{0}, bytes_held{0};
  std::atomic<int64_t> found{0}, needed{0};  // neurons that are not 0, and those of them that a predictor named
};

}  // namespace sr
