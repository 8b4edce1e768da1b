// Kernels by kind of weights, and the bias, which is stored in the panels' order.
#include "model/neuron_rows.h"

#include "format/packed_model.h"

namespace sr {
namespace {

// out[k] += the bias of neuron ids[k]; blocks of `step` rows hold 64 neurons, this kind of row beginning at `offset`.
void add_neuron_bias(const float* bias, int step, int offset, const int32_t* ids, int begin, int end, float* out) {
  for (int k = begin; k < end; k++) {
    const int id = ids ? ids[k] : k;
    out[k] += bias[id / kTileRows * step + offset + id % kTileRows];
  }
}

}  // namespace

void add_biases(const NeuronRows& w, const int32_t* ids, int begin, int end, float* gate, float* up) {
  if (!w.bias) return;
  const int step = w.m.gated ? 2 * kTileRows : kTileRows;
  if (gate) add_neuron_bias(w.bias, step, 0, ids, begin, end, gate);
  if (up) add_neuron_bias(w.bias, step, w.m.gated ? kTileRows : 0, ids, begin, end, up);
}

float break_even_by_row(const NeuronRows& w, bool gates) {
  const size_t bytes = w ? w.m.row_stride() : SIZE_MAX;
  if (bytes < 512) return gates ? 0.25f : 0.4f;
  return bytes < 1024 ? 0.7f : 0.85f;
}

NeuronRows load_neuron_rows(const PackedModel& model, const std::string& name, int neurons, int cols, bool gated) {
  NeuronRows w;
  w.m = model.neurons(name, neurons, cols, gated);
  w.bytes = w.m.total_bytes();
  const int64_t rows = int64_t(neurons) * (gated ? 2 : 1);
  w.bias = model.vector(name + ".bias", {rows}, false);
  if (w.bias) w.bytes += size_t(rows) * sizeof(float);
  return w;
}

void rows(const NeuronRows& w, const InputBuffer& x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  if (begin >= end) return;
  const NeuronMatrix& m = w.at(ids ? ids[begin] : begin);
  if (w.quantised()) kernels().rows_q(m, x.ordered(0), ids, begin, end, gate, up);
  else kernels().rows_f(m, x.input(0).x, ids, begin, end, gate, up);
  add_biases(w, ids, begin, end, gate, up);
}

void first_rows(const NeuronRows& w, const NeuronMatrix& m, const InputBuffer& x, int begin, int end, float* out) {
  if (w.quantised()) kernels().rows_q(m, x.ordered(0), nullptr, begin, end, nullptr, out);
  else kernels().rows_f(m, x.input(0).x, nullptr, begin, end, nullptr, out);
  add_biases(w, nullptr, begin, end, w.m.gated ? out : nullptr, w.m.gated ? nullptr : out);
}

void rows_gemm(const NeuronRows& w, const InputBuffer& x, int first, int n, int begin, int end, float* gate, float* up,
               size_t ldy, void* scratch) {
  const KernelTable& k = kernels();
  const NeuronMatrix& m = w.at(begin);
  if (w.quantised()) {
    k.rows_gemm_q(m, x.ordered(first), n, nullptr, begin, end, gate, up, ldy, scratch);
  } else {
    const Input in = x.input(first);
    k.rows_gemm_f(m, in.x, in.ldx, n, nullptr, begin, end, gate, up, ldy, scratch);
  }
  for (int i = 0; w.bias && i < n; i++) {
    add_biases(w, nullptr, begin, end, gate ? gate + i * ldy : nullptr, up ? up + i * ldy : nullptr);
  }
}

}  // namespace sr
