// The order of sums is decode.cc's and prefill.cc's, over fewer neurons.
#include "model/ffn_rest.h"

#include <algorithm>
#include <utility>

#include "model/decoder_buffers.h"
#include "model/row_ops.h"

namespace sr {
namespace {

constexpr const char* kWhat = "the FFNs on the CPU";

}  // namespace

FfnRest::FfnRest(const DecoderConfig& config, int threads, int max_rows)
    : config_(config), pool_(threads), max_rows_(max_rows), thread_(size_t(threads)) {
  true_zeros_ = has_true_zeros(config);
  in_.reset(max_rows, config.n_embd, kWhat, true);
  gate_up_.reset(2 * size_t(config.n_ff), kWhat);
  for (Thread& t : thread_) {
    t.tile.reset(size_t(max_rows) * 2 * kTileRows, kWhat);
    t.survivors.resize(size_t(config.n_ff));
  }
}

void FfnRest::add(int layer, FfnPart part) {
  Layer made;
  made.part = std::move(part);
  const LayerWeights& w = made.weights();
  const int threads = pool_.size(), step = config_.ffn_gated ? 2 : 1;
  made.units = even_share(0, made.neurons() / kTileRows, threads, 1);
  for (int unit : made.units) made.in_share.push_back(unit * step);
  made.down_share = even_share(0, w.ffn_down.tiles(), threads, 1);
  made.kept_share.assign(size_t(threads), 1.0f);
  size_t scratch = w.ffn_rows ? rows_scratch_bytes(w.ffn_rows.m) : 0;
  for (const Linear* m : {&w.ffn_in, &w.ffn_down}) {
    for (const PanelMatrix& p : m->parts) scratch = std::max(scratch, gemm_scratch_bytes(p));
  }
  for (Thread& t : thread_) {
    if (t.scratch.size() < scratch) t.scratch.reset(scratch, kWhat);
  }
  InputBuffer& z = z_[made.neurons()];
  if (!z.width()) z.reset(max_rows_, made.neurons(), kWhat);
  bytes_ += w.ffn_bytes();
  layers_[layer] = std::move(made);
}

FfnRest::Kept FfnRest::run(int layer, const float* x, size_t ldx, int n, const Masks& masks, float* y, size_t ldy) {
  Layer& l = layers_.at(layer);
  const Job job = {&l, x, ldx, n, &masks, y, ldy, &z_.at(l.neurons())};
  counter_[0].reset();
  counter_[1].reset();
  pool_.run([&](int tid) {
    thread_[size_t(tid)].kept = {};
    if (n == 1) one(tid, job);
    else block(tid, job);
  });
  Kept kept;
  for (const Thread& t : thread_) {
    kept.gate += t.kept.gate;
    kept.z += t.kept.z;
  }
  return kept;
}

// Row `row` of x as the rows or tiles of the FFN multiply it.
void FfnRest::prepare(const Job& job, int row) {
  const LayerWeights& w = job.layer->weights();
  std::copy_n(job.x + size_t(row) * job.ldx, config_.n_embd, in_.row(row));
  if (!w.ffn_in_quantised()) return;
  in_.quantise(row);
  if (w.ffn_rows) in_.order(row);
  else if (job.masks->in && row >= job.masks->first) in_.select(row, job.masks->in, 0, config_.n_embd);
}

Thresholds FfnRest::z_threshold(const Job& job, int row) const {
  const Linear& down = job.layer->weights().ffn_down;
  if (!down.quantised || down.floating) return {};
  const bool planned = row >= job.masks->first;
  if (planned && job.masks->z) return job.masks->z;
  if (job.n == 1 && ((job.masks->exact && true_zeros_) || (planned && job.masks->gate))) return kNotZero;
  return {};
}

void FfnRest::one(int tid, const Job& job) {
  Thread& t = thread_[size_t(tid)];
  Layer& l = *job.layer;
  const LayerWeights& w = l.weights();
  InputBuffer& z = *job.z;
  const Masks& masks = *job.masks;
  const bool gated = config_.ffn_gated;
  if (tid == 0) prepare(job, 0);
  pool_.barrier();

  const int begin = l.units[size_t(tid)] * kTileRows, end = l.units[size_t(tid) + 1] * kTileRows;
  const Thresholds threshold = z_threshold(job, 0);
  if (begin < end) {
    if (w.ffn_rows) {
      one_by_neuron(tid, job);
    } else {
      Input x = in_.input();
      if (masks.in && masks.first == 0 && float(in_.kept(0)) <= masks.break_even_in * float(config_.n_embd)) {
        x.active = in_.active(0);
      }
      gemv(w.ffn_in, x, l.in_share[size_t(tid)], l.in_share[size_t(tid) + 1], gate_up_.data());
      for (int i = begin; i < end; i += kTileRows) {
        float* gate = gate_up_.data() + size_t(i) * (gated ? 2 : 1);
        activate(config_, gate, gated ? gate + kTileRows : nullptr, kTileRows, z.row(0) + i);
      }
    }
    if (!w.ffn_sub_norm && w.ffn_down.quantised) {
      z.quantise(0, begin, end - begin);
      if (threshold) z.select(0, threshold, begin, end - begin);
    }
  }
  pool_.barrier();

  if (w.ffn_sub_norm) {
    if (tid == 0) {
      norm_row(config_, w.ffn_sub_norm, z.row(0), config_.n_ff, z.row(0));
      if (w.ffn_down.quantised) z.quantise(0);
      if (threshold) z.select(0, threshold, 0, l.neurons());
    }
    pool_.barrier();
  }
  Input in = z.input();
  if (threshold) {
    const int kept = z.kept(0);
    if (tid == 0) t.kept.z = kept;
    if (float(kept) <= masks.break_even_z * float(l.neurons())) in.active = z.active(0);
  }
  gemv(w.ffn_down, in, l.down_share[size_t(tid)], l.down_share[size_t(tid) + 1], job.y);
}

// Gate rows of this thread's neurons, then, where it pays, up rows of those only that are not 0 or exceed the
// thresholds.
void FfnRest::one_by_neuron(int tid, const Job& job) {
  Thread& t = thread_[size_t(tid)];
  Layer& l = *job.layer;
  const NeuronRows& w = l.weights().ffn_rows;
  const int begin = l.units[size_t(tid)] * kTileRows, end = l.units[size_t(tid) + 1] * kTileRows;
  float *gate = gate_up_.data(), *up = gate + config_.n_ff, *z = job.z->row(0);
  const bool gated = config_.ffn_gated;
  const Thresholds threshold = gated && job.masks->first == 0 ? job.masks->gate : Thresholds();
  const bool choose = gated && (threshold || (job.masks->exact && true_zeros_));
  float* last_kept = &l.kept_share[size_t(tid)];
  const bool apart = choose && *last_kept <= break_even_by_row(w, true);
  rows(w, in_, nullptr, begin, end, gated ? gate : nullptr, apart ? nullptr : up);
  float* active = gated ? gate : up;
  activate(config_, active + begin, nullptr, end - begin, active + begin);
  if (gated && !apart) activate_up(config_, up + begin, end - begin);
  if (!choose) {
    for (int i = begin; i < end; i++) z[i] = gated ? gate[i] * up[i] : up[i];
    return;
  }
  int32_t* ids = t.survivors.data();
  int kept = 0;
  for (int i = begin; i < end; i++) {
    z[i] = 0;
    if (survives(gate[i], threshold ? threshold.of(i) : 0.0f)) ids[kept++] = i;
  }
  *last_kept = float(kept) / float(end - begin);
  t.kept.gate = kept;
  if (!apart) {
    for (int k = 0; k < kept; k++) z[ids[k]] = gate[ids[k]] * up[ids[k]];
    return;
  }
  // Results stand in the list's order.
  rows(w, in_, ids, 0, kept, nullptr, up + begin);
  activate_up(config_, up + begin, kept);
  for (int k = 0; k < kept; k++) z[ids[k]] = gate[ids[k]] * up[begin + k];
}

void FfnRest::block(int tid, const Job& job) {
  Thread& t = thread_[size_t(tid)];
  const Layer& l = *job.layer;
  const LayerWeights& w = l.weights();
  InputBuffer& z = *job.z;
  const int threads = pool_.size();
  const int row_begin = job.n * tid / threads, row_end = job.n * (tid + 1) / threads;
  for (int i = row_begin; i < row_end; i++) prepare(job, i);
  pool_.barrier();
  const int units = l.neurons() / kTileRows;
  for (int unit = counter_[0].take(); unit < units; unit = counter_[0].take()) block_unit(t, job, unit);
  pool_.barrier();
  for (int i = row_begin; i < row_end; i++) {
    if (w.ffn_sub_norm) norm_row(config_, w.ffn_sub_norm, z.row(i), config_.n_ff, z.row(i));
    if (w.ffn_down.quantised) z.quantise(i);
    if (const Thresholds threshold = z_threshold(job, i)) {
      z.select(i, threshold, 0, l.neurons());
      t.kept.z += z.kept(i);
    }
  }
  pool_.barrier();
  const int tiles = w.ffn_down.tiles();
  for (int tile = counter_[1].take(); tile < tiles; tile = counter_[1].take()) {
    gemm(w.ffn_down, z.input(), job.n, tile, tile + 1, job.y, job.ldy, t.scratch.data());
  }
}

// z of 64 neurons, all rows.
void FfnRest::block_unit(Thread& t, const Job& job, int unit) {
  const LayerWeights& w = job.layer->weights();
  const bool gated = config_.ffn_gated;
  const int step = gated ? 2 : 1, first = unit * kTileRows;
  const size_t ld = size_t(step) * kTileRows;
  float *gate = t.tile.data(), *up = gated ? gate + kTileRows : gate;
  if (w.ffn_rows) {
    rows_gemm(w.ffn_rows, in_, 0, job.n, first, first + kTileRows, gated ? indexed_from(gate, size_t(first)) : nullptr,
              indexed_from(up, size_t(first)), ld, t.scratch.data());
  } else {
    const int tile = unit * step;
    gemm(w.ffn_in, in_.input(), job.n, tile, tile + step, indexed_from(gate, size_t(tile) * kTileRows), ld,
         t.scratch.data());
  }
  for (int i = 0; i < job.n; i++, gate += ld, up += ld) {
    float* z = job.z->row(i) + first;
    if (!gated || !job.masks->gate || i < job.masks->first) {
      activate(config_, gate, gated ? up : nullptr, kTileRows, z);
      continue;
    }
    activate(config_, gate, nullptr, kTileRows, gate);
    activate_up(config_, up, kTileRows);
    for (int k = 0; k < kTileRows; k++) {
      const bool keep = survives(gate[k], job.masks->gate.of(first + k));
      z[k] = keep ? gate[k] * up[k] : 0.0f;
      t.kept.gate += keep;
    }
  }
}

}  // namespace sr
