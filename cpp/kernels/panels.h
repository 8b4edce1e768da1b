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

}  // namespace sr
