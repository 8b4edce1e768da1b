// Pure functions between plain weights and the stored rows of neurons of models/format.md.
#pragma once

#include <cstdint>

#include "sparse_run/tensor.h"

namespace sr {

// In all three, `shape` says what is stored, and plain rows are in the order of neurons: gate 0, up 0, gate 1, up 1 ...
// where gated, else up 0, up 1 ...; R = neurons * (gated ? 2 : 1) rows.

// codes [R, cols] u8; scales, mins [R, ceil(cols / group)] as half bits, mins null if none; out shape.total_bytes().
void pack_neurons(const NeuronMatrix& shape, const uint8_t* codes, const uint16_t* scales, const uint16_t* mins,
                  uint8_t* out);
// values [R, cols] fp32.
void pack_neurons_float(const NeuronMatrix& shape, const float* values, uint8_t* out);
// The weights [R, cols], in fp32.
void unpack_neurons(const NeuronMatrix& w, float* out);

}  // namespace sr
