// Addressing inside stored panels, shared by all instruction sets.
#pragma once

#include <algorithm>

#include "sparse_run/tensor.h"

namespace sr {

// Where a tile lies: its panel's slabs, the panel's rows, the tile's first row inside the panel; where columns are held
// apart, where those of this panel begin; the panel's units, where it has them.
struct TilePlace {
  const uint8_t* panel;
  int R;
  int row;
  const uint8_t* runs;
  const uint8_t* units;
};

SR_INLINE TilePlace place_tile(const PanelMatrix& w, int tile) {
  const int row = tile * kTileRows, panel = row / w.panel_rows, first = panel * w.panel_rows;
  const uint8_t* begin = w.data + size_t(panel) * w.panel_bytes(w.panel_rows);
  const int R = std::min(w.panel_rows, w.padded_rows() - first);
  return {begin + w.units_bytes(R), R, row - first, w.runs ? w.runs + w.run_bytes(first) : nullptr,
          w.unit_slabs ? begin : nullptr};
}

// Into how many stretches of columns the products with a quantised matrix are cut. Its shape alone decides. More rows
// than this are enough for every thread to own whole panels; a stretch of fewer slabs than this is over too soon.
SR_INLINE int column_stretches(int rows, int cols) {
  constexpr int kMostRows = 12288, kLeastSlabs = 4;
  if (rows > kMostRows) return 1;
  return std::max(1, std::min((cols + kSlabCols - 1) / kSlabCols / kLeastSlabs, kMostStretches));
}

// Units [begin, end) of a matrix, a unit being a tile of a stretch, stretch by stretch: calls fn(first stretch, last,
// first tile, last) for pieces that gemv does in one go.
template <class Fn>
void for_stretches(int tiles, int begin, int end, Fn fn) {
  while (begin < end) {
    const int k = begin / tiles, first = begin % tiles, whole = first ? 0 : (end - begin) / tiles;
    const int last = std::min(tiles, first + end - begin);
    fn(k, k + std::max(whole, 1), first, last);
    begin += whole ? whole * tiles : last - first;
  }
}

}  // namespace sr
