// Set-up: weights to the device, working memory, masks; and the forward pass that the session calls. The pass itself is in
// cuda/pass.cc.
#include "cuda/decoder.h"

#include <algorithm>
#include <cstring>

#include "cuda/layer.h"
#include "format/packed_model.h"

namespace sr {
namespace cuda {
namespace {

constexpr const char* kWorkspace = "the model's working memory";
constexpr const char* kWeights = "the weights";
constexpr const char* kContext = "the cached keys and values";
constexpr size_t kMaxPlans = 8;  // device copies of thresholds that are kept

std::string megabytes(size_t n) { return std::to_string((n + 999999) / 1000000) + " MB"; }

size_t weights_bytes(const DecoderWeights& w) {
  size_t n = 0;
  const auto add = [&](const Linear& m) {
    for (const PanelMatrix& p : m.parts) n += device_bytes(p);
  };
  add(w.token_embd);
  add(w.output);
  for (const LayerWeights& l : w.layers) {
    for (const Linear* m : {&l.attn_qkv, &l.attn_o, &l.ffn_in, &l.ffn_down}) add(*m);
    if (l.ffn_rows) n += l.ffn_rows.m.total_bytes();
  }
  return n;
}

}  // namespace

DeviceKv::DeviceKv(const DecoderConfig& c, int n_ctx) : n_ctx_(n_ctx) {
  layer_entries_ = size_t(c.n_kv_heads) * size_t(n_ctx) * size_t(c.head_dim);
  bytes_per_position_ = 4 * size_t(c.n_layers) * size_t(c.n_kv_heads) * size_t(c.head_dim);
  const size_t entries = layer_entries_ * size_t(c.n_layers);
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), kContext);
  if (4 * entries > free_bytes) {
    throw Error(ErrorCode::budget, "not enough GPU memory for a context of " + std::to_string(n_ctx) + " tokens (" +
                                       megabytes(4 * entries) + ", " + megabytes(free_bytes) +
                                       " free): use a smaller context (--ctx-size), or --device cpu");
  }
  k_.reset(entries, kContext);
  v_.reset(entries, kContext);
}

DeviceKv::~DeviceKv() { drop_graph(); }

void DeviceKv::drop_graph() {
  if (graph_) cudaGraphExecDestroy(graph_);
  graph_ = nullptr;
}

AttendView DeviceKv::view(const DecoderConfig& c, int layer) const {
  const size_t at = size_t(layer) * layer_entries_;
  return {k_.data() + at, v_.data() + at, n_ctx_, c.n_heads, c.n_kv_heads, c.head_dim, c.window[size_t(layer)], c.attn_scale,
          c.attn_softcap};
}

DeviceDecoder::DeviceDecoder(const PackedModel& model)
    : config_(read_decoder_config(model)), weights_(load_weights(model, config_, 1)) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "its properties");
  name_ = device.name;
  multiprocessors_ = device.multiProcessorCount;
  if (config_.head_dim > kMaxHeadDim) {
    throw Error(ErrorCode::unsupported, "heads of " + std::to_string(config_.head_dim) + " dimensions are not supported on a GPU (" +
                                            std::to_string(kMaxHeadDim) + " at most): use --device cpu");
  }
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "its free memory");
  device_bytes_ = weights_bytes(weights_);
  if (device_bytes_ > free_bytes) {
    throw Error(ErrorCode::budget, "not enough GPU memory for the weights (" + megabytes(device_bytes_) + ", " +
                                       megabytes(free_bytes) + " free on " + name_ +
                                       "): use a smaller model, or --device cpu");
  }
  load(model);
  make_buffers();
}

DeviceDecoder::~DeviceDecoder() = default;

const float* DeviceDecoder::upload(const float* vector, size_t n) {
  if (!vector) return nullptr;
  vectors_.push_back(to_device(vector, n, kWeights));
  return vectors_.back().data();
}

NormView DeviceDecoder::norm(const Norm& n, size_t width) {
  if (!n) return {NormType::none, nullptr, nullptr, 0};
  const NormType type = config_.norm == NormKind::layer ? NormType::layer : NormType::rms;
  return {type, upload(n.weight, width), upload(n.bias, width), config_.norm_eps};
}

