// The first half of an FFN, input to z = act(gate) * up, where the weights lie by neuron: which neurons' rows are read.
// A neuron that is left out has z = 0, so the columns of down that it would multiply are left out with it.
#include <algorithm>

#include "model/decoder.h"
#include "model/decoder_buffers.h"
#include "model/row_ops.h"

namespace sr {
namespace {

// z = gate * up where the gate exceeds its threshold, else 0, of neurons that stand side by side; how many exceed it.
// STRIDE is the threshold's. Without branches, so that the compiler takes several at once.
template <int STRIDE>
int masked_products(const float* gate, const float* up, const float* threshold, int n, float* z) {
  int kept = 0;
  for (int i = 0; i < n; i++) {
    const bool keep = survives(gate[i], threshold[STRIDE * i]);
    const float product = gate[i] * up[i];
    z[i] = keep ? product : 0.0f;
    kept += keep;
  }
  return kept;
}

// Of neurons id(k), k in [0, n), whose gates are gate[at(k)], those that exceed their thresholds: ids and their gates
// in front; how many. A gate is read before its place is written: at(k) >= k.
template <int STRIDE, class Id, class At>
int compact(float* gate, const float* threshold, int n, Id id, At at, int32_t* ids) {
  int kept = 0;
  for (int k = 0; k < n; k++) {
    const float g = gate[at(k)];
    ids[kept] = id(k);
    gate[kept] = g;
    kept += survives(g, threshold[STRIDE * id(k)]);
  }
  return kept;
}

}  // namespace

// This thread's part of the neurons [from, to), multiples of 64.
Decoder::NeuronShare Decoder::neuron_share(int tid, const Pass& pass, int layer, int from, int to) const {
  const int threads = pool_.size();
  const auto part = [&](int begin, int end, int t) {
    return begin + (end - begin) / kTileRows * t / threads * kTileRows;
  };
  const int even_begin = part(from, to, tid), even_end = part(from, to, tid + 1);
  if (neuron_predictor(pass, layer, pass.pos, true)) {
    // Every thread has predicted its part of all neurons, and takes what of it is asked for.
    const Prediction& p = *prediction_;
    const int own = part(0, config_.n_ff, tid), next = part(0, config_.n_ff, tid + 1);
    const int begin = std::max(from, own), end = std::max(begin, std::min(to, next));
    const int32_t *ids = p.ids.data(), *first = ids + own, *last = first + p.count[size_t(tid)];
    return {begin, end, int(std::lower_bound(first, last, begin) - ids), int(std::lower_bound(first, last, end) - ids),
            ids};
  }
  const NeuronSet* set = chosen(pass, layer, true);
  if (!set) return {even_begin, even_end, even_begin, even_end, nullptr};
  const std::vector<int32_t>& ids = set->ids;
  const auto position = [&](int neuron) { return int(std::lower_bound(ids.begin(), ids.end(), neuron) - ids.begin()); };
  const int first = position(from), count = position(to) - first;
  if (count == 0) return {even_begin, even_end, 0, 0, no_neurons_};
  // As many of the list for each thread as borders at multiples of 64 allow.
  const auto border = [&](int t) {
    if (t == 0) return from;
    if (t == threads) return to;
    const int id = ids[size_t(first) + size_t(count) * size_t(t) / size_t(threads)];
    return (id + kTileRows - 1) / kTileRows * kTileRows;
  };
  const int begin = border(tid), end = border(tid + 1);
  return {begin, end, position(begin), position(end), ids.data()};
}

void Decoder::finish_neurons(const Pass& pass, int layer, int begin, int end) {
  const LayerWeights& w = ffn_weights(layer);
  if (w.ffn_sub_norm || !w.ffn_down.quantised || begin >= end) return;
  z_.quantise(0, begin, end - begin);
  Thresholds threshold = threshold_for(pass, layer, Site::Z, pass.pos, true);
  if (pass.stored && !threshold) threshold = kNotZero;
  if (threshold) z_.select(0, threshold, begin, end - begin);
  if (pass.stored)
    store_->places(layer, z_.active(0), begin / kSlabCols, (end + kSlabCols - 1) / kSlabCols, place_.data());
}

void Decoder::decode_panels(int tid, const Pass& pass, int layer) {
  const Linear& w = ffn_weights(layer).ffn_in;
  const bool gated = config_.ffn_gated;
  const int rows = gated ? kTileRows / 2 : kTileRows;  // neurons of a tile
  const Input x = masked(pass, tid, layer, Site::M, &thread_[size_t(tid)]->in);
  for_share(w, tid, pass, [&](int tile_begin, int tile_end) {
    gemv(w, x, tile_begin, tile_end, gate_up_.data());
    for (int neuron = tile_begin * rows; neuron < tile_end * rows; neuron += kTileRows) {
      float* gate = gate_up_.data() + size_t(neuron) * (gated ? 2 : 1);
      activate(gate, gated ? gate + kTileRows : nullptr, kTileRows, z_.row(0) + neuron);
    }
    finish_neurons(pass, layer, tile_begin * rows, tile_end * rows);
  });
}

void Decoder::decode_neurons(int tid, const Pass& pass, int layer) {
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  const auto some = [&](int from, int to) {
    const NeuronShare share = neuron_share(tid, pass, layer, from, to);
    decode_neurons(tid, pass, layer, share);
    finish_neurons(pass, layer, share.begin, share.end);
  };
  if (pass.stored) return decode_stored(tid, pass, layer);
  if (w.slices.empty()) return some(0, config_.n_ff);
  for_slices(w.slices, tid, pass, [&](const Slice& s) { some(s.tile_begin * kTileRows, s.tile_end * kTileRows); });
}

// Gate rows of the share's neurons; then, where it pays, up rows of those only that are not 0 (that exceed the
// thresholds of site G). Whether it pays is decided by what the share's last token kept: reading gate and up in one go
// is faster than reading them one after the other. Of a list that names most neurons all rows are read: results of
// position k of a list stand at begin + k - first, of all neurons at the neuron's number.
void Decoder::decode_neurons(int tid, const Pass& pass, int layer, NeuronShare share) {
  Thread& t = *thread_[size_t(tid)];
  const NeuronRows& w = ffn_weights(layer).ffn_rows;
  const int begin = share.begin, end = share.end, first = share.first, n = share.last - share.first;
  if (begin >= end) return;
  const int32_t* list = share.list ? share.list + first : nullptr;
  float *gate = gate_up_.data() + begin, *up = gate + config_.n_ff, *z = z_.row(0);
  const bool gated = config_.ffn_gated;
  const Thresholds threshold = gated ? threshold_for(pass, layer, Site::G, pass.pos, true) : Thresholds();
  const bool choose = gated && (threshold || skips_zeros(pass));
  float* last_kept = &t.kept_share[size_t(layer)];
  const bool apart = choose && *last_kept <= break_even(pass, layer, Site::G);
  const bool all = list && !pass.stored && float(n) > break_even(pass, layer, Site::N) * float(end - begin);
  if (list) {
    const int rows = all ? (apart ? 1 : 0) : gated ? 2 : 1;
    count_neurons(pass, Site::N, w, n, share.more ? 0 : end - begin, rows);
  }
  // Products of `count` neurons, of a list or from `begin` on, into g and u from their beginnings on.
  const auto multiply = [&](const int32_t* ids, int count, float* g, float* u) {
    const int from = ids ? 0 : begin;
    multiply_rows(pass, layer, tid, ids, from, from + count, g ? indexed_from(g, size_t(from)) : nullptr,
                  u ? indexed_from(u, size_t(from)) : nullptr, first);
  };
  const int computed = list && !all ? n : end - begin;
  multiply(all ? nullptr : list, computed, gated ? gate : nullptr, apart ? nullptr : up);
  activate(gated ? gate : up, nullptr, computed, gated ? gate : up);
  if (gated && !apart) activate_up(up, computed);
  if (!list && !choose) {
    for (int i = 0; i < n; i++) z[begin + i] = gated ? gate[i] * up[i] : up[i];
    return;
  }
  if (list && !share.more) std::fill(z + begin, z + end, 0.0f);
  if (!choose) {
    for (int k = 0; k < n; k++) {
      const int id = list[k], at = all ? id - begin : k;
      z[id] = gated ? gate[at] * up[at] : up[at];
    }
    return;
  }
  const Thresholds limit = threshold ? threshold : kNotZero;
  const float* own = limit.at + (list ? 0 : begin * limit.stride);  // what ids of a list, or positions, count from
  int kept = 0;
  if (!list && !apart) {
    kept = limit.stride ? masked_products<1>(gate, up, own, n, z + begin)
                        : masked_products<0>(gate, up, own, n, z + begin);
    *last_kept = float(kept) / float(n);
    count_neurons(pass, Site::G, w, kept, n, 0);
    return;
  }
  int32_t* ids = survivors_.data() + begin;
  if (list && !apart) {
    for (int k = 0; k < n; k++) {
      const int id = list[k], at = all ? id - begin : k;
      const bool keep = survives(gate[at], limit.of(id));
      z[id] = keep ? gate[at] * up[at] : 0.0f;
      kept += keep;
    }
  } else if (list) {
    const auto id = [&](int k) { return list[k]; };
    const auto at = [&](int k) { return all ? list[k] - begin : k; };
    kept = limit.stride ? compact<1>(gate, own, n, id, at, ids) : compact<0>(gate, own, n, id, at, ids);
  } else {
    const auto at = [](int k) { return k; };
    kept = limit.stride ? compact<1>(gate, own, n, at, at, ids) : compact<0>(gate, own, n, at, at, ids);
    for (int k = 0; k < kept; k++) ids[k] += begin;
    std::fill(z + begin, z + end, 0.0f);
  }
  if (n) *last_kept = float(kept) / float(n);
  count_neurons(pass, Site::G, w, kept, n, apart ? 1 : 0);
  if (!apart) return;
  multiply(ids, kept, nullptr, up);
  activate_up(up, kept);
  for (int k = 0; k < kept; k++) z[ids[k]] = gate[k] * up[k];
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
    const Thresholds threshold = gated ? threshold_for(pass, layer, Site::G, pass.pos + i, false) : Thresholds();
    const uint8_t* flags = neurons_kept(pass, layer, i);
    if (flags && pass.skipping.measure) {
      measure(pass, w.ffn_rows, gate, up, flags + first, z);
    } else if (!threshold && !flags && !pass.one) {
      activate(gate, gated ? up : nullptr, kTileRows, z);
    } else {
      activate(gate, nullptr, kTileRows, gate);
      if (gated) activate_up(up, kTileRows);
      if (gated) tap_neurons(pass, int(Site::G), i, first, kTileRows, gate);
      if (gated) tap_neurons(pass, kTapUp, i, first, kTileRows, up);
      int in_set = 0, kept = 0;
      for (int k = 0; k < kTileRows; k++) {
        const bool offered = !flags || flags[first + k];
        const bool keep = offered && (!threshold || survives(gate[k], threshold.of(first + k)));
        z[k] = !keep ? 0.0f : gated ? gate[k] * up[k] : gate[k];
        in_set += offered;
        kept += keep;
      }
      b.neurons[i].in_set.fetch_add(in_set, std::memory_order_relaxed);
      b.neurons[i].kept.fetch_add(kept, std::memory_order_relaxed);
    }
    if (w.ffn_down.quantised && !w.ffn_sub_norm) b.z.quantise(i, first, kTileRows);
  }
}

// 64 neurons of a row, all computed: how many a predictor named, and how many of those that are not 0.
void Decoder::measure(const Pass& pass, const NeuronRows& w, float* gate, float* up, const uint8_t* flags,
                      float* z) const {
  activate(gate, config_.ffn_gated ? up : nullptr, kTileRows, z);
  int named = 0, found = 0, needed = 0;
  for (int k = 0; k < kTileRows; k++) {
    named += flags[k];
    needed += z[k] != 0;
    found += z[k] != 0 && flags[k];
  }
  count_neurons(pass, Site::N, w, named, kTileRows, 0);
  if (!pass.skipping.counts) return;
  pass.skipping.counts->found.fetch_add(found, std::memory_order_relaxed);
  pass.skipping.counts->needed.fetch_add(needed, std::memory_order_relaxed);
}

}  // namespace sr
