// int8 codes become rows or panels with scales of 1; a row's own scale is applied to its sum.
#include "sparse/predictor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "kernels/pack/pack.h"
#include "kernels/pack/rows.h"
#include "sparse_run/error.h"
#include "sparse_run/predictor.h"

namespace sr {
namespace {

constexpr uint16_t kHalfOne = 0x3c00;

constexpr size_t kHugePage = size_t(2) << 20, kChunk = size_t(8) << 20;
constexpr int kPanelRows = 1408;  // not a multiple of 512, as models have them

// The codes as the narrowest kind of weight that holds them.
WeightKind stored_codes(const int8_t* codes, size_t n, std::vector<uint8_t>* out) {
  const bool narrow = std::all_of(codes, codes + n, [](int8_t c) { return c >= -8 && c <= 7; });
  const WeightKind kind = narrow ? WeightKind::q4 : WeightKind::q8;
  out->resize(n);
  for (size_t i = 0; i < n; i++) (*out)[i] = uint8_t(int(codes[i]) + code_bias(kind));
  return kind;
}

NeuronMatrix rows_form(WeightKind kind, int rows, int cols) {
  NeuronMatrix m;
  m.kind = kind;
  m.neurons = rows;
  m.cols = cols;
  m.gated = false;
  return m;
}

PanelMatrix panels_form(WeightKind kind, int rows, int cols) {
  PanelMatrix m;
  m.kind = kind;
  m.rows = rows;
  m.cols = cols;
  m.panel_rows = std::min(kPanelRows, m.padded_rows());
  return m;
}

NeuronMatrix pack_rows(const int8_t* codes, int rows, int cols, PredictorMemory* memory) {
  std::vector<uint8_t> shifted;
  NeuronMatrix m = rows_form(stored_codes(codes, size_t(rows) * cols, &shifted), rows, cols);
  const std::vector<uint16_t> ones(size_t(rows) * m.slabs(), kHalfOne);
  uint8_t* out = memory->take(m.total_bytes());
  pack_neurons(m, shifted.data(), ones.data(), nullptr, out);
  m.data = out;
  return m;
}

PanelMatrix pack_panels(const int8_t* codes, int rows, int cols, PredictorMemory* memory) {
  std::vector<uint8_t> shifted;
  PanelMatrix m = panels_form(stored_codes(codes, size_t(rows) * cols, &shifted), rows, cols);
  const std::vector<uint16_t> ones(size_t(m.panel_rows) * m.slabs(), kHalfOne);
  uint8_t* out = memory->take(m.total_bytes());
  m.data = out;
  for (int r = 0; r < rows; r += m.panel_rows) {
    const int n = std::min(m.panel_rows, rows - r);
    pack_panel(m.kind, shifted.data() + size_t(r) * cols, ones.data(), nullptr, n, cols, m.group, out);
    out += panel_bytes(m.kind, n, cols, m.group, false);
  }
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

uint8_t* PredictorMemory::take(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > left_) {
    const size_t size = std::max(kChunk, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    chunks_.emplace_back(size + kHugePage, "a predictor");
    AlignedBuffer<uint8_t>& chunk = chunks_.back();
    prefer_huge_pages(chunk.data(), chunk.size());
    at_ = chunk.data() + (kHugePage - reinterpret_cast<uintptr_t>(chunk.data()) % kHugePage) % kHugePage;
    left_ = size;
  }
  uint8_t* out = at_;
  at_ += bytes;
  left_ -= bytes;
  return out;
}

LowRank::LowRank(const LowRankWeights& w, int width, PredictorMemory* memory)
    : a_scale_(finite(w.a_scale, w.rank, "a_scale")),
      b_scale_(finite(w.b_scale, w.n, "b_scale")),
      threshold_(finite(w.threshold, w.n, "threshold")) {
  a_ = pack_rows(w.a, w.rank, width, memory);
  b_ = pack_panels(w.b, w.n, w.rank, memory);
}

size_t LowRank::held_bytes(int rank, int n, int width) {
  const size_t a = rows_form(WeightKind::q8, rank, width).total_bytes();
  const size_t b = panels_form(WeightKind::q8, n, rank).total_bytes();
  // At the end of a chunk room may be left for less than a matrix.
  return a + b + std::max(a, b) * (a + b) / kChunk + (size_t(rank) + 2 * size_t(n)) * sizeof(float);
}

size_t LowRank::scratch_bytes() const { return std::max(rows_scratch_bytes(a_), gemm_scratch_bytes(b_)); }

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

void LowRank::scores(const QuantVector& hidden, int tile_begin, int tile_end, float* scores) const {
  if (tile_begin < tile_end) kernels().gemv_q(b_, hidden, tile_begin, tile_end, scores);
}

void LowRank::scores(const QuantVector& hidden, int count, float* scores, size_t ld, void* scratch) const {
  if (count) kernels().gemm_q(b_, hidden, count, 0, b_.tiles(), scores, ld, scratch);
}

int LowRank::list(int begin, int end, const float* scores, int32_t* ids) const {
  constexpr int kStep = 64;
  int count = 0;
  for (int i = begin; i < end; i += kStep) {
    // Flags first, by vector instructions; then only those that are set are looked at.
    uint8_t flags[kStep] = {};
    const int n = std::min(kStep, end - i);
    for (int k = 0; k < n; k++) flags[k] = predicted(i + k, scores[i + k]);
    for (int k = 0; k < kStep; k += 8) {
      uint64_t word;
      std::memcpy(&word, flags + k, 8);
      for (; word; word &= word - 1) ids[count++] = i + k + __builtin_ctzll(word) / 8;
    }
  }
  return count;
}

}  // namespace sr
