// The forward pass, kernel by kernel. One token and a block of tokens take the same way; only the products differ.
#include <cstring>

#include "cuda/layer.h"

namespace sr {
namespace cuda {

void DeviceDecoder::product(const Pass& p, const DeviceMatrix& w, const Vectors& x, const Mask& m, float* y, size_t ldy) {
  if (p.n > 1) {
    gemm(stream_, w.view(), x, 0, p.n, y, ldy);
    return;
  }
  const GemvPlan plan = plan_gemv(w.view(), multiprocessors_);
  gemv(stream_, w.view(), x, m, plan, {partial_.data(), tickets_.data()}, step_.data(), y);
}

// Embedding, rotary tables, counters.
void DeviceDecoder::begin(const Pass& p) {
  const DecoderConfig& c = config_;
  EmbedArgs e = {};
  e.table = embd_.view();
  e.tokens = p.decode ? nullptr : tokens_.data();
  e.step = step_.data();
  e.position_embd = position_embd_;
  e.scale = c.embedding_scale;
  e.x = x_.data();
  e.zero = kept_.data();
  e.n_zero = int(kept_.size());
  embed(stream_, e, p.n);
  for (int local = 0; local < 2 && frequency_[local].size(); local++) {
    bool used = false;
    for (int l = 0; l < c.n_layers; l++) used = used || (c.window[size_t(l)] != 0) == (local == 1);
    if (!used) continue;
    const bool wide = frequency_[2].size() && p.cache->n_ctx() > c.rope_long_context;
    rope_tables(stream_, frequency_[local + 2 * wide].data(), c.rope_dims / 2,
                local ? c.rope_mscale_local : c.rope_mscale, step_.data(), p.n, rope_table_[local].data());
  }
  pending_[0] = pending_[1] = {};
}

// From the stream to branch_o_. keys_only: the last layer of a block whose logits nobody wants.
void DeviceDecoder::attention(const Pass& p, int index, bool keys_only) {
  const DecoderConfig& c = config_;
  const DeviceLayer& l = *layers_[size_t(index)];
  PrepareArgs a = {};
  a.x = x_.data();
  a.ldx = size_t(c.n_embd);
  a.width = c.n_embd;
  a.branch[0] = pending_[0];
  a.branch[1] = pending_[1];
  a.residual_scale = c.residual_scale;
  a.norm = l.attn_norm;
  a.out = in_.view();
  a.quantise = l.qkv.view().quantised;
  a.mask = mask(p, index, Site::A);
  a.step = step_.data();
  prepare(stream_, a, p.n);
  product(p, l.qkv, in_.view(), a.mask, qkv_.data(), ld_qkv_);

  HeadsArgs h = {};
  h.cache = p.cache->view(c, index);
  h.qkv = qkv_.data();
  h.ld = ld_qkv_;
  h.head_at = l.head_at.data();
  if (c.qk_norm == QkNorm::full) {
    const std::vector<int>& at = weights_.layers[size_t(index)].head_at;
    norm_in_place(stream_, l.q_norm, qkv_.data() + at[0], ld_qkv_, c.n_attn(), p.n);
    norm_in_place(stream_, l.k_norm, qkv_.data() + at[size_t(c.n_heads)], ld_qkv_, c.n_kv(), p.n);
  } else {
    h.q_norm = l.q_norm;
    h.k_norm = l.k_norm;
  }
  if (c.rope_style != RopeStyle::none && c.rope_layers[size_t(index)]) h.rope_half = c.rope_dims / 2;
  h.interleaved = c.rope_style == RopeStyle::interleaved;
  h.table = rope_table_[c.window[size_t(index)] ? 1 : 0].data();
  h.step = step_.data();
  heads(stream_, h, p.n);
  if (keys_only) return;

  AttendArgs_ t = {};
  t.cache = h.cache;
  t.q = qkv_.data();
  t.ld = ld_qkv_;
  t.head_at = l.head_at.data();
  t.step = step_.data();
  t.splits = attend_splits(p.n, p.cache->n_ctx());
  t.partial = attend_partial_.data();
  t.row_max = attend_max_.data();
  t.row_sum = attend_sum_.data();
  attend(stream_, t, p.n);

  const bool sub_norm = l.attn_sub_norm.type != NormType::none;
  const Mask masked = mask(p, index, Site::O);
  MergeArgs m = {};
  m.partial = t.partial;
  m.row_max = t.row_max;
  m.row_sum = t.row_sum;
  m.splits = t.splits;
  m.n_heads = c.n_heads;
  m.head_dim = c.head_dim;
  m.out = att_.view();
  m.quantise = l.o.view().quantised && !sub_norm;
  m.mask = masked;
  m.step = step_.data();
  merge(stream_, m, p.n);
  if (sub_norm) {
    PrepareArgs s = {};
    s.x = att_.view().x;
    s.ldx = size_t(att_.view().padded);
    s.width = c.n_attn();
    s.residual_scale = 1;
    s.norm = l.attn_sub_norm;
    s.out = att_.view();
    s.quantise = l.o.view().quantised;
    s.mask = masked;
    s.step = step_.data();
    prepare(stream_, s, p.n);
  }
  product(p, l.o, att_.view(), masked, branch_o_.data(), ld_branch_);
}

// gate and up (or up) of the token's neurons, where they are stored by neuron; and z from them.
void DeviceDecoder::neurons(const Pass& p, int index) {
  const DecoderConfig& c = config_;
  const DeviceLayer& l = *layers_[size_t(index)];
  const Neurons& w = l.ffn_rows.view();
  float *gate = gate_up_.data(), *up = gate + c.n_ff;
  if (!c.ffn_gated) {
    rows(stream_, w, ffn_in_.view(), nullptr, nullptr, nullptr, gate, multiprocessors_);
    return;
  }
  const Mask m = mask(p, index, Site::G);
  const bool choose = p.masks && (m.threshold || (p.masks->exact && true_zeros_));
  rows(stream_, w, ffn_in_.view(), nullptr, nullptr, gate, choose ? nullptr : up, multiprocessors_);
  int* count = kept_.data() + size_t(c.n_layers) * kSites + 1;
  SurviveArgs s = {};
  s.gate = gate;
  s.n = c.n_ff;
  s.act = c.activation;
  s.cut = c.activation_threshold;
  s.mask = m;
  s.mask.kept = kept_.data() + size_t(index) * kSites + size_t(Site::G);
  s.step = step_.data();
  s.ids = ids_.data();
  s.count = count;
  survivors(stream_, s);
  if (choose) rows(stream_, w, ffn_in_.view(), ids_.data(), count, nullptr, up, multiprocessors_);
}

// From the stream (and branch_o_) to branch_down_.
void DeviceDecoder::ffn(const Pass& p, int index) {
  const DecoderConfig& c = config_;
  const DeviceLayer& l = *layers_[size_t(index)];
  const bool by_neuron = l.ffn_in.empty();
  const Branch after_o = {branch_o_.data(), ld_branch_, l.post_attn_norm};
  PrepareArgs a = {};
  a.x = x_.data();
  a.ldx = size_t(c.n_embd);
  a.width = c.n_embd;
  a.residual_scale = c.residual_scale;
  if (!c.parallel_block) a.branch[0] = after_o;
  // A parallel block's FFN reads what attention read, through a norm of its own where it has one.
  a.norm = c.parallel_block && l.ffn_norm.type == NormType::none ? l.attn_norm : l.ffn_norm;
  a.out = ffn_in_.view();
  a.quantise = by_neuron ? is_quantised(l.ffn_rows.view().kind) : l.ffn_in.view().quantised;
  if (!by_neuron) a.mask = mask(p, index, Site::M);
  a.step = step_.data();
  prepare(stream_, a, p.n);

  const bool sub_norm = l.ffn_sub_norm.type != NormType::none;
  const Mask masked = mask(p, index, Site::Z);
  ActivateArgs z = {};
  z.in = gate_up_.data();
  z.ld = ld_gate_up_;
  z.gated = c.ffn_gated;
  z.act = c.activation;
  z.cut = c.activation_threshold;
  z.up_relu = c.up_relu;
  z.n_ff = c.n_ff;
  z.out = z_.view();
  z.quantise = l.down.view().quantised && !sub_norm;
  z.mask = masked;
  z.step = step_.data();
  if (!by_neuron) {
    product(p, l.ffn_in, ffn_in_.view(), a.mask, gate_up_.data(), ld_gate_up_);
  } else if (p.n > 1) {
    gemm_neurons(stream_, l.ffn_rows.view(), ffn_in_.view(), p.n, gate_up_.data(), ld_gate_up_);
    if (c.ffn_gated) z.neurons = mask(p, index, Site::G);
  } else {
    neurons(p, index);
    if (c.ffn_gated) {
      z.in = nullptr;
      z.gate = gate_up_.data();
      z.up = gate_up_.data() + c.n_ff;
    }
  }
  activate(stream_, z, p.n);
  if (sub_norm) {
    PrepareArgs s = {};
    s.x = z_.view().x;
    s.ldx = size_t(z_.view().padded);
    s.width = c.n_ff;
    s.residual_scale = 1;
    s.norm = l.ffn_sub_norm;
    s.out = z_.view();
    s.quantise = l.down.view().quantised;
    s.mask = masked;
    s.step = step_.data();
    prepare(stream_, s, p.n);
  }
  product(p, l.down, z_.view(), masked, branch_down_.data(), ld_branch_);

  const Branch after_down = {branch_down_.data(), ld_branch_, l.post_ffn_norm};
  pending_[0] = c.parallel_block ? after_o : after_down;
  pending_[1] = c.parallel_block ? after_down : Branch{};
}

bool DeviceDecoder::all_layers(const Pass& p, Logits which, const std::function<bool()>& should_stop) {
  begin(p);
  for (int l = 0; l < config_.n_layers; l++) {
    const bool keys_only = which == Logits::none && l + 1 == config_.n_layers;
    attention(p, l, keys_only);
    if (keys_only) return true;
    ffn(p, l);
    if (should_stop()) return false;
  }
  return true;
}

// Logits of rows [row, row + rows) of the pass.
void DeviceDecoder::head(const Pass& p, int row, int rows) {
  const DecoderConfig& c = config_;
  const DeviceMatrix& w = output_.empty() ? embd_ : output_;
  PrepareArgs a = {};
  a.x = x_.data() + size_t(row) * size_t(c.n_embd);
  a.ldx = size_t(c.n_embd);
  a.width = c.n_embd;
  for (int b = 0; b < 2; b++) {
    a.branch[b] = pending_[b];
    if (a.branch[b].y) a.branch[b].y += size_t(row) * ld_branch_;
  }
  a.residual_scale = c.residual_scale;
  a.norm = output_norm_;
  a.out = head_in_.view();
  a.quantise = w.view().quantised;
  a.step = step_.data();
  prepare(stream_, a, rows);
  Pass some = p;
  some.n = rows;
  const size_t ld = size_t(w.view().y_rows);
  product(some, w, head_in_.view(), Mask{}, logits_.data(), ld);
  finish_logits(stream_, logits_.data(), ld, c.n_vocab, rows, c.logit_scale, c.logit_softcap,
                kept_.data() + size_t(c.n_layers) * kSites);
}

// The step is captured once for each cache and set of masks; then the host sets token and position, and replays.
void DeviceDecoder::decode_step(const Pass& p, int token, int pos, float* logits) {
  const char* what = "decoding a token";
  host_step_[0] = {pos, token};
  DeviceKv& cache = *p.cache;
  const size_t vocab = size_t(config_.n_vocab) * sizeof(float);
  if (!cache.graph_ || cache.graph_plan_ != p.masks->id) {
    cache.drop_graph();
    const auto never = [] { return false; };
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), what);
    cudaGraph_t graph = nullptr;
    try {
      check(cudaMemcpyAsync(step_.data(), host_step_.data(), sizeof(Step), cudaMemcpyHostToDevice, stream_), what);
      all_layers(p, Logits::last, never);
      head(p, 0, 1);
      check(cudaMemcpyAsync(host_logits_.data(), logits_.data(), vocab, cudaMemcpyDeviceToHost, stream_), what);
      check(cudaMemcpyAsync(host_kept_.data(), kept_.data(), kept_.bytes(), cudaMemcpyDeviceToHost, stream_), what);
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), what);
    const cudaError_t made = cudaGraphInstantiate(&cache.graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(made, what);
    cache.graph_plan_ = p.masks->id;
  }
  check(cudaGraphLaunch(cache.graph_, stream_), what);
  stream_.wait(what);
  if (logits) std::memcpy(logits, host_logits_.data(), vocab);
}