void DeviceDecoder::load(const PackedModel&) {
  const DecoderConfig& c = config_;
  const size_t embd = size_t(c.n_embd);
  embd_ = DeviceMatrix(weights_.token_embd.parts, nullptr, "token_embd");
  if (!weights_.output.empty()) output_ = DeviceMatrix(weights_.output.parts, weights_.output.bias, "output");
  output_norm_ = norm(weights_.output_norm, embd);
  if (weights_.position_embd) position_embd_ = upload(weights_.position_embd, size_t(weights_.n_positions) * embd);
  for (int i = 0; i < (weights_.rope_factors_long ? 4 : 2) && c.rope_style != RopeStyle::none; i++) {
    const bool local = i % 2 == 1;
    const float* factors = local ? weights_.rope_factors_local : weights_.rope_factors;
    const Rope rope(c.rope_style, c.rope_dims, local ? c.rope_theta_local : c.rope_theta,
                    i < 2 ? factors : weights_.rope_factors_long, local ? c.rope_mscale_local : c.rope_mscale);
    frequency_[i] = to_device(rope.frequency().data(), rope.frequency().size(), kWeights);
  }
  const bool full = c.qk_norm == QkNorm::full;
  const size_t q_width = size_t(full ? c.n_attn() : c.head_dim), k_width = size_t(full ? c.n_kv() : c.head_dim);
  for (const LayerWeights& l : weights_.layers) {
    auto d = std::make_unique<DeviceLayer>();
    d->attn_norm = norm(l.attn_norm, embd);
    d->ffn_norm = norm(l.ffn_norm, embd);
    d->post_attn_norm = norm(l.post_attn_norm, embd);
    d->post_ffn_norm = norm(l.post_ffn_norm, embd);
    d->q_norm = norm(l.q_norm, q_width);
    d->k_norm = norm(l.k_norm, k_width);
    d->attn_sub_norm = norm(l.attn_sub_norm, size_t(c.n_attn()));
    d->ffn_sub_norm = norm(l.ffn_sub_norm, size_t(c.n_ff));
    d->qkv = DeviceMatrix(l.attn_qkv.parts, l.attn_qkv.bias, "attn_qkv");
    d->o = DeviceMatrix(l.attn_o.parts, l.attn_o.bias, "attn_o");
    if (l.ffn_rows) d->ffn_rows = DeviceNeurons(l.ffn_rows.m, l.ffn_rows.bias, "the FFN's rows");
    else d->ffn_in = DeviceMatrix(l.ffn_in.parts, l.ffn_in.bias, "the FFN's input matrix");
    d->down = DeviceMatrix(l.ffn_down.parts, l.ffn_down.bias, "ffn_down");
    d->head_at = to_device(l.head_at.data(), l.head_at.size(), kWeights);
    layers_.push_back(std::move(d));
  }
  true_zeros_ = c.activation == Activation::relu || c.activation == Activation::relu2 || c.activation_threshold > 0 ||
                c.up_relu;
}

int DeviceDecoder::attend_splits(int n, int n_ctx) const {
  const int rows = n * config_.heads_per_kv(), blocks = config_.n_kv_heads * ((rows + 15) / 16);
  const int wanted = (2 * multiprocessors_ + blocks - 1) / blocks, most = (n_ctx + 63) / 64;
  return std::max(1, std::min({wanted, most, 64}));
}

