// The forward pass, kernel by kernel. One token and a block of tokens take the same way; only the products differ.
#include <cstring>

#include "cuda/layer.h"

namespace sr {
namespace cuda {
namespace {

constexpr const char* kDecoding = "decoding a token";
constexpr const char* kExchange = "exchanging neurons with the CPU";

}  // namespace

void DeviceDecoder::product(const Pass& p, const DeviceMatrix& w, const Vectors& x, const Mask& m, float* y,
                            size_t ldy) {
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
  {
    const OverlapLaunches whole(false);  // the first kernel: what it reads is copied just before it
    embed(stream_, e, p.n);
  }
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
  if (sub_norm) norm_inside(p, l.attn_sub_norm, att_.view(), l.o.view().quantised, masked);
  product(p, l.o, att_.view(), masked, branch_o_.data(), ld_branch_);
}

// A norm of v in place, and what a product makes of it.
void DeviceDecoder::norm_inside(const Pass& p, const NormView& norm, const Vectors& v, bool quantise,
                                const Mask& mask) {
  PrepareArgs a = {};
  a.x = v.x;
  a.ldx = size_t(v.padded);
  a.width = v.width;
  a.residual_scale = 1;
  a.norm = norm;
  a.out = v;
  a.quantise = quantise;
  a.mask = mask;
  a.step = step_.data();
  prepare(stream_, a, p.n);
}

// gate and up (or up) of the token's neurons, where they are stored by neuron; and z from them.
void DeviceDecoder::neurons(const Pass& p, int index) {
  const DecoderConfig& c = config_;
  const DeviceLayer& l = *layers_[size_t(index)];
  const Neurons& w = l.ffn_rows.view();
  float *gate = gate_up_.data(), *up = gate + l.neurons;
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
  s.n = l.neurons;
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
  const LayerWeights& whole = weights_.layers[size_t(index)];
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
  a.quantise = whole.ffn_in_quantised();
  if (!whole.ffn_rows) a.mask = mask(p, index, Site::M);
  a.step = step_.data();
  prepare(stream_, a, p.n);

  const bool rest = rest_ && rest_->has(index);
  if (rest) {
    const size_t bytes = size_t(p.n) * size_t(a.out.padded) * sizeof(float);
    check(cudaMemcpyAsync(host_x_.data(), a.out.x, bytes, cudaMemcpyDeviceToHost, stream_), kExchange);
    cut(p, true, l.neurons ? -1 : index);
  }
  if (l.neurons) ffn_on_device(p, index, a.mask);
  if (rest) {
    if (l.neurons) cut(p, false, index);
    const size_t bytes = size_t(p.n) * ld_branch_ * sizeof(float);
    float* to = l.neurons ? gate_up_.data() : branch_down_.data();  // gate and up have been used
    check(cudaMemcpyAsync(to, host_rest_.data(), bytes, cudaMemcpyHostToDevice, stream_), kExchange);
    if (l.neurons) add_rows(stream_, to, branch_down_.data(), ld_branch_, int(whole.ffn_down.padded_rows()), p.n);
  }
  const Branch after_down = {branch_down_.data(), ld_branch_, l.post_ffn_norm};
  pending_[0] = c.parallel_block ? after_o : after_down;
  pending_[1] = c.parallel_block ? after_down : Branch{};
}

// The device's neurons, from ffn_in_ to branch_down_.
void DeviceDecoder::ffn_on_device(const Pass& p, int index, const Mask& in_mask) {
  const DecoderConfig& c = config_;
  const DeviceLayer& l = *layers_[size_t(index)];
  const bool sub_norm = l.ffn_sub_norm.type != NormType::none;
  const Mask masked = mask(p, index, Site::Z);
  ActivateArgs z = {};
  z.in = gate_up_.data();
  z.ld = ld_gate_up_;
  z.gated = c.ffn_gated;
  z.act = c.activation;
  z.cut = c.activation_threshold;
  z.up_relu = c.up_relu;
  z.n_ff = l.neurons;
  z.out = narrow(z_.view(), l.neurons);
  z.quantise = l.down.view().quantised && !sub_norm;
  z.mask = masked;
  z.step = step_.data();
  if (!l.ffn_in.empty()) {
    product(p, l.ffn_in, ffn_in_.view(), in_mask, gate_up_.data(), ld_gate_up_);
  } else if (p.n > 1) {
    gemm_neurons(stream_, l.ffn_rows.view(), ffn_in_.view(), p.n, gate_up_.data(), ld_gate_up_);
    if (c.ffn_gated) z.neurons = mask(p, index, Site::G);
  } else {
    neurons(p, index);
    if (c.ffn_gated) {
      z.in = nullptr;
      z.gate = gate_up_.data();
      z.up = gate_up_.data() + l.neurons;
    }
  }
  activate(stream_, z, p.n);
  if (sub_norm) norm_inside(p, l.ffn_sub_norm, z.out, l.down.view().quantised, masked);
  product(p, l.down, z.out, masked, branch_down_.data(), ld_branch_);
}

void DeviceDecoder::cut(const Pass& p, bool marked, int rest) {
  if (p.capture) {
    end_piece(p.cache, marked, rest);
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), kDecoding);
    return;
  }
  if (marked) host_x_there_.record(stream_, kExchange);
  if (rest >= 0) compute_rest(p, rest);
}

