// Panels are expanded one at a time, so that the host needs no second copy of a matrix.
#include "cuda/upload.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/rows.h"

namespace sr {
namespace cuda {
namespace {

bool expanded(WeightKind kind) { return kind == WeightKind::q5 || kind == WeightKind::q6; }

Store store_of(WeightKind kind) {
  switch (kind) {
    case WeightKind::q4: return Store::q4;
    case WeightKind::f32: return Store::f32;
    case WeightKind::f16: return Store::f16;
    case WeightKind::bf16: return Store::bf16;
    default: return Store::q8;
  }
}

// As m, stored with a byte per weight.
PanelMatrix in_bytes(PanelMatrix m) {
  if (expanded(m.kind)) m.kind = WeightKind::q8;
  return m;
}

int groups_of(const PanelMatrix& m) {
  const int rows = group_rows(store_of(m.kind));
  return (m.padded_rows() + rows - 1) / rows;
}

// One run of a panel of R rows: nibbles of all tiles, then their high bits.
void expand_run(WeightKind kind, const uint8_t* run, int R, uint8_t* out) {
  const uint8_t shift = uint8_t(128 - code_bias(kind));
  const uint8_t* high = run + R / 2;
  for (int tile = 0; tile < R / kTileRows; tile++, run += 32, out += kTileRows) {
    for (int i = 0; i < 32; i++) {
      out[i] = run[i] & 15;
      out[i + 32] = run[i] >> 4;
    }
    if (kind == WeightKind::q5) {
      for (int i = 0; i < kTileRows; i++) out[i] |= uint8_t((high[i % 8] >> (i / 8) & 1) << 4);
      high += 8;
    } else {
      for (int i = 0; i < kTileRows; i++) out[i] |= uint8_t((high[i % 16] >> (i / 16 * 2) & 3) << 4);
      high += 16;
    }
    for (int i = 0; i < kTileRows; i++) out[i] = uint8_t(out[i] + shift);
  }
}

void expand_panel(const PanelMatrix& m, const uint8_t* in, int R, uint8_t* out) {
  const size_t units = m.units_bytes(R), head = m.slab_head_bytes(R);
  if (units) std::memcpy(out, in, units);
  in += units;
  out += units;
  for (int s = 0; s < m.slabs(); s++) {
    std::memcpy(out, in, head);
    in += head;
    out += head;
    for (int c = 0; c < kSlabCols; c++, in += m.run_bytes(R), out += R) expand_run(m.kind, in, R, out);
  }
}

// Calls fn(panel's bytes, its rows) for every panel.
template <class Fn>
void for_panels(const PanelMatrix& m, Fn fn) {
  const uint8_t* p = m.data;
  for (int r = 0; r < m.padded_rows(); r += m.panel_rows) {
    const int R = std::min(m.panel_rows, m.padded_rows() - r);
    fn(p, R);
    p += m.panel_bytes(R);
  }
}

}  // namespace

size_t device_bytes(const PanelMatrix& m) { return in_bytes(m).total_bytes(); }

size_t device_bytes(const Linear& m) {
  size_t n = m.bias ? size_t(m.rows) * sizeof(float) : 0;
  for (const PanelMatrix& p : m.parts) n += device_bytes(p);
  return n;
}

size_t device_bytes(const NeuronRows& m) {
  if (!m) return 0;
  return m.m.total_bytes() + (m.bias ? size_t(m.m.neurons) * (m.m.gated ? 2 : 1) * sizeof(float) : 0);
}

int gemv_groups(const Linear& m) {
  int n = 0;
  for (const PanelMatrix& p : m.parts) n += groups_of(p);
  return n;
}

void expand_to_bytes(const PanelMatrix& m, uint8_t* out) {
  const PanelMatrix bytes = in_bytes(m);
  for_panels(m, [&](const uint8_t* p, int R) {
    expand_panel(m, p, R, out);
    out += bytes.panel_bytes(R);
  });
}

DeviceMatrix::DeviceMatrix(const std::vector<PanelMatrix>& parts, const float* add, const char* what) {
  if (parts.size() > size_t(kMaxParts)) {
    throw Error(ErrorCode::unsupported, std::string(what) + " is in " + std::to_string(parts.size()) +
                                            " parts, the GPU takes at most " + std::to_string(kMaxParts) +
                                            ": use --device cpu");
  }
  Matrix& w = view_;
  w.cols = parts.front().cols;
  w.slabs = parts.front().slabs();
  for (const PanelMatrix& m : parts) w.rows += m.rows;
  if (add) add_ = to_device(add, size_t(w.rows), what);
  int row = 0;
  for (const PanelMatrix& m : parts) {
    const PanelMatrix stored = in_bytes(m);
    DeviceBuffer<uint8_t> data(stored.total_bytes(), what);
    if (expanded(m.kind)) {
      std::vector<uint8_t> staging(stored.panel_bytes(std::min(m.panel_rows, m.padded_rows())));
      size_t at = 0;
      for_panels(m, [&](const uint8_t* p, int R) {
        expand_panel(m, p, R, staging.data());
        copy_to_device(data.data() + at, staging.data(), stored.panel_bytes(R), what);
        at += stored.panel_bytes(R);
      });
    } else {
      copy_to_device(data.data(), m.data, data.bytes(), what);
    }
    Part& p = w.part[w.n_parts++];
    p.data = data.data();
    p.store = store_of(m.kind);
    p.has_min = m.has_min;
    p.group = m.group;
    p.unit_slabs = m.unit_slabs;
    p.bias = is_quantised(m.kind) ? code_bias(m.kind) : 0;
    p.rows = m.rows;
    p.cols = m.cols;
    p.slabs = m.slabs();
    p.tiles = m.tiles();
    p.panel_rows = m.panel_rows;
    p.add = add ? add_.data() + row : nullptr;
    p.y_begin = w.y_rows;
    p.first_group = w.groups;
    w.groups += groups_of(m);
    w.y_rows += m.padded_rows();
    w.bytes += data.bytes();
    (is_quantised(m.kind) ? w.quantised : w.floating) = true;
    if (is_quantised(m.kind)) w.head_bytes += m.heads_bytes(m.padded_rows());
    row += m.rows;
    data_.push_back(std::move(data));
  }
}

DeviceNeurons::DeviceNeurons(const NeuronMatrix& m, const float* add, const char* what)
    : data_(to_device(m.data, m.total_bytes(), what)) {
  const RowPlan plan(m);
  view_ = {};
  view_.data = data_.data();
  view_.kind = m.kind;
  view_.has_min = m.has_min;
  view_.group = m.group;
  view_.neurons = m.neurons;
  view_.cols = m.cols;
  view_.gated = m.gated;
  view_.slabs = m.slabs();
  view_.row_stride = m.row_stride();
  view_.up_offset = m.up_offset();
  view_.record_bytes = m.record_bytes();
  view_.high = plan.high;
  view_.scale = plan.scale;
  view_.min = plan.min;
  if (add) {
    add_ = to_device(add, size_t(m.neurons) * (m.gated ? 2 : 1), what);
    view_.add = add_.data();
  }
}

namespace {
int padded_to_slabs(int width) { return (width + kSlabCols - 1) / kSlabCols * kSlabCols; }
}  // namespace

Vectors narrow(Vectors v, int width) {
  v.width = width;
  v.padded = padded_to_slabs(width);
  v.slabs = v.padded / kSlabCols;
  return v;
}

DeviceVectors::DeviceVectors(int n, int width, const char* what) {
  const size_t padded = size_t(padded_to_slabs(width)), total = size_t(n) * padded, slabs = total / kSlabCols;
  x_.reset(total, what);
  q_.reset(total, what);
  scale_.reset(slabs, what);
  sum_.reset(2 * slabs, what);
  cols_.reset(padded, what);
  listed_.reset(padded, what);
  count_.reset(2 * (padded / kSlabCols), what);
  view_ = narrow(
      {x_.data(), q_.data(), scale_.data(), sum_.data(), cols_.data(), listed_.data(), count_.data(), 0, 0, 0}, width);
}

size_t DeviceVectors::bytes(int n, int width) {
  const size_t padded = size_t(padded_to_slabs(width)), total = size_t(n) * padded;
  return total * (sizeof(float) + 1) + total / kSlabCols * (sizeof(float) + 2 * sizeof(int)) + 2 * padded +
         2 * (padded / kSlabCols);
}

}  // namespace cuda
}  // namespace sr
