// Addressing inside stored panels, shared by all instruction sets.
#pragma once

#include <algorithm>

#include "sparse_run/tensor.h"

namespace sr {

// Where a tile lies: its panel's bytes, the panel's rows, and the tile's first row inside the panel.
struct TilePlace {
  const uint8_t* panel;
  int R;
  int row;
};

SR_INLINE TilePlace place_tile(const PanelMatrix& w, int tile) {
  const int row = tile * kTileRows, panel = row / w.panel_rows, first = panel * w.panel_rows;
  return {w.data + size_t(panel) * w.panel_bytes(w.panel_rows), std::min(w.panel_rows, w.padded_rows() - first),
          row - first};
}

// Calls fn(panel bytes, R, first row inside the panel, number of tiles, first row of the matrix) for every stretch of
// [tile_begin, tile_end) that lies in one panel.
template <class Fn>
SR_INLINE void for_each_stretch(const PanelMatrix& w, int tile_begin, int tile_end, Fn fn) {
  while (tile_begin < tile_end) {
    const TilePlace at = place_tile(w, tile_begin);
    const int n = std::min(tile_end - tile_begin, (at.R - at.row) / kTileRows);
    fn(at.panel, at.R, at.row, n, tile_begin * kTileRows);
    tile_begin += n;
  }
}

}  // namespace sr
