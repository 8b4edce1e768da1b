// Packs weights into panels and reads them back; see models/format.md for the layout.
#include "kernels/pack/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/f16.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr const char* kNames[] = {"q4", "q5", "q6", "q8", "f32", "f16", "bf16"};

PanelMatrix one_panel(WeightKind kind, int rows, int cols, int group, bool has_min, int unit_slabs = 0) {
  PanelMatrix m;
  m.unit_slabs = unit_slabs;
  m.kind = kind;
  m.has_min = has_min;
  m.group = group;
  m.rows = rows;
  m.cols = cols;
  m.panel_rows = m.padded_rows();
  return m;
}

// Puts code u of row r into the run of one column of a panel with R rows.
void put_code(WeightKind kind, uint8_t* run, int R, int r, unsigned u) {
  const int tile = r / kTileRows, i = r % kTileRows;
  if (kind == WeightKind::q8) {
    run[r] = uint8_t(u);
    return;
  }
  run[tile * 32 + i % 32] |= uint8_t((u & 15) << (i / 32 * 4));
  uint8_t* high = run + R / 2;
  if (kind == WeightKind::q5) high[tile * 8 + i % 8] |= uint8_t((u >> 4) << (i / 8));
  if (kind == WeightKind::q6) high[tile * 16 + i % 16] |= uint8_t((u >> 4) << (i / 16 * 2));
}

unsigned get_code(WeightKind kind, const uint8_t* run, int R, int r) {
  const int tile = r / kTileRows, i = r % kTileRows;
  if (kind == WeightKind::q8) return run[r];
  unsigned u = run[tile * 32 + i % 32] >> (i / 32 * 4) & 15;
  const uint8_t* high = run + R / 2;
  if (kind == WeightKind::q5) u |= unsigned(high[tile * 8 + i % 8] >> (i / 8) & 1) << 4;
  if (kind == WeightKind::q6) u |= unsigned(high[tile * 16 + i % 16] >> (i / 16 * 2) & 3) << 4;
  return u;
}

