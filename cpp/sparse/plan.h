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

// Thresholds of a site in a layer: one for each input, or one for all, which costs no memory traffic.
struct Thresholds {
  const float* at = nullptr;  // null: nothing is left out
  int stride = 0;             // 1 or 0
  explicit operator bool() const { return at != nullptr; }
  float of(int input) const { return at[size_t(input) * size_t(stride)]; }
};

// Inputs that are exactly 0 need no threshold to be left out.
inline constexpr float kZeroThreshold = 0;
inline constexpr Thresholds kNotZero = {&kZeroThreshold, 0};

// Immutable once built; shared by sessions.
class SparsityPlan {
 public:
  // Where no break-even was set: the decoder decides by the matrix's shape.
  static constexpr float kByShape = -1;

  // widths: inputs of each site. Positions before dense_tokens stay dense.
  SparsityPlan(int n_layers, const std::array<int, kSites>& widths, int dense_tokens);

  int n_layers() const { return n_layers_; }
  // Differs from that of every other plan, and changes when thresholds are set: what copies of them are known by.
  uint64_t serial() const { return serial_; }
  int width(Site site) const { return widths_[size_t(site)]; }
  int dense_tokens() const { return dense_tokens_; }
  // A product whose share of kept columns is above this runs dense on the masked input, which gives the same bits.
  // From 0 to 1, or kByShape.
  float break_even(Site site) const { return break_even_[size_t(site)]; }
  // Throws Error(usage) on anything but 0 to 1.
  void set_break_even(Site site, float value);
  // Thresholds [width] of a site, one value repeated where n is 1. Throws Error(usage) on another n, a negative or NaN.
  void set(int layer, Site site, const float* thresholds, size_t n);
  Thresholds threshold(int layer, Site site) const {
    const Entry& e = entries_[size_t(layer) * kSites + size_t(site)];
    return {e.each ? e.each : e.set ? &e.same : nullptr, e.each != nullptr};
  }

 private:
  int n_layers_, dense_tokens_;
  std::array<float, kSites> break_even_;
  std::array<int, kSites> widths_;
  // A layer's entries are two lines of memory: looked up cold at every token, one value must not lie elsewhere.
  struct Entry {
    const float* each = nullptr;  // in own_
    float same = 0;               // where all are the same
    bool set = false;
  };
  std::vector<Entry> entries_;
  std::vector<AlignedBuffer<float>> own_;
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
