// Pure functions between plain weights and the stored panels of models/format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "sparse_run/tensor.h"

namespace sr {

// "q4" ... "bf16" to the kind; throws Error(usage) on another name.
WeightKind weight_kind_from_name(const std::string& name);
const char* weight_kind_name(WeightKind kind);

// Slabs that share a unit in what is packed here: 256 columns, as the K types of GGUF have them.
constexpr int kUnitSlabs = 8;

// Bytes of one panel of `rows` rows (padded up to a multiple of 64) and `cols` columns.
size_t panel_bytes(WeightKind kind, int rows, int cols, int group, bool has_min, int unit_slabs = 0);

// codes [rows, cols] u8; scales, mins [rows, ceil(cols / group)] as half bits, mins null if none; out panel_bytes().
void pack_panel(WeightKind kind, const uint8_t* codes, const uint16_t* scales, const uint16_t* mins, int rows, int cols,
                int group, uint8_t* out);

// Scales and minima that are products: int8 [rows, ceil(cols / group)] times halves [rows, ceil(cols / 256)].
struct UnitScales {
  const int8_t *scales, *mins;  // mins null if none
  const uint16_t *units, *min_units;
};
void pack_panel(WeightKind kind, const uint8_t* codes, const UnitScales& scales, int rows, int cols, int group,
                uint8_t* out);

// values [rows, cols] fp32, rows <= 64; out panel_bytes().
void pack_panel_float(WeightKind kind, const float* values, int rows, int cols, uint8_t* out);

// The weights [rows, cols] of one panel, in fp32.
void unpack_panel(WeightKind kind, const uint8_t* data, int rows, int cols, int group, bool has_min, float* out,
                  int unit_slabs = 0);

// Columns 0..cols-1 of one row of a stored matrix, in fp32 (embedding look-up).
void unpack_row(const PanelMatrix& w, int row, float* out);

}  // namespace sr
