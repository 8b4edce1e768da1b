// The rows that feed the FFN's neurons where they are stored by neuron (layout `neurons`), and their products.
#pragma once

#include <string>
#include <vector>

#include "model/linear.h"

namespace sr {

// The same weights as a Linear of gate and up, or of up alone, but any subset of the neurons can be computed.
struct NeuronRows {
  NeuronMatrix m;              // data is null where the layer has panels instead
  const float* bias = nullptr;  // in the order of the panels' rows: 64 of gate, 64 of up ... where gated
  size_t bytes = 0;
  // Where a memory budget keeps not all of them in memory: tiles of 64 neurons, and where each slice of them lies, as
  // if the whole matrix began there.
  std::vector<Slice> slices;
  std::vector<NeuronMatrix> places;

  explicit operator bool() const { return m.data != nullptr; }
  bool quantised() const { return is_quantised(m.kind); }
  const NeuronMatrix& at(int neuron) const {
    size_t i = 0;
    while (i < slices.size() && neuron >= slices[i].tile_end * kTileRows) i++;
    return slices.empty() ? m : places[i];
  }
};

// Share of neurons above which all are read in one go where it was not measured, of a list, or (gates) of up rows
// behind their gates: short rows of a list are read at a third to a half of the rate of all (cpp/kernels/README.md),
// and gate rows alone a little slower than both.
float break_even_by_row(const NeuronRows& w, bool gates);

// Reads NAME and NAME.bias.
NeuronRows load_neuron_rows(const PackedModel& model, const std::string& name, int neurons, int cols, bool gated);

// gate[k] and up[k] of neuron ids[k] (of neuron k where ids is null), k in [begin, end), bias included, for row 0 of x.
// Either may be null: its weights are then not read. Without a gate only up is there. All must be of one slice.
void rows(const NeuronRows& w, const InputBuffer& x, const int32_t* ids, int begin, int end, float* gate, float* up);
// The first row of neurons [begin, end), gate or, without one, up, bias included: out[k]. m holds no other rows.
void first_rows(const NeuronRows& w, const NeuronMatrix& m, const InputBuffer& x, int begin, int end, float* out);
// The biases alone, for products made elsewhere.
void add_biases(const NeuronRows& w, const int32_t* ids, int begin, int end, float* gate, float* up);
// The same for all neurons of [begin, end) and rows [first, first + n) of x: gate[i * ldy + k]; bit-equal to n rows.
void rows_gemm(const NeuronRows& w, const InputBuffer& x, int first, int n, int begin, int end, float* gate, float* up,
               size_t ldy, void* scratch);

}  // namespace sr
