// The first half of an FFN, input to z = act(gate) * up, where the weights lie by neuron: which neurons' rows are read.
// A neuron that is left out has z = 0, so the columns of down that it would multiply are left out with it.
#include <algorithm>
#include <cmath>

#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {
namespace {

// Whether a neuron is kept: |g| above its threshold, or not 0 where there is none. What is not a number is kept, not
// hidden.
bool survives(float g, const float* threshold, int id) {
  return !(std::fabs(g) <= (threshold ? threshold[id] : 0.0f));
}

}  // namespace

Decoder::NeuronShare Decoder::neuron_share(int tid, int layer) const {
  const LayerWeights& w = ffn_weights(layer);
  if (w.ffn_rows) {
    const int units = config_.n_ff / kTileRows, threads = pool_.size();
    return {units * tid / threads * kTileRows, units * (tid + 1) / threads * kTileRows};
  }
  const int rows = config_.ffn_gated ? kTileRows / 2 : kTileRows;
  return {w.ffn_in.share[size_t(tid)] * rows, w.ffn_in.share[size_t(tid) + 1] * rows};
}

void Decoder::decode_panels(int tid, const Pass& pass, int layer, NeuronShare share) {
  const Linear& w = ffn_weights(layer).ffn_in;
  const bool gated = config_.ffn_gated;
  gemv(w, masked(pass, tid, layer, Site::M, &thread_[size_t(tid)]->in), w.share[size_t(tid)], w.share[size_t(tid) + 1],
       gate_up_.data());
  for (int neuron = share.begin; neuron < share.end; neuron += kTileRows) {
    float* gate = gate_up_.data() + size_t(neuron) * (gated ? 2 : 1);
    activate(gate, gated ? gate + kTileRows : nullptr, kTileRows, z_.row(0) + neuron);
  }
}

// Gate rows of all neurons of the share; then, where it pays, up rows of those only that are not 0 (that exceed the
// thresholds of site G). Whether it pays is decided by what the share's last token kept: reading gate and up in one go is
// faster than reading them one after the other.
void Decoder::decode_neurons(int tid, const Pass& pass, int layer, NeuronShare share) {
  Thread& t = *thread_[size_t(tid)];
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  const int begin = share.begin, end = share.end;
  float *gate = gate_up_.data(), *up = gate + config_.n_ff, *z = z_.row(0);
  if (begin >= end) return;
  if (!config_.ffn_gated) {
    rows(w, t.in, nullptr, begin, end, nullptr, up);
    activate(up + begin, nullptr, end - begin, z + begin);
    return;
  }
  const float* threshold = threshold_for(pass, layer, Site::G, pass.pos, true);
  const bool choose = threshold || skips_zeros(pass);
  float* last_kept = &t.kept_share[size_t(layer)];
  const bool apart = choose && *last_kept <= break_even(pass);
  rows(w, t.in, nullptr, begin, end, gate, apart ? nullptr : up);
  activate(gate + begin, nullptr, end - begin, gate + begin);
  if (!choose) {
    activate_up(up + begin, end - begin);
    for (int i = begin; i < end; i++) z[i] = gate[i] * up[i];
    return;
  }
  int32_t* ids = survivors_.data() + begin;
  int kept = 0;
  for (int i = begin; i < end; i++) {
    ids[kept] = i;
    kept += survives(gate[i], threshold, i);
  }
  *last_kept = float(kept) / float(end - begin);
  count_neurons(pass, w, kept, end - begin, apart);
  std::fill(z + begin, z + end, 0.0f);
  if (apart) {
    // Results stand in the list's order.
    rows(w, t.in, ids, 0, kept, nullptr, up + begin);
    activate_up(up + begin, kept);
    for (int k = 0; k < kept; k++) z[ids[k]] = gate[ids[k]] * up[begin + k];
  } else {
    activate_up(up + begin, end - begin);
    for (int k = 0; k < kept; k++) z[ids[k]] = gate[ids[k]] * up[ids[k]];
  }
}

// Rows [row_begin, row_end) of a block, the 64 neurons of a unit, in either layout: gate and up into local memory, from
// there into z.
void Decoder::prefill_neurons(Thread& t, const Pass& pass, int layer, int unit, int row_begin, int row_end) {
  Block& b = *block_;
  const LayerWeights& w = ffn_weights(layer);
  const bool gated = config_.ffn_gated;
  const int step = gated ? 2 : 1, first = unit * kTileRows, n = row_end - row_begin;
  const size_t ld = size_t(step) * kTileRows;
  float *gate = t.tile.data(), *up = gated ? gate + kTileRows : gate;
  if (w.ffn_rows) {
    // Kernels index results by neuron.
    rows_gemm(w.ffn_rows, b.in, row_begin, n, first, first + kTileRows,
              gated ? indexed_from(gate, size_t(first)) : nullptr, indexed_from(up, size_t(first)), ld,
              t.gemm_scratch.data());
  } else {
    const int tile = unit * step;
    gemm(w.ffn_in, b.in.input(row_begin), n, tile, tile + step, indexed_from(gate, size_t(tile) * kTileRows), ld,
         t.gemm_scratch.data());
  }
  for (int i = row_begin; i < row_end; i++, gate += ld, up += ld) {
    float* z = b.z.row(i) + first;
    const float* threshold = gated ? threshold_for(pass, layer, Site::G, pass.pos + i, false) : nullptr;
    if (!threshold && !pass.one) {
      activate(gate, gated ? up : nullptr, kTileRows, z);
    } else {
      activate(gate, nullptr, kTileRows, gate);
      if (gated) activate_up(up, kTileRows);
      if (gated) tap_neurons(pass, int(Site::G), i, first, kTileRows, gate);
      if (gated) tap_neurons(pass, kTapUp, i, first, kTileRows, up);
      int kept = 0;
      for (int k = 0; k < kTileRows; k++) {
        const bool keep = !threshold || survives(gate[k], threshold, first + k);
        z[k] = !keep ? 0.0f : gated ? gate[k] * up[k] : gate[k];
        kept += keep;
      }
      if (threshold) count_neurons(pass, w.ffn_rows, kept, kTileRows, true);
    }
    if (w.ffn_down.quantised && !w.ffn_sub_norm) b.z.quantise(i, first, kTileRows);
  }
}

}  // namespace sr
