// In double and in order of tokens.
#include "sparse/statistic.h"

#include <algorithm>
#include <cstring>

#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kCoreNumerator = 1, kCoreDenominator = 5;  // share of the positive values that are a token's core

}  // namespace

NeuronStatistic::NeuronStatistic(const std::string& kind, int n_layers, int n_ff, int max_rows)
    : core_(kind == "core"), n_ff_(n_ff), sums_(size_t(n_layers) * size_t(n_ff), 0.0) {
  if (!core_ && kind != "griffin") {
    throw Error(ErrorCode::usage, "unknown statistic '" + kind + "'; there are griffin and core");
  }
  if (core_) marks_.resize(size_t(max_rows) * size_t(n_ff));
  else factor_.resize(size_t(max_rows));
}

void NeuronStatistic::look(int row, const float* z) {
  if (!core_) {
    double sum = 0;
    for (int j = 0; j < n_ff_; j++) sum += double(z[j]) * z[j];
    factor_[size_t(row)] = sum > 0 ? 1 / sum : 0;
    return;
  }
  std::vector<int32_t> positive;
  positive.reserve(size_t(n_ff_));
  for (int j = 0; j < n_ff_; j++) {
    if (z[j] > 0) positive.push_back(j);
  }
  const size_t core = (positive.size() * kCoreNumerator + kCoreDenominator - 1) / kCoreDenominator;
  std::nth_element(positive.begin(), positive.begin() + ptrdiff_t(core), positive.end(),
                   [&](int32_t a, int32_t b) { return z[a] != z[b] ? z[a] > z[b] : a < b; });
  uint8_t* mark = marks_.data() + size_t(row) * size_t(n_ff_);
  std::memset(mark, 0, size_t(n_ff_));
  for (size_t i = 0; i < core; i++) mark[positive[i]] = 1;
}

void NeuronStatistic::add(int layer, int n, const float* z, size_t ldz, int begin, int end) {
  double* sums = sums_.data() + size_t(layer) * size_t(n_ff_);
  for (int i = 0; i < n; i++) {
    if (core_) {
      const uint8_t* mark = marks_.data() + size_t(i) * size_t(n_ff_);
      for (int j = begin; j < end; j++) sums[j] += mark[j];
    } else {
      const float* row = z + size_t(i) * ldz;
      const double factor = factor_[size_t(i)];
      for (int j = begin; j < end; j++) sums[j] += double(row[j]) * row[j] * factor;
    }
  }
}

}  // namespace sr