bool DeviceDecoder::block(const Pass& p, const int32_t* tokens, int pos, Logits which, float* logits,
                          const std::function<bool()>& should_stop) {
  const char* what = "evaluating a prompt";
  host_step_[0] = {pos, 0};
  std::memcpy(host_tokens_.data(), tokens, size_t(p.n) * sizeof(int));
  check(cudaMemcpyAsync(step_.data(), host_step_.data(), sizeof(Step), cudaMemcpyHostToDevice, stream_), what);
  check(cudaMemcpyAsync(tokens_.data(), host_tokens_.data(), size_t(p.n) * sizeof(int), cudaMemcpyHostToDevice, stream_),
        what);
  if (!all_layers(p, which, should_stop)) {
    stream_.wait(what);
    return false;
  }
  const size_t n_vocab = size_t(config_.n_vocab), ld = logits_.size() / kHeadRows;
  const int first = which == Logits::all ? 0 : which == Logits::last ? p.n - 1 : p.n;
  for (int row = first; row < p.n; row += kHeadRows) {
    const int rows = p.n - row < kHeadRows ? p.n - row : kHeadRows;
    head(p, row, rows);
    check(cudaMemcpyAsync(host_logits_.data(), logits_.data(), size_t(rows) * ld * sizeof(float), cudaMemcpyDeviceToHost,
                          stream_),
          what);
    stream_.wait(what);
    for (int i = 0; i < rows; i++)
      std::memcpy(logits + size_t(row - first + i) * n_vocab, host_logits_.data() + size_t(i) * ld, n_vocab * sizeof(float));
  }
  check(cudaMemcpyAsync(host_kept_.data(), kept_.data(), kept_.bytes(), cudaMemcpyDeviceToHost, stream_), what);
  stream_.wait(what);
  return true;
}

}  // namespace cuda
}  // namespace sr
