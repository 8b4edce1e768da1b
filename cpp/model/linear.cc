// Tiles of all parts are numbered through; a range of them is cut at the parts' borders.
#include "model/linear.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "format/packed_model.h"
#include "sparse_run/error.h"

namespace sr {

constexpr size_t kLongRun = 960;  // bytes

void InputBuffer::reset(int n, int width, const char* what, bool rows) {
  width_ = width;
  padded_ = (width + kSlabCols - 1) / kSlabCols * kSlabCols;
  const size_t total = size_t(n) * padded_;
  x_.reset(total, what);
  q_.reset(total, what);
  scale_.reset(total / kSlabCols, what);
  sum_.reset(2 * (total / kSlabCols), what);
  cols_.reset(total, what);
  count_.reset(total / kSlabCols, what);
  if (!rows) return;
  stripes_ = (padded_ + kStripeCols - 1) / kStripeCols;
  const size_t stripes = size_t(n) * stripes_;
  ordered_q_.reset(stripes * kStripeCols, what);
  ordered_scale_.reset(stripes * kRowLanes, what);
  ordered_sum_.reset(stripes * 2 * kRowLanes, what);
}

size_t InputBuffer::bytes() const {
  return x_.bytes() + q_.bytes() + scale_.bytes() + sum_.bytes() + cols_.bytes() + count_.bytes() + ordered_q_.bytes() +
         ordered_scale_.bytes() + ordered_sum_.bytes();
}

void InputBuffer::give_back() {
  x_.give_back();
  q_.give_back();
  scale_.give_back();
  sum_.give_back();
  cols_.give_back();
  count_.give_back();
  ordered_q_.give_back();
  ordered_scale_.give_back();
  ordered_sum_.give_back();
}

void InputBuffer::order(int i) {
  const size_t at = size_t(i) * stripes_;
  order_for_rows(input(i).q, width_, ordered_q_.data() + at * kStripeCols, ordered_scale_.data() + at * kRowLanes,
                 ordered_sum_.data() + at * 2 * kRowLanes);
}

RowVector InputBuffer::ordered(int i) const {
  const size_t at = size_t(i) * stripes_;
  return {ordered_q_.data() + at * kStripeCols, ordered_scale_.data() + at * kRowLanes,
          ordered_sum_.data() + at * 2 * kRowLanes};
}

void InputBuffer::select(int i, const Thresholds& threshold, int begin, int count) {
  const size_t at = size_t(i) * padded_ + begin;
  kernels().select(x_.data() + at, threshold.at + begin * threshold.stride, threshold.stride, count, q_.data() + at,
                   sum_.data() + 2 * (at / kSlabCols),
                   cols_.data() + at, count_.data() + at / kSlabCols);
}

int InputBuffer::kept(int i) const {
  const size_t slabs = size_t(padded_ / kSlabCols);
  const uint8_t* count = count_.data() + i * slabs;
  int total = 0;
  for (size_t s = 0; s < slabs; s++) total += count[s];
  return total;
}

ActiveColumns InputBuffer::active(int i) const {
  const size_t at = size_t(i) * padded_;
  return {cols_.data() + at, count_.data() + at / kSlabCols};
}

void InputBuffer::quantise(int i, int begin, int count) {
  const size_t at = size_t(i) * padded_ + begin;
  kernels().quantise(x_.data() + at, count, q_.data() + at, scale_.data() + at / kSlabCols,
                     sum_.data() + 2 * (at / kSlabCols));
}

Input InputBuffer::input(int row) const {
  const size_t at = size_t(row) * padded_;
  Input in;
  in.x = x_.data() + at;
  in.ldx = size_t(padded_);
  in.q.q = q_.data() + at;
  in.q.scale = scale_.data() + at / kSlabCols;
  in.q.sum = sum_.data() + 2 * (at / kSlabCols);
  return in;
}

int Linear::output_index(int row) const {
  size_t p = 0;
  while (row >= row_begin[p + 1]) p++;
  return tile_begin[p] * kTileRows + row - row_begin[p];
}

void number_parts(Linear* w) {
  w->tile_begin.assign(1, 0);
  w->row_begin.assign(1, 0);
  for (const PanelMatrix& p : w->parts) {
    w->tile_begin.push_back(w->tile_begin.back() + p.tiles());
    w->row_begin.push_back(w->row_begin.back() + p.rows);
  }
}

Linear linear_of(std::vector<PanelMatrix> parts, const float* bias) {
  Linear w;
  w.parts = std::move(parts);
  w.bias = bias;
  number_parts(&w);
  for (const PanelMatrix& p : w.parts) {
    (is_quantised(p.kind) ? w.quantised : w.floating) = true;
    w.bytes += p.total_bytes();
  }
  w.rows = w.row_begin.back();
  w.cols = w.parts.front().cols;
  w.stretches = w.parts.front().stretches;
  if (bias) w.bytes += size_t(w.rows) * sizeof(float);
  return w;
}

Linear load_linear(const PackedModel& model, const std::string& name, int rows, int cols, int unit) {
  std::vector<PanelMatrix> parts = model.matrix(name, rows, cols);
  int end = 0;
  for (const PanelMatrix& p : parts) {
    end += p.rows;
    if (end != rows && end % unit) {
      model.weights().damaged("a part of " + name + " does not end at a multiple of " + std::to_string(unit) + " rows");
    }
  }
  return linear_of(std::move(parts), model.vector(name + ".bias", {rows}, false));
}

float break_even_by_shape(const Linear& w) {
  size_t run = w.parts.empty() ? 0 : SIZE_MAX;
  for (const PanelMatrix& p : w.parts) run = std::min(run, p.run_bytes(std::min(p.panel_rows, p.padded_rows())));
  return run < kLongRun ? 0.7f : 0.9f;
}

int stretches_that_pay(int rows, int cols) {
  constexpr int64_t kLeastWeights = 1 << 21;
  return int64_t(rows) * cols < kLeastWeights ? 1 : column_stretches(rows, cols);
}

void set_stretches(Linear* w, int n) {
  if (w->floating) return;
  w->stretches = n;
  for (PanelMatrix& p : w->parts) p.set_stretches(w->stretches);
}

void set_shares(Linear* w, int threads, int tiles_per_unit) {
  // A border stands where the bytes before it come closest to the thread's part of all bytes.
  std::vector<size_t> before(1, 0);
  for (const PanelMatrix& p : w->parts) {
    for (int t = 0; t < p.tiles(); t++) before.push_back(before.back() + p.total_bytes() / size_t(p.tiles()));
  }
  const int units = (w->tiles() + tiles_per_unit - 1) / tiles_per_unit;
  w->share.assign(1, 0);
  int unit = 0;
  for (int t = 1; t < threads; t++) {
    const double target = double(before.back()) * t / threads;
    const auto at = [&](int u) { return double(before[size_t(std::min(u * tiles_per_unit, w->tiles()))]); };
    while (unit < units && at(unit + 1) <= target) unit++;
    if (unit < units && at(unit + 1) - target < target - at(unit)) unit++;
    const int even = std::min(unit * tiles_per_unit, w->tiles());
    // A panel's border nearby is better: cut elsewhere, a thread would walk a few tiles of a panel at half of the
    // memory's speed (qkv of a 135M model: 35% against 74% of the stream rate).
    const int each = w->tiles() / threads;
    int border = even, nearest = (each < 4 ? 0 : std::max(1, each / 8)) + 1;  // shares of few tiles stay even
    for (size_t p = 0; p < w->parts.size(); p++) {
      const int step = w->parts[p].panel_rows / kTileRows;
      for (int b = w->tile_begin[p]; b <= w->tile_begin[p + 1]; b += step) {
        if (b % tiles_per_unit || std::abs(b - even) >= nearest) continue;
        nearest = std::abs(b - even);
        border = b;
      }
    }
    w->share.push_back(std::max(border, w->share.back()));
  }
  w->share.push_back(w->tiles());
  if (w->stretches == 1) return;
  // The same of tiles of stretches. Whole stretches are better: they are read in whole runs.
  const int tiles = w->tiles(), all = w->stretches * tiles;
  w->unit_share.assign(1, 0);
  for (int t = 1; t < threads; t++) {
    const double target = double(before.back()) * w->stretches * t / threads;
    int even = std::max(0, int(target / double(before.back())) * tiles);
    while (even < all && double(before[size_t(even % tiles)]) < target - double(even / tiles) * double(before.back())) {
      even++;
    }
    const int border = (even + tiles / 2) / tiles * tiles;
    const bool near = std::abs(border - even) <= all / threads / 8;
    w->unit_share.push_back(std::max(near ? border : even, w->unit_share.back()));
  }
  w->unit_share.push_back(all);
}

std::vector<int> even_share(int tile_begin, int tile_end, int threads, int tiles_per_unit) {
  const int units = (tile_end - tile_begin + tiles_per_unit - 1) / tiles_per_unit;
  std::vector<int> share;
  for (int t = 0; t <= threads; t++) {
    share.push_back(std::min(tile_begin + units * t / threads * tiles_per_unit, tile_end));
  }
  return share;
}

namespace {

// Calls fn(part, first tile in the part, last, first true row, end of true rows, offset of the part's output).
template <class Fn>
void for_each_part(const Linear& w, int tile_begin, int tile_end, Fn fn) {
  for (size_t p = 0; p < w.parts.size(); p++) {
    const int begin = std::max(tile_begin, w.tile_begin[p]) - w.tile_begin[p];
    const int end = std::min(tile_end, w.tile_begin[p + 1]) - w.tile_begin[p];
    if (begin >= end) continue;
    fn(w.parts[p], begin, end, begin * kTileRows, std::min(end * kTileRows, w.parts[p].rows),
       size_t(w.tile_begin[p]) * kTileRows, w.bias ? w.bias + w.row_begin[p] : nullptr);
  }
}

void add_bias(const float* bias, int begin, int end, float* y) {
  if (!bias) return;
  for (int r = begin; r < end; r++) y[r] += bias[r];
}

void multiply(const PanelMatrix& m, const Input& x, int tile_begin, int tile_end, float* y) {
  const KernelTable& k = kernels();
  if (!is_quantised(m.kind)) k.gemv_f(m, x.x, tile_begin, tile_end, y);
  else if (x.active.cols) k.gemv_q_cols(m, x.q, x.active, tile_begin, tile_end, y);
  else k.gemv_q(m, x.q, tile_begin, tile_end, y);
}

// y as gemv makes it, where the products come in several sums.
void multiply_and_add(const PanelMatrix& m, const Input& x, int tile_begin, int tile_end, float* y) {
  constexpr int kTogether = 16;  // tiles
  float sums[kMostStretches * kTogether * kTileRows];
  for (int first = tile_begin; first < tile_end; first += kTogether) {
    const int last = std::min(tile_end, first + kTogether), n = (last - first) * kTileRows;
    float* own = indexed_from(sums, size_t(first) * kTileRows);
    multiply(m.some_stretches(0, m.stretches, size_t(n)), x, first, last, own);
    float* to = y + size_t(first) * kTileRows;
    std::copy_n(sums, n, to);
    for (int k = 1; k < m.stretches; k++) {
      for (int r = 0; r < n; r++) to[r] += sums[k * n + r];
    }
  }
}

}  // namespace

void gemv(const Linear& w, const Input& x, int tile_begin, int tile_end, float* y) {
  for_each_part(w, tile_begin, tile_end,
                [&](const PanelMatrix& m, int begin, int end, int row, int row_end, size_t offset, const float* bias) {
                  float* to = y + offset;
                  if (m.stretches == 1) {
                    multiply(m, x, begin, end, to);
                  } else {
                    multiply_and_add(m, x, begin, end, to);
                  }
                  add_bias(bias, row, row_end, to);
                });
}

void gemv_partial(const Linear& w, const Input& x, int begin, int end, float* y) {
  const size_t apart = size_t(w.padded_rows());
  for_stretches(w.tiles(), begin, end, [&](int k, int k_end, int first, int last) {
    for_each_part(w, first, last, [&](const PanelMatrix& m, int from, int to, int, int, size_t offset, const float*) {
      multiply(m.some_stretches(k, k_end, apart), x, from, to, y + size_t(k) * apart + offset);
    });
  });
}

void add_partials(const Linear& w, const float* partial, float* y) {
  const int n = w.padded_rows();
  std::copy_n(partial, n, y);
  for (int k = 1; k < w.stretches; k++) {
    const float* more = partial + size_t(k) * size_t(n);
    for (int r = 0; r < n; r++) y[r] += more[r];
  }
  for (size_t p = 0; w.bias && p < w.parts.size(); p++) {
    add_bias(w.bias + w.row_begin[p], 0, w.parts[p].rows, y + size_t(w.tile_begin[p]) * kTileRows);
  }
}

void gemm(const Linear& w, const Input& x, int n, int tile_begin, int tile_end, float* y, size_t ldy, void* scratch) {
  const KernelTable& k = kernels();
  for_each_part(w, tile_begin, tile_end,
                [&](const PanelMatrix& m, int begin, int end, int row, int row_end, size_t offset, const float* bias) {
                  if (is_quantised(m.kind)) {
                    k.gemm_q(m, x.q, n, begin, end, y + offset, ldy, scratch);
                  } else {
                    k.gemm_f(m, x.x, x.ldx, n, begin, end, y + offset, ldy, scratch);
                  }
                  for (int i = 0; bias && i < n; i++) add_bias(bias, row, row_end, y + offset + i * ldy);
                });
}

}  // namespace sr
