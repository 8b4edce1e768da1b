// Tiles of a panel are taken apart and put together again plane by plane: units, scales, minima, and of every column
// the codes.
#include "model/ffn_part.h"

#include <algorithm>
#include <cstring>

namespace sr {
namespace {

constexpr const char* kWhat = "a part of an FFN";
constexpr size_t kBeyond = 256;  // what kernels may ask for beyond the last column

// The same matrix in memory of its own, rows and cols being set anew.
PanelMatrix with_room(PanelMatrix m, int rows, int cols, std::vector<AlignedBuffer<uint8_t>>* data) {
  m.rows = rows;
  m.cols = cols;
  data->emplace_back(m.total_bytes() + kBeyond, kWhat);
  prefer_huge_pages(data->back().data(), data->back().size());
  m.data = data->back().data();
  return m;
}

uint8_t* writable(const PanelMatrix& m) { return const_cast<uint8_t*>(m.data); }

// A tile of `bytes` bytes of planes with `item` bytes a row: from row `row` of R to row `to_row` of to_R.
void copy_planes(size_t bytes, size_t item, const uint8_t* from, int R, int row, uint8_t* to, int to_R, int to_row) {
  const size_t planes = bytes / (item * size_t(R));
  for (size_t p = 0; p < planes; p++) {
    std::memcpy(to + item * (p * size_t(to_R) + size_t(to_row)), from + item * (p * size_t(R) + size_t(row)),
                item * kTileRows);
  }
}

// A tile of a slab.
void copy_tile(const PanelMatrix& m, const uint8_t* from, int R, int row, uint8_t* to, int to_R, int to_row) {
  copy_planes(m.slab_head_bytes(R), m.scale_bytes(), from, R, row, to, to_R, to_row);
  from += m.slab_head_bytes(R);
  to += m.slab_head_bytes(to_R);
  // A run holds the low bits of all its tiles, then their high bits (models/format.md).
  const int bits = code_bits(m.kind), low = bits == 8 ? 8 : 4, high = bits - low;
  for (int c = 0; c < kSlabCols; c++, from += m.run_bytes(R), to += m.run_bytes(to_R)) {
    std::memcpy(to + to_row * low / 8, from + row * low / 8, size_t(kTileRows * low / 8));
    if (high) {
      std::memcpy(to + to_R * low / 8 + to_row * high / 8, from + R * low / 8 + row * high / 8,
                  size_t(kTileRows * high / 8));
    }
  }
}

// Where the panel of a row lies, and its rows.
struct Panel {
  uint8_t* data;
  int first, R;
};
Panel panel_of(const PanelMatrix& m, int row) {
  const int first = row / m.panel_rows * m.panel_rows;
  return {writable(m) + size_t(first / m.panel_rows) * m.panel_bytes(m.panel_rows), first,
          std::min(m.panel_rows, m.padded_rows() - first)};
}

PanelMatrix take_tiles(const PanelMatrix& m, const std::vector<int>& tiles, std::vector<AlignedBuffer<uint8_t>>* data) {
  const PanelMatrix out = with_room(m, int(tiles.size()) * kTileRows, m.cols, data);
  for (size_t i = 0; i < tiles.size(); i++) {
    const int row = tiles[i] * kTileRows, to_row = int(i) * kTileRows;
    const Panel from = panel_of(m, row), to = panel_of(out, to_row);
    if (!is_quantised(m.kind)) {
      const size_t tile = m.panel_bytes(kTileRows);
      std::memcpy(to.data + size_t((to_row - to.first) / kTileRows) * tile,
                  from.data + size_t((row - from.first) / kTileRows) * tile, tile);
      continue;
    }
    const size_t units = m.units_bytes(from.R), to_units = out.units_bytes(to.R);
    copy_planes(units, 2, from.data, from.R, row - from.first, to.data, to.R, to_row - to.first);
    for (int s = 0; s < m.slabs(); s++) {
      copy_tile(m, from.data + units + size_t(s) * m.slab_bytes(from.R), from.R, row - from.first,
                to.data + to_units + size_t(s) * out.slab_bytes(to.R), to.R, to_row - to.first);
    }
  }
  return out;
}

PanelMatrix take_columns(const PanelMatrix& m, const std::vector<int>& units,
                         std::vector<AlignedBuffer<uint8_t>>* data) {
  constexpr int kPieceSlabs = kTileRows / kSlabCols;
  SR_CHECK(m.unit_slabs % kPieceSlabs == 0);
  PanelMatrix form = m;
  if (m.unit_slabs) form.unit_slabs = kPieceSlabs;  // neighbours in the part may be of different blocks of the whole
  PanelMatrix out = with_room(form, m.rows, int(units.size()) * kTileRows, data);
  // Stretches hold what is left of their columns, so that sums are those of the whole with the others masked.
  for (int k = 0; k <= m.stretches; k++) {
    out.stretch_borders[k] = 0;
    for (int unit : units) {
      out.stretch_borders[k] += std::min(std::max(m.stretch_borders[k] - unit * kPieceSlabs, 0), kPieceSlabs);
    }
  }
  const bool quantised = is_quantised(m.kind);
  const int step = quantised ? m.panel_rows : kTileRows;  // floats lie tile by tile
  const uint8_t* from = m.data;
  uint8_t* to = writable(out);
  for (int r = 0; r < m.padded_rows(); r += step) {
    const int R = std::min(step, m.padded_rows() - r);
    const size_t unit = quantised ? 2 * m.slab_bytes(R) : m.panel_bytes(R) / size_t(m.cols) * kTileRows;
    const size_t begin = quantised ? m.units_bytes(R) : 0, to_begin = quantised ? out.units_bytes(R) : 0;
    const size_t scales = m.unit_bytes(R);
    for (size_t i = 0; i < units.size(); i++) {
      if (m.unit_slabs) std::memcpy(to + i * scales, from + m.unit_offset(units[i] * kPieceSlabs, R), scales);
      std::memcpy(to + to_begin + i * unit, from + begin + size_t(units[i]) * unit, unit);
    }
    from += m.panel_bytes(R);
    to += out.panel_bytes(R);
  }
  return out;
}

}  // namespace

FfnPart::FfnPart(const LayerWeights& whole, const std::vector<int>& units, bool bias) : weights_(whole), units_(units) {
  const bool by_neuron = bool(whole.ffn_rows);
  const bool gated = by_neuron ? whole.ffn_rows.m.gated : whole.ffn_in.rows == 2 * whole.ffn_down.cols;
  const size_t step = gated ? 2 : 1;  // tiles of a unit
  const float* from = by_neuron ? whole.ffn_rows.bias : whole.ffn_in.bias;
  if (from) {
    const size_t width = step * kTileRows;
    bias_.reset(units.size() * width, kWhat);
    for (size_t i = 0; i < units.size(); i++) std::copy_n(from + size_t(units[i]) * width, width, &bias_[i * width]);
  }
  const float* in_bias = from ? bias_.data() : nullptr;
  if (by_neuron) {
    NeuronMatrix& m = weights_.ffn_rows.m;
    const size_t block = kNeuronBlock * m.record_bytes();
    m.neurons = neurons();
    data_.emplace_back(m.total_bytes() + kBeyond, kWhat);
    uint8_t* to = data_.back().data();
    for (size_t i = 0; i < units.size(); i++) std::memcpy(to + i * block, m.data + size_t(units[i]) * block, block);
    m.data = to;
    weights_.ffn_rows.bias = in_bias;
    weights_.ffn_rows.bytes = m.total_bytes() + bias_.bytes();
  } else {
    std::vector<PanelMatrix> parts;
    for (size_t p = 0; p < whole.ffn_in.parts.size(); p++) {
      std::vector<int> tiles;
      for (int unit : units) {
        for (int tile = unit * int(step); tile < (unit + 1) * int(step); tile++) {
          const int begin = whole.ffn_in.tile_begin[p];
          if (tile >= begin && tile < whole.ffn_in.tile_begin[p + 1]) tiles.push_back(tile - begin);
        }
      }
      if (!tiles.empty()) parts.push_back(take_tiles(whole.ffn_in.parts[p], tiles, &data_));
    }
    weights_.ffn_in = linear_of(std::move(parts), in_bias);
  }
  std::vector<PanelMatrix> parts;
  for (const PanelMatrix& m : whole.ffn_down.parts) parts.push_back(take_columns(m, units, &data_));
  weights_.ffn_down = linear_of(std::move(parts), bias ? whole.ffn_down.bias : nullptr);
}

std::vector<float> pick_neurons(const std::vector<int>& units, const float* all) {
  std::vector<float> out;
  for (int unit : units) out.insert(out.end(), all + unit * kTileRows, all + (unit + 1) * kTileRows);
  return out;
}

}  // namespace sr
