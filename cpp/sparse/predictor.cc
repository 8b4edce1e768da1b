// Rows of int8 codes become 8-bit rows with scales of 1; their own scale is applied to the sum.
#include "sparse/predictor.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "kernels/pack/rows.h"
#include "sparse_run/error.h"
#include "sparse_run/predictor.h"

namespace sr {
namespace {

constexpr uint16_t kHalfOne = 0x3c00;

NeuronMatrix pack_rows(const int8_t* codes, int rows, int cols, AlignedBuffer<uint8_t>* data) {
  NeuronMatrix m;
  m.kind = WeightKind::q8;
  m.neurons = rows;
  m.cols = cols;
  m.gated = false;
  std::vector<uint8_t> shifted(size_t(rows) * cols);
  for (size_t i = 0; i < shifted.size(); i++) shifted[i] = uint8_t(int(codes[i]) + code_bias(m.kind));
  const std::vector<uint16_t> ones(size_t(rows) * m.slabs(), kHalfOne);
  data->reset(m.total_bytes(), "a predictor");
  pack_neurons(m, shifted.data(), ones.data(), nullptr, data->data());
  m.data = data->data();
  return m;
}

std::vector<float> finite(const float* values, int n, const char* what) {
  for (int i = 0; i < n; i++) {
    if (!std::isfinite(values[i])) {
      throw Error(ErrorCode::usage, std::string("a predictor's ") + what + " " + std::to_string(i) +
                                        " is not a finite number: train it again with sparse-run train-predictor");
    }
  }
  return std::vector<float>(values, values + n);
}

}  // namespace

LowRank::LowRank(const LowRankWeights& w, int width)
    : a_scale_(finite(w.a_scale, w.rank, "a_scale")),
      b_scale_(finite(w.b_scale, w.n, "b_scale")),
      threshold_(finite(w.threshold, w.n, "threshold")) {
  a_ = pack_rows(w.a, w.rank, width, &a_data_);
  b_ = pack_rows(w.b, w.n, w.rank, &b_data_);
}

size_t LowRank::scratch_bytes() const { return std::max(rows_scratch_bytes(a_), rows_scratch_bytes(b_)); }

void LowRank::hidden(const RowVector& x, int begin, int end, float* hidden) const {
  if (begin < end) kernels().rows_q(a_, x, nullptr, begin, end, nullptr, hidden);
  for (int k = begin; k < end; k++) hidden[k] *= a_scale_[size_t(k)];
}

void LowRank::hidden(const RowVector& x, int count, float* hidden, size_t ld, void* scratch) const {
  if (count) kernels().rows_gemm_q(a_, x, count, nullptr, 0, rank(), nullptr, hidden, ld, scratch);
  for (int i = 0; i < count; i++) {
    for (int k = 0; k < rank(); k++) hidden[size_t(i) * ld + k] *= a_scale_[size_t(k)];
  }
}

void LowRank::scores(const RowVector& hidden, int begin, int end, float* scores) const {
  if (begin < end) kernels().rows_q(b_, hidden, nullptr, begin, end, nullptr, scores);
}

void LowRank::scores(const RowVector& hidden, int count, float* scores, size_t ld, void* scratch) const {
  if (count) kernels().rows_gemm_q(b_, hidden, count, nullptr, 0, n(), nullptr, scores, ld, scratch);
}

}  // namespace sr