// The CPU's neurons, from host_x_ to host_rest_, while the device computes its own. host_rest_ is free: what the stream
// was to copy from it in an earlier layer comes before the mark that is waited for.
void DeviceDecoder::compute_rest(const Pass& p, int index) {
  FfnRest::Masks m;
  const DevicePlan& plan = *p.masks;
  m.exact = plan.exact;
  m.break_even_in = m.break_even_z = plan.break_even;
  if (p.decode || plan.mask_blocks) {
    const DevicePlan::Rest& t = plan.rest[size_t(index)];
    const auto of = [](const std::vector<float>& v) { return Thresholds{v.empty() ? nullptr : v.data(), 1}; };
    m.in = of(t.in);
    m.gate = of(t.gate);
    m.z = of(t.z);
    m.first = plan.dense_tokens > p.pos ? plan.dense_tokens - p.pos : 0;
  }
  host_x_there_.wait(kExchange);
  const FfnRest::Kept kept =
      rest_->run(index, host_x_.data(), size_t(ffn_in_.view().padded), p.n, m, host_rest_.data(), ld_branch_);
  rest_kept_[size_t(index) * kSites + size_t(Site::G)] += kept.gate;
  rest_kept_[size_t(index) * kSites + size_t(Site::Z)] += kept.z;
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
  float* logits = p.decode ? p.cache->logits_.data() : logits_.data();
  product(some, w, head_in_.view(), Mask{}, logits, ld);
  finish_logits(stream_, logits, ld, c.n_vocab, rows, c.logit_scale, c.logit_softcap,
                kept_.data() + size_t(c.n_layers) * kSites);
}

// The graph of what was captured since the last end.
void DeviceDecoder::end_piece(DeviceKv* cache, bool marked, int rest) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream_, &graph), kDecoding);
  cudaGraphExec_t exec = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check(made, kDecoding);
  cache->pieces_.push_back({exec, marked, rest});
}

// One token, whose place and number are in host_step_.
void DeviceDecoder::put_step(const Pass& p) {
  check(cudaMemcpyAsync(step_.data(), host_step_.data(), sizeof(Step), cudaMemcpyHostToDevice, stream_), kDecoding);
  all_layers(p, Logits::last, [] { return false; });
  head(p, 0, 1);
  int* best = kept_.data() + config_.n_layers * kSites + 2;
  argmax(stream_, p.cache->logits_.data(), config_.n_vocab, best_scratch_.data(), best);
  check(cudaMemcpyAsync(host_kept_.data(), kept_.data(), kept_.bytes(), cudaMemcpyDeviceToHost, stream_), kDecoding);
}

void DeviceDecoder::capture_step(Pass p) {
  p.capture = true;
  p.cache->drop_pieces();
  const OverlapLaunches overlap(overlap_ && !rest_);  // a divided step is full of copies
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), kDecoding);
  try {
    put_step(p);
    end_piece(p.cache, false, -1);
  } catch (...) {
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();  // that there was nothing to end
    p.cache->drop_pieces();
    throw;
  }
  p.cache->plan_ = p.masks->id;
}

// The step is captured once for each cache and set of masks; then the host sets token and position, and replays. The
// first one is not: it has the driver load the kernels, which is not to be done while a stream is captured.
void DeviceDecoder::decode_step(const Pass& p, int token, float* logits) {
  host_step_[0] = {p.pos, token};
  DeviceKv& cache = *p.cache;
  if (!graphs_ || !loaded_) {
    put_step(p);
    loaded_ = true;
  } else {
    if (cache.pieces_.empty() || cache.plan_ != p.masks->id) capture_step(p);
    for (const DeviceKv::Piece& piece : cache.pieces_) {
      check(cudaGraphLaunch(piece.graph, stream_), kDecoding);
      if (piece.marked) host_x_there_.record(stream_, kExchange);
      if (piece.rest >= 0) compute_rest(p, piece.rest);
    }
  }
  const size_t vocab = size_t(config_.n_vocab) * sizeof(float);
  if (logits) {
    check(cudaMemcpyAsync(host_logits_.data(), cache.logits_.data(), vocab, cudaMemcpyDeviceToHost, stream_),
          kDecoding);
  }
  stream_.wait(kDecoding);
  if (logits) std::memcpy(logits, host_logits_.data(), vocab);
}

bool DeviceDecoder::block(const Pass& p, const int32_t* tokens, Logits which, float* logits,
                          const std::function<bool()>& should_stop) {
  const char* what = "evaluating a prompt";
  host_step_[0] = {p.pos, 0};
  std::memcpy(host_tokens_.data(), tokens, size_t(p.n) * sizeof(int));
  check(cudaMemcpyAsync(step_.data(), host_step_.data(), sizeof(Step), cudaMemcpyHostToDevice, stream_), what);
  check(
      cudaMemcpyAsync(tokens_.data(), host_tokens_.data(), size_t(p.n) * sizeof(int), cudaMemcpyHostToDevice, stream_),
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
    check(cudaMemcpyAsync(host_logits_.data(), logits_.data(), size_t(rows) * ld * sizeof(float),
                          cudaMemcpyDeviceToHost, stream_),
          what);
    stream_.wait(what);
    for (int i = 0; i < rows; i++)
      std::memcpy(logits + size_t(row - first + i) * n_vocab, host_logits_.data() + size_t(i) * ld,
                  n_vocab * sizeof(float));
  }
  check(cudaMemcpyAsync(host_kept_.data(), kept_.data(), kept_.bytes(), cudaMemcpyDeviceToHost, stream_), what);
  stream_.wait(what);
  return true;
}

}  // namespace cuda
}  // namespace sr