void DeviceDecoder::make_buffers() {
  const DecoderConfig& c = config_;
  const size_t rows = kMaxBlock;
  size_t qkv = 0, branch = 0, ffn = 0, partial = 1, groups = 1;
  const auto look = [&](const DeviceMatrix& m, size_t* width) {
    if (m.empty()) return;
    *width = std::max(*width, size_t(m.view().y_rows));
    groups = std::max(groups, size_t(m.view().groups));
    partial = std::max(partial, gemv_partial_floats(m.view(), plan_gemv(m.view(), multiprocessors_)));
  };
  size_t vocab = 0;
  look(output_.empty() ? embd_ : output_, &vocab);
  for (const auto& l : layers_) {
    look(l->qkv, &qkv);
    look(l->o, &branch);
    look(l->down, &branch);
    look(l->ffn_in, &ffn);
  }
  ffn = std::max(ffn, 2 * size_t(c.n_ff));
  ld_qkv_ = qkv;
  ld_branch_ = branch;
  ld_gate_up_ = ffn;
  step_.reset(1, kWorkspace);
  tokens_.reset(rows, kWorkspace);
  ids_.reset(size_t(c.n_ff), kWorkspace);
  const std::vector<int> no_tickets(groups, 0);
  tickets_ = to_device(no_tickets.data(), groups, kWorkspace);
  kept_.reset(size_t(c.n_layers) * kSites + 2, kWorkspace);
  x_.reset(rows * size_t(c.n_embd), kWorkspace);
  qkv_.reset(rows * qkv, kWorkspace);
  branch_o_.reset(rows * branch, kWorkspace);
  branch_down_.reset(rows * branch, kWorkspace);
  gate_up_.reset(rows * ffn, kWorkspace);
  for (auto& t : rope_table_) t.reset(std::max<size_t>(1, rows * size_t(c.rope_dims)), kWorkspace);
  partial_.reset(partial, kWorkspace);
  logits_.reset(kHeadRows * vocab, kWorkspace);
  in_ = DeviceVectors(kMaxBlock, c.n_embd, kWorkspace);
  ffn_in_ = DeviceVectors(kMaxBlock, c.n_embd, kWorkspace);
  att_ = DeviceVectors(kMaxBlock, c.n_attn(), kWorkspace);
  z_ = DeviceVectors(kMaxBlock, c.n_ff, kWorkspace);
  head_in_ = DeviceVectors(kHeadRows, c.n_embd, kWorkspace);
  size_t slots = 1;
  for (int n = 1; n <= kMaxBlock; n++) slots = std::max(slots, size_t(attend_splits(n, 1 << 30)) * size_t(n));
  slots *= size_t(c.n_heads);
  attend_partial_.reset(slots * size_t(c.head_dim), kWorkspace);
  attend_max_.reset(slots, kWorkspace);
  attend_sum_.reset(slots, kWorkspace);
  const std::vector<float> zeros(size_t(std::max({c.n_embd, c.n_ff, c.n_attn()})), 0.0f);
  zeros_ = to_device(zeros.data(), zeros.size(), kWorkspace);
  host_step_.reset(1, kWorkspace);
  host_tokens_.reset(rows, kWorkspace);
  host_kept_.reset(kept_.size(), kWorkspace);
  host_logits_.reset(logits_.size(), kWorkspace);
}

// Thresholds on the device, copied once for each plan; the oldest copy makes room for a new one.
DevicePlan* DeviceDecoder::plan_for(const Skipping& skipping) {
  const uint64_t serial = skipping.plan ? skipping.plan->serial() : 0;
  for (const auto& p : plans_) {
    if (p->serial == serial && p->exact == skipping.exact && p->mask_blocks == skipping.mask_blocks) return p.get();
  }
  auto made = std::make_unique<DevicePlan>();
  made->serial = serial;
  made->exact = skipping.exact;
  made->mask_blocks = skipping.mask_blocks;
  made->thresholds.resize(size_t(config_.n_layers) * kSites);
  if (const SparsityPlan* plan = skipping.plan) {
    made->dense_tokens = plan->dense_tokens();
    if (plan->break_even(Site::A) != SparsityPlan::kByShape) made->break_even = plan->break_even(Site::A);
    for (int l = 0; l < config_.n_layers; l++) {
      for (int s = 0; s < kSites; s++) {
        const Thresholds t = plan->threshold(l, Site(s));
        if (!t) continue;
        std::vector<float> all(size_t(plan->width(Site(s))));
        for (size_t i = 0; i < all.size(); i++) all[i] = t.of(int(i));
        made->thresholds[size_t(l) * kSites + size_t(s)] = to_device(all.data(), all.size(), "thresholds");
      }
    }
  }
  made->id = ++last_plan_;
  if (plans_.size() == kMaxPlans) plans_.erase(plans_.begin());
  plans_.push_back(std::move(made));
  return plans_.back().get();
}

bool DeviceDecoder::planned(const Skipping& s, int pos, bool decode) const {
  return s.plan && (decode || s.mask_blocks) && pos >= s.plan->dense_tokens();
}

// The same choice as the CPU decoder's threshold_for, with the position left to the device.
Mask DeviceDecoder::mask(const Pass& p, int layer, Site site) const {
  Mask m = {};
  if (!p.masks) return m;
  const DevicePlan& plan = *p.masks;
  const auto at = [&](Site s) { return plan.thresholds[size_t(layer) * kSites + size_t(s)].data(); };
  const LayerWeights& w = weights_.layers[size_t(layer)];
  if (p.decode || plan.mask_blocks) m.threshold = at(site);
  if (p.decode && site == Site::Z && w.ffn_down.quantised && !w.ffn_down.floating) {
    const bool zeros = plan.exact && true_zeros_;
    if (zeros) m.before = zeros_.data();
    if (!m.threshold && (zeros || at(Site::G))) m.threshold = zeros_.data();
  }
  if (!m.threshold && !m.before) return m;
  m.dense_tokens = plan.dense_tokens;
  m.kept = kept_.data() + size_t(layer) * kSites + size_t(site);
  const int width = site == Site::O ? config_.n_attn() : site == Site::Z || site == Site::G ? config_.n_ff : config_.n_embd;
  m.limit = int(plan.break_even * float(width));
  return m;
}