float load_float(WeightKind kind, const uint8_t* p, size_t i) {
  if (kind == WeightKind::f32) {
    float f;
    std::memcpy(&f, p + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return kind == WeightKind::f16 ? f16_to_f32(h) : bf16_to_f32(h);
}

float load_half(const uint8_t* p, size_t i) {
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return f16_to_f32(h);
}

// Weight (r, c) of a panel with R rows.
float panel_weight(const PanelMatrix& m, const uint8_t* panel, int R, int r, int c) {
  if (!is_quantised(m.kind)) {
    const size_t tile = size_t(r / kTileRows) * m.cols * kTileRows;
    return load_float(m.kind, panel, tile + size_t(c) * kTileRows + r % kTileRows);
  }
  const int s = c / kSlabCols, part = c % kSlabCols / m.group, parts = kSlabCols / m.group;
  const uint8_t* slab = panel + m.units_bytes(R) + size_t(s) * m.slab_bytes(R);
  const auto scale_at = [&](int i) {
    const size_t place = size_t(i) * R + r;
    if (!m.unit_slabs) return load_half(slab, place);
    return float(int8_t(slab[place])) * load_half(panel + m.unit_offset(s, R), size_t(i / parts) * R + r);
  };
  const float scale = scale_at(part);
  const uint8_t* run = slab + m.slab_head_bytes(R) + size_t(c % kSlabCols) * m.run_bytes(R);
  const int u = int(get_code(m.kind, run, R, r));
  if (!m.has_min) return scale * float(u - code_bias(m.kind));
  return std::fma(scale, float(u), scale_at(parts + part));
}

// Planes [blocks, R] of what is given row by row, [rows, blocks]: plane i of block k at k apart + i R items.
template <class T>
void put_planes(const T* from, int rows, int blocks, int R, int parts, size_t apart, uint8_t* to) {
  for (int b = 0; b < blocks; ++b) {
    uint8_t* plane = to + size_t(b / parts) * apart + size_t(b % parts) * R * sizeof(T);
    for (int r = 0; r < rows; ++r) std::memcpy(plane + r * sizeof(T), from + size_t(r) * blocks + b, sizeof(T));
  }
}

// scales, mins [rows, groups], mins null if none, and the codes; the rest of `out` is zeros.
template <class T>
void put_slabs(const PanelMatrix& m, const uint8_t* codes, const T* scales, const T* mins, uint8_t* out) {
  const int R = m.padded_rows(), parts = kSlabCols / m.group, groups = (m.cols + m.group - 1) / m.group;
  uint8_t* first = out + m.units_bytes(R);
  put_planes(scales, m.rows, groups, R, parts, m.slab_bytes(R), first);
  if (mins) put_planes(mins, m.rows, groups, R, parts, m.slab_bytes(R), first + size_t(parts) * R * sizeof(T));
  for (int s = 0; s < m.slabs(); ++s) {
    const int width = std::min(kSlabCols, m.cols - s * kSlabCols);
    uint8_t* runs = first + size_t(s) * m.slab_bytes(R) + m.slab_head_bytes(R);
    // Row by row, so that the source is read in order.
    for (int r = 0; r < m.rows; ++r) {
      const uint8_t* row = codes + size_t(r) * m.cols + size_t(s) * kSlabCols;
      for (int c = 0; c < width; ++c) put_code(m.kind, runs + c * m.run_bytes(R), R, r, row[c]);
    }
  }
}

void check_packable(WeightKind kind, int rows, int cols, int group) {
  SR_CHECK(is_quantised(kind) && (group == 16 || group == 32) && rows > 0 && cols > 0);
}

}  // namespace

WeightKind weight_kind_from_name(const std::string& name) {
  for (int i = 0; i < 7; ++i)
    if (name == kNames[i]) return WeightKind(i);
  throw Error(ErrorCode::usage, "unknown weight kind '" + name + "'; known: q4 q5 q6 q8 f32 f16 bf16");
}

const char* weight_kind_name(WeightKind kind) { return kNames[int(kind)]; }

size_t panel_bytes(WeightKind kind, int rows, int cols, int group, bool has_min, int unit_slabs) {
  const PanelMatrix m = one_panel(kind, rows, cols, group, has_min, unit_slabs);
  return m.panel_bytes(m.padded_rows());
}

void pack_panel(WeightKind kind, const uint8_t* codes, const uint16_t* scales, const uint16_t* mins, int rows, int cols,
                int group, uint8_t* out) {
  check_packable(kind, rows, cols, group);
  const PanelMatrix m = one_panel(kind, rows, cols, group, mins != nullptr);
  std::memset(out, 0, m.total_bytes());
  put_slabs(m, codes, scales, mins, out);
}

void pack_panel(WeightKind kind, const uint8_t* codes, const UnitScales& scales, int rows, int cols, int group,
                uint8_t* out) {
  check_packable(kind, rows, cols, group);
  const PanelMatrix m = one_panel(kind, rows, cols, group, scales.mins != nullptr, kUnitSlabs);
  const int R = m.padded_rows(), blocks = (m.slabs() + kUnitSlabs - 1) / kUnitSlabs;
  const size_t apart = m.unit_bytes(R);
  std::memset(out, 0, m.total_bytes());
  put_planes(scales.units, rows, blocks, R, 1, apart, out);
  if (scales.mins) put_planes(scales.min_units, rows, blocks, R, 1, apart, out + 2 * size_t(R));
  put_slabs(m, codes, scales.scales, scales.mins, out);
}

void pack_panel_float(WeightKind kind, const float* values, int rows, int cols, uint8_t* out) {
  SR_CHECK(!is_quantised(kind) && rows > 0 && rows <= kTileRows && cols > 0);
  for (int c = 0; c < cols; ++c)
    for (int r = 0; r < kTileRows; ++r) {
      const float v = r < rows ? values[size_t(r) * cols + c] : 0.0f;
      const size_t i = size_t(c) * kTileRows + r;
      if (kind == WeightKind::f32) {
        std::memcpy(out + 4 * i, &v, 4);
      } else {
        const uint16_t h = kind == WeightKind::f16 ? f32_to_f16(v) : f32_to_bf16(v);
        std::memcpy(out + 2 * i, &h, 2);
      }
    }
}

void unpack_panel(WeightKind kind, const uint8_t* data, int rows, int cols, int group, bool has_min, float* out,
                  int unit_slabs) {
  const PanelMatrix m = one_panel(kind, rows, cols, group, has_min, unit_slabs);
  const int R = m.padded_rows();
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) out[size_t(r) * cols + c] = panel_weight(m, data, R, r, c);
}

void unpack_row(const PanelMatrix& w, int row, float* out) {
  const int first = row / w.panel_rows * w.panel_rows;
  const int R = std::min(w.panel_rows, w.padded_rows() - first);
  const uint8_t* panel = w.data + size_t(row / w.panel_rows) * w.panel_bytes(w.panel_rows);
  for (int c = 0; c < w.cols; ++c) out[c] = panel_weight(w, panel, R, row - first, c);
}

}  // namespace sr
