// Checked when set: kernels compare without looking.
#include "sparse/plan.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "sparse_run/error.h"

namespace sr {
namespace {

uint64_t next_serial() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

SparsityPlan::SparsityPlan(int n_layers, const std::array<int, kSites>& widths, int dense_tokens)
    : n_layers_(n_layers),
      dense_tokens_(dense_tokens),
      widths_(widths),
      entries_(size_t(n_layers) * kSites),
      own_(entries_.size()),
      serial_(next_serial()) {
  if (dense_tokens < 0)
    throw Error(ErrorCode::usage, "dense_tokens must be 0 or more, got " + std::to_string(dense_tokens));
  break_even_.fill(kByShape);
}

void SparsityPlan::set_break_even(Site site, float value) {
  if (!(value >= 0 && value <= 1)) {
    throw Error(ErrorCode::usage, "break_even must be from 0 to 1, got " + std::to_string(value));
  }
  break_even_[size_t(site)] = value;
}

void SparsityPlan::set(int layer, Site site, const float* thresholds, size_t n) {
  const size_t width = size_t(widths_[size_t(site)]);
  const std::string where = std::string("thresholds of site ") + kSiteNames[size_t(site)] + " in layer " +
                            std::to_string(layer);
  if (n != 1 && n != width) {
    throw Error(ErrorCode::usage, where + ": " + std::to_string(n) + " values, this model needs 1 or " +
                                      std::to_string(width) + ": was it calibrated for another model?");
  }
  for (size_t i = 0; i < n; i++) {
    if (!(thresholds[i] >= 0)) {
      throw Error(ErrorCode::usage, where + " must be 0 or more, got " + std::to_string(thresholds[i]));
    }
  }
  const bool same = std::all_of(thresholds, thresholds + n, [&](float t) { return t == thresholds[0]; });
  const size_t at = size_t(layer) * kSites + size_t(site);
  Entry entry;
  entry.set = true;
  entry.same = thresholds[0];
  own_[at] = AlignedBuffer<float>();
  if (!same) {
    AlignedBuffer<float> own(width, "thresholds");
    std::copy_n(thresholds, width, own.data());
    own_[at] = std::move(own);
    entry.each = own_[at].data();
  }
  entries_[at] = entry;
  serial_ = next_serial();
}

}  // namespace sr