bool DeviceDecoder::forward(const int32_t* tokens, int n, int pos, DeviceKv* cache, Logits which, float* logits,
                            const std::function<bool()>& should_stop, const Skipping& skipping) {
  std::lock_guard<std::mutex> lock(turn_);
  if (skipping.neurons || skipping.predictor || skipping.measure || skipping.statistic) {
    throw Error(ErrorCode::unsupported, "chosen or predicted neurons and heads (sites N and H) are not made for the GPU: use "
                                        "--device cpu");
  }
  const DevicePlan* masks = plan_for(skipping);
  const Pass p = {n, cache, masks, n == 1};
  if (n == 1) {
    if (should_stop()) return false;
    decode_step(p, tokens[0], pos, which == Logits::none ? nullptr : logits);
  } else if (!block(p, tokens, pos, which, logits, should_stop)) {
    return false;
  }
  if (which != Logits::none && host_kept_[size_t(config_.n_layers) * kSites]) {
    throw Error(ErrorCode::runtime, "the model's output at position " + std::to_string(pos + n - 1) +
                                        " is not a number (NaN or infinity): its weights are damaged or overflow; "
                                        "check the source and convert it again with sparse-run convert");
  }
  report(skipping, n, pos);
  return true;
}

// The counts of model/skipping.cc, from what the device kept. In a block of tokens all of a site's masked rows count
// together: whether the list would have been used is judged by their mean.
void DeviceDecoder::report(const Skipping& skipping, int n, int pos) const {
  SiteCounts* counts = skipping.counts;
  if (!counts) return;
  const bool decode = n == 1, zeros = decode && skipping.exact && true_zeros_;
  const int first = skipping.plan ? std::max(pos, skipping.plan->dense_tokens()) : pos;
  const bool any = planned(skipping, pos + n - 1, decode);
  const int rows = any ? pos + n - first : 0;
  if (!any && !zeros) return;
  const bool given = skipping.plan && skipping.plan->break_even(Site::A) != SparsityPlan::kByShape;
  const float limit = given ? skipping.plan->break_even(Site::A) : DevicePlan().break_even;
  const auto threshold = [&](int l, Site s) { return any && bool(skipping.plan->threshold(l, s)); };
  for (int l = 0; l < config_.n_layers; l++) {
    const LayerWeights& w = weights_.layers[size_t(l)];
    const int held = std::max(rows, zeros ? 1 : 0);
    int64_t read = int64_t(w.attn_qkv.bytes + w.attn_o.bytes + w.ffn_bytes()) * held;
    counts->bytes_held.fetch_add(read, std::memory_order_relaxed);
    const int* kept = host_kept_.data() + size_t(l) * kSites;
    const Linear* matrices[] = {&w.attn_qkv, &w.attn_o, &w.ffn_in, &w.ffn_down};
    for (int s = 0; s < 4; s++) {
      const bool exact = Site(s) == Site::Z && decode && w.ffn_down.quantised && !w.ffn_down.floating &&
                         (zeros || threshold(l, Site::G));
      if (!threshold(l, Site(s)) && !exact) continue;
      const Linear& m = *matrices[s];
      const int64_t offered = int64_t(m.cols) * held;
      counts->kept[size_t(s)].fetch_add(kept[s], std::memory_order_relaxed);
      counts->offered[size_t(s)].fetch_add(offered, std::memory_order_relaxed);
      if (float(kept[s]) > limit * float(offered)) continue;
      for (const PanelMatrix& part : m.parts) {
        const size_t heads = size_t(part.slabs()) * part.slab_head_bytes(part.padded_rows());
        read -= int64_t(double(part.total_bytes() - heads) * double(offered - kept[s]) / m.cols);
      }
    }
    if (w.ffn_rows && config_.ffn_gated && (threshold(l, Site::G) || zeros)) {
      const int64_t offered = int64_t(config_.n_ff) * held;
      counts->kept[size_t(Site::G)].fetch_add(kept[4], std::memory_order_relaxed);
      counts->offered[size_t(Site::G)].fetch_add(offered, std::memory_order_relaxed);
      read -= (offered - kept[4]) * int64_t(w.ffn_rows.m.row_bytes());
    }
    counts->bytes_read.fetch_add(read, std::memory_order_relaxed);
  }
}

}  // namespace cuda
}  // namespace sr
