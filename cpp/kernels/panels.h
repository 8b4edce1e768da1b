// Addressing inside stored panels, shared by all instruction sets.
#pragma once

#include <algorithm>

#include "sparse_run/tensor.h"

namespace sr {

// Where a tile lies: its panel's bytes, the panel's rows, the tile's first row inside the panel; where columns are held
// apart, where those of this panel begin.
struct TilePlace {
  const uint8_t* panel;
  int R;
  int row;
  const uint8_t* runs;
};

SR_INLINE TilePlace place_tile(const PanelMatrix& w, int tile) {
  const int row = tile * kTileRows, panel = row / w.panel_rows, first = panel * w.panel_rows;
  return {w.data + size_t(panel) * w.panel_bytes(w.panel_rows), std::min(w.panel_rows, w.padded_rows() - first),
          row - first, w.runs ? w.runs + w.run_bytes(first) : nullptr};
}

}  // namespace sr
