// Set-up: weights to the device, working memory, masks; and the forward pass that the session calls. The pass itself is
// in cuda/pass.cc.
#include "cuda/decoder.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/layer.h"
#include "cuda/split.h"
#include "format/packed_model.h"
#include "model/row_ops.h"

namespace sr {
namespace cuda {
namespace {

constexpr const char* kWorkspace = "the model's working memory";
constexpr const char* kWeights = "the weights";
constexpr const char* kContext = "the cached keys and values";
constexpr const char* kSampling = "choosing a token";
constexpr size_t kMaxPlans = 8;  // device copies of thresholds that are kept
constexpr int kUsualContext = 4096;
constexpr int kBestScratch = 512;  // floats of argmax
// Left free where no budget was given: for the driver's own needs and what allocations are rounded up to.
constexpr size_t kMostReserve = size_t(256) << 20;

// Whether a switch of the environment is set to `value`.
bool is_set(const char* name, const char* value) {
  const char* text = std::getenv(name);
  return text && std::string(text) == value;
}

// Programmatic dependent launch in a captured graph, on demand until it has been measured. The code that was loaded
// decides: what was compiled for an older GPU and translated for this one has no griddepcontrol, and would not wait for
// its input.
bool can_overlap(const cudaDeviceProp& device) {
  constexpr int kSince = 12030;  // of CUDA, for graphs
  constexpr int kOldestCode = 90;
  int driver = 0, runtime = 0, machine = 0, ptx = 0;
  if (!is_set("SPARSE_RUN_CUDA_OVERLAP", "1") || device.major < 9) return false;
  check(code_for_device(&machine, &ptx), "the code for it");
  if (ptx < kOldestCode) return false;
  check(cudaDriverGetVersion(&driver), "its driver's version");
  check(cudaRuntimeGetVersion(&runtime), "the runtime's version");
  return driver >= kSince && runtime >= kSince;
}

std::string megabytes(size_t n) { return std::to_string((n + 999999) / 1000000) + " MB"; }

size_t ffn_bytes(const LayerWeights& l) {
  return device_bytes(l.ffn_in) + device_bytes(l.ffn_rows) + device_bytes(l.ffn_down);
}

// Logits of a token, every part of the head padded to whole tiles.
size_t padded_logits(const DecoderConfig& c) { return size_t(c.n_vocab) + size_t(kMaxParts) * kTileRows; }

size_t bytes_without_ffn(const DecoderWeights& w, const DecoderConfig& c) {
  size_t floats = 0, n = device_bytes(w.token_embd) + device_bytes(w.output);
  const auto add = [&](const Norm& norm, int width) { floats += (bool(norm) + bool(norm.bias)) * size_t(width); };
  const bool full = c.qk_norm == QkNorm::full;
  add(w.output_norm, c.n_embd);
  if (w.position_embd) floats += size_t(w.n_positions) * size_t(c.n_embd);
  for (const LayerWeights& l : w.layers) {
    n += device_bytes(l.attn_qkv) + device_bytes(l.attn_o) + l.head_at.size() * sizeof(int);
    for (const Norm* norm : {&l.attn_norm, &l.ffn_norm, &l.post_attn_norm, &l.post_ffn_norm}) add(*norm, c.n_embd);
    add(l.q_norm, full ? c.n_attn() : c.head_dim);
    add(l.k_norm, full ? c.n_kv() : c.head_dim);
    add(l.attn_sub_norm, c.n_attn());
    add(l.ffn_sub_norm, c.n_ff);
  }
  if (c.rope_style != RopeStyle::none) n += 4 * size_t(c.rope_dims / 2) * sizeof(double);
  return n + floats * sizeof(float);
}

}  // namespace

void DeviceRoom::take(size_t bytes, int n_ctx) {
  const int64_t left = left_.fetch_sub(int64_t(bytes));
  if (left >= int64_t(bytes)) return;
  give_back(bytes);
  throw Error(ErrorCode::budget,
              "not enough GPU memory for a context of " + std::to_string(n_ctx) + " tokens (" + megabytes(bytes) +
                  ", " + megabytes(size_t(std::max<int64_t>(left, 0))) +
                  " left): use a smaller context (--ctx-size), more of the device (--device-memory), or "
                  "--device cpu");
}

size_t DeviceKv::device_bytes(const DecoderConfig& c, int n_ctx) {
  return 4 * size_t(c.n_layers) * size_t(c.n_kv_heads) * size_t(c.head_dim) * size_t(n_ctx) +
         padded_logits(c) * sizeof(float);
}

DeviceKv::DeviceKv(const DecoderConfig& c, int n_ctx, std::shared_ptr<DeviceRoom> room)
    : n_ctx_(n_ctx), room_(std::move(room)) {
  layer_entries_ = size_t(c.n_kv_heads) * size_t(n_ctx) * size_t(c.head_dim);
  bytes_per_position_ = 4 * size_t(c.n_layers) * size_t(c.n_kv_heads) * size_t(c.head_dim);
  const size_t entries = layer_entries_ * size_t(c.n_layers);
  if (room_) {
    room_->take(device_bytes(c, n_ctx), n_ctx);
    taken_ = device_bytes(c, n_ctx);
  }
  try {
    k_.reset(entries, kContext);
    v_.reset(entries, kContext);
    logits_.reset(padded_logits(c), kContext);
  } catch (...) {
    if (room_) room_->give_back(taken_);
    throw;
  }
}

DeviceKv::~DeviceKv() {
  drop_pieces();
  if (room_) room_->give_back(taken_);
}

void DeviceKv::drop_pieces() {
  for (const Piece& p : pieces_) cudaGraphExecDestroy(p.graph);
  pieces_.clear();
  plan_ = 0;
}

AttendView DeviceKv::view(const DecoderConfig& c, int layer) const {
  const size_t at = size_t(layer) * layer_entries_;
  return {k_.data() + at,  v_.data() + at, n_ctx_, c.n_heads, c.n_kv_heads, c.head_dim, c.window[size_t(layer)],
          c.attn_scale, c.attn_softcap};
}

DeviceDecoder::DeviceDecoder(const PackedModel& model, const DeviceOptions& options)
    : config_(read_decoder_config(model)), weights_(load_weights(model, config_, 1)) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "its properties");
  name_ = device.name;
  multiprocessors_ = device.multiProcessorCount;
  graphs_ = !is_set("SPARSE_RUN_CUDA_GRAPHS", "0");
  overlap_ = can_overlap(device);
  if (config_.head_dim > kMaxHeadDim) {
    throw Error(ErrorCode::unsupported, "heads of " + std::to_string(config_.head_dim) +
                                            " dimensions are not supported on a GPU (" + std::to_string(kMaxHeadDim) +
                                            " at most): use --device cpu");
  }
  true_zeros_ = has_true_zeros(config_);
  load(divide(model, options), options.threads);
  make_buffers();
}

DeviceDecoder::~DeviceDecoder() = default;

// Attention, norms, head, working memory and a context come first, then as many of the FFNs' neurons as fit.
std::vector<std::vector<int>> DeviceDecoder::divide(const PackedModel& model, const DeviceOptions& options) {
  const DecoderConfig& c = config_;
  size_t free_bytes = 0, total = 0;
  check(cudaMemGetInfo(&free_bytes, &total), "its free memory");
  if (options.memory > free_bytes) {
    throw Error(ErrorCode::budget, "a device memory budget of " + megabytes(options.memory) + " is more than the " +
                                       megabytes(free_bytes) + " free on " + name_ + ": give less (--device-memory)");
  }
  const size_t budget = options.memory ? options.memory : free_bytes - std::min(free_bytes / 16, kMostReserve);
  size_t working = 0;
  const Widths w = widths();
  for_buffers(w, [&](auto& buffer, size_t n) { working += n * sizeof(*buffer.data()); });
  for (int width : {c.n_embd, c.n_embd, c.n_attn(), c.n_ff}) working += DeviceVectors::bytes(kMaxBlock, width);
  working += DeviceVectors::bytes(kHeadRows, c.n_embd);
  int n_ctx = options.n_ctx ? options.n_ctx : std::min(kUsualContext, c.n_ctx_train);
  if (!options.n_ctx && weights_.n_positions) n_ctx = std::min(n_ctx, weights_.n_positions);
  const size_t fixed = bytes_without_ffn(weights_, c), context = DeviceKv::device_bytes(c, n_ctx);
  floor_ = fixed + working + context;

  std::vector<FfnUnits> units;
  size_t ffns = 0;
  for (const LayerWeights& l : weights_.layers) {
    const int count = c.n_ff / kTileRows;
    ffns += ffn_bytes(l);
    units.push_back({count, (ffn_bytes(l) + size_t(count) - 1) / size_t(count), bool(l.ffn_sub_norm)});
  }
  const bool divided = floor_ + ffns > budget;
  if (divided && floor_ > budget) {
    throw Error(ErrorCode::budget,
                (options.memory
                     ? "a device memory budget of " + megabytes(budget) + " is too small on " + name_
                     : "not enough GPU memory for this model (" + megabytes(budget) + " to be had on " + name_ + ")") +
                    ": attention, head and norms take " + megabytes(fixed) + ", working memory " + megabytes(working) +
                    ", a context of " + std::to_string(n_ctx) + " tokens " + megabytes(context) + ", together " +
                    megabytes(floor_) +
                    (options.memory ? "; give at least that (--device-memory)" : "; use a smaller model") +
                    ", a smaller context (--ctx-size), or --device cpu");
  }
  const std::vector<int> counts = plan_split(units, divided ? budget - floor_ : SIZE_MAX);
  const std::vector<uint32_t> ranks = divided ? read_ranks(model, weights_, c.n_ff) : std::vector<uint32_t>();
  std::vector<std::vector<int>> hot;
  device_bytes_ = fixed;
  size_t neurons = 0;
  for (size_t l = 0; l < units.size(); l++) {
    std::vector<int> order = hot_order(ranks.empty() ? nullptr : ranks.data() + l * size_t(c.n_ff), units[l].count);
    order.resize(size_t(counts[l]));
    std::sort(order.begin(), order.end());  // sums keep the order that they have where nothing is divided
    device_bytes_ += counts[l] == units[l].count ? ffn_bytes(weights_.layers[l]) : size_t(counts[l]) * units[l].bytes;
    neurons += order.size();
    hot.push_back(std::move(order));
  }
  hot_share_ = double(neurons) * kTileRows / (double(c.n_layers) * c.n_ff);
  budget_ = budget;
  room_ = std::make_shared<DeviceRoom>(budget, device_bytes_ + working);
  return hot;
}

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

void DeviceDecoder::load(const std::vector<std::vector<int>>& hot, int threads) {
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
  for (int i = 0; i < c.n_layers; i++) {
    if (int(hot[size_t(i)].size()) * kTileRows < c.n_ff) rest_layers_++;
  }
  if (rest_layers_) rest_ = std::make_unique<FfnRest>(c, threads, kMaxBlock);
  for (int i = 0; i < c.n_layers; i++) {
    const LayerWeights& l = weights_.layers[size_t(i)];
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
    load_ffn(i, hot[size_t(i)], d.get());
    d->head_at = to_device(l.head_at.data(), l.head_at.size(), kWeights);
    layers_.push_back(std::move(d));
  }
}

// The hot units to the device, the others to the CPU; only one of the two adds down's bias.
void DeviceDecoder::load_ffn(int layer, const std::vector<int>& hot, DeviceLayer* d) {
  const LayerWeights& whole = weights_.layers[size_t(layer)];
  d->neurons = int(hot.size()) * kTileRows;
  const bool all = d->neurons == config_.n_ff;
  if (!all) {
    std::vector<int> cold;
    for (int unit = 0; unit < config_.n_ff / kTileRows; unit++) {
      if (!std::binary_search(hot.begin(), hot.end(), unit)) cold.push_back(unit);
    }
    rest_->add(layer, FfnPart(whole, cold, hot.empty()));
    d->units = hot;
    if (hot.empty()) return;
  }
  const FfnPart part = all ? FfnPart() : FfnPart(whole, hot, true);
  const LayerWeights& l = all ? whole : part.weights();
  if (l.ffn_rows) d->ffn_rows = DeviceNeurons(l.ffn_rows.m, l.ffn_rows.bias, "the FFN's rows");
  else d->ffn_in = DeviceMatrix(l.ffn_in.parts, l.ffn_in.bias, "the FFN's input matrix");
  d->down = DeviceMatrix(l.ffn_down.parts, l.ffn_down.bias, "ffn_down");
}

int DeviceDecoder::attend_splits(int n, int n_ctx) const {
  const int rows = n * config_.heads_per_kv(), blocks = config_.n_kv_heads * ((rows + 15) / 16);
  const int wanted = (2 * multiprocessors_ + blocks - 1) / blocks, most = (n_ctx + 63) / 64;
  return std::max(1, std::min({wanted, most, 64}));
}

DeviceDecoder::Widths DeviceDecoder::widths() const {
  Widths w;
  const auto look = [&](const Linear& m, size_t* width) {
    if (m.empty()) return;
    *width = std::max(*width, size_t(m.padded_rows()));
    w.groups = std::max(w.groups, gemv_groups(m));
  };
  look(weights_.head(), &w.vocab);
  for (const LayerWeights& l : weights_.layers) {
    look(l.attn_qkv, &w.qkv);
    look(l.attn_o, &w.branch);
    look(l.ffn_down, &w.branch);
    look(l.ffn_in, &w.ffn);
  }
  w.ffn = std::max({w.ffn, 2 * size_t(config_.n_ff), w.branch});  // also where what the CPU computed arrives
  return w;
}

template <class Fn>
void DeviceDecoder::for_buffers(const Widths& w, Fn fn) {
  const DecoderConfig& c = config_;
  const size_t rows = kMaxBlock;
  size_t slots = 1;
  for (int n = 1; n <= kMaxBlock; n++) slots = std::max(slots, size_t(attend_splits(n, 1 << 30)) * size_t(n));
  slots *= size_t(c.n_heads);
  fn(step_, 1);
  fn(tokens_, rows);
  fn(ids_, size_t(c.n_ff));
  fn(tickets_, size_t(w.groups));
  fn(kept_, size_t(c.n_layers) * kSites + 3);
  fn(x_, rows * size_t(c.n_embd));
  fn(qkv_, rows * w.qkv);
  fn(branch_o_, rows * w.branch);
  fn(branch_down_, rows * w.branch);
  fn(gate_up_, rows * w.ffn);
  for (auto& t : rope_table_) fn(t, std::max<size_t>(1, rows * size_t(c.rope_dims)));
  fn(partial_, gemv_partial_most(w.groups, multiprocessors_));
  fn(logits_, kHeadRows * w.vocab);
  fn(attend_partial_, slots * size_t(c.head_dim));
  fn(attend_max_, slots);
  fn(attend_sum_, slots);
  fn(best_scratch_, size_t(kBestScratch));
  fn(top_scratch_, 1);
  fn(top_, 1);
  fn(zeros_, size_t(std::max({c.n_embd, c.n_ff, c.n_attn()})));
}

void DeviceDecoder::make_buffers() {
  const DecoderConfig& c = config_;
  const size_t rows = kMaxBlock;
  const Widths w = widths();
  ld_qkv_ = w.qkv;
  ld_branch_ = w.branch;
  ld_gate_up_ = w.ffn;
  for_buffers(w, [](auto& buffer, size_t n) { buffer.reset(n, kWorkspace); });
  in_ = DeviceVectors(kMaxBlock, c.n_embd, kWorkspace);
  ffn_in_ = DeviceVectors(kMaxBlock, c.n_embd, kWorkspace);
  att_ = DeviceVectors(kMaxBlock, c.n_attn(), kWorkspace);
  z_ = DeviceVectors(kMaxBlock, c.n_ff, kWorkspace);
  head_in_ = DeviceVectors(kHeadRows, c.n_embd, kWorkspace);
  const std::vector<int> no_tickets(tickets_.size(), 0);
  copy_to_device(tickets_.data(), no_tickets.data(), tickets_.bytes(), kWorkspace);
  const std::vector<float> zeros(zeros_.size(), 0.0f);
  copy_to_device(zeros_.data(), zeros.data(), zeros_.bytes(), kWorkspace);
  host_step_.reset(1, kWorkspace);
  host_tokens_.reset(rows, kWorkspace);
  host_kept_.reset(kept_.size(), kWorkspace);
  host_logits_.reset(logits_.size(), kWorkspace);
  host_top_.reset(1, kWorkspace);
  rest_kept_.assign(size_t(c.n_layers) * kSites, 0);
  if (!rest_) return;
  host_x_.reset(rows * size_t(ffn_in_.view().padded), kWorkspace);
  host_rest_.reset(rows * w.branch, kWorkspace);
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
  made->rest.resize(rest_ ? size_t(config_.n_layers) : 0);
  if (const SparsityPlan* plan = skipping.plan) {
    made->dense_tokens = plan->dense_tokens();
    if (plan->break_even(Site::A) != SparsityPlan::kByShape) made->break_even = plan->break_even(Site::A);
    for (int l = 0; l < config_.n_layers; l++) {
      for (int s = 0; s < kSites; s++) {
        const Thresholds t = plan->threshold(l, Site(s));
        if (!t) continue;
        std::vector<float> all(size_t(plan->width(Site(s))));
        for (size_t i = 0; i < all.size(); i++) all[i] = t.of(int(i));
        if (rest_ && rest_->has(l)) divide_thresholds(l, Site(s), &all, made.get());
        if (all.empty()) continue;
        made->thresholds[size_t(l) * kSites + size_t(s)] = to_device(all.data(), all.size(), "thresholds");
      }
    }
  }
  made->id = ++last_plan_;
  if (plans_.size() == kMaxPlans) plans_.erase(plans_.begin());
  plans_.push_back(std::move(made));
  return plans_.back().get();
}

// Of a layer that is divided: its thresholds for the CPU's neurons are put by, those of the device's are left.
void DeviceDecoder::divide_thresholds(int layer, Site site, std::vector<float>* all, DevicePlan* plan) const {
  DevicePlan::Rest& rest = plan->rest[size_t(layer)];
  if (site == Site::M) rest.in = *all;
  if (site != Site::Z && site != Site::G) return;
  (site == Site::Z ? rest.z : rest.gate) = pick_neurons(rest_->part(layer).units(), all->data());
  *all = pick_neurons(layers_[size_t(layer)]->units, all->data());
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
  const bool of_neurons = site == Site::Z || site == Site::G;
  const int width = site == Site::O ? config_.n_attn() : of_neurons ? layers_[size_t(layer)]->neurons : config_.n_embd;
  m.limit = int(plan.break_even * float(width));
  return m;
}

bool DeviceDecoder::forward(const int32_t* tokens, int n, int pos, DeviceKv* cache, Logits which, float* logits,
                            const std::function<bool()>& should_stop, const Skipping& skipping, int32_t* best) {
  std::lock_guard<std::mutex> lock(turn_);
  if (skipping.neurons || skipping.predictor || skipping.measure || skipping.statistic) {
    throw Error(ErrorCode::unsupported,
                "chosen or predicted neurons and heads (sites N and H) are not made for the GPU: "
                "use --device cpu");
  }
  const DevicePlan* masks = plan_for(skipping);
  const Pass p = {n, pos, cache, masks, n == 1};
  std::fill(rest_kept_.begin(), rest_kept_.end(), 0);
  if (n == 1) {
    if (should_stop()) return false;
    decode_step(p, tokens[0], which == Logits::none ? nullptr : logits);
    if (best) *best = host_kept_[size_t(config_.n_layers) * kSites + 2];
  } else if (!block(p, tokens, which, logits, should_stop)) {
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

void DeviceDecoder::logits(const DeviceKv& cache, float* out) {
  std::lock_guard<std::mutex> lock(turn_);
  const size_t bytes = size_t(config_.n_vocab) * sizeof(float);
  check(cudaMemcpyAsync(host_logits_.data(), cache.logits_.data(), bytes, cudaMemcpyDeviceToHost, stream_), "logits");
  stream_.wait("logits");
  std::memcpy(out, host_logits_.data(), bytes);
}

void DeviceDecoder::top(const DeviceKv& cache, Top* out) {
  std::lock_guard<std::mutex> lock(turn_);
  find_top(stream_, {cache.logits_.data(), config_.n_vocab, top_scratch_.data(), top_.data()});
  check(cudaMemcpyAsync(host_top_.data(), top_.data(), sizeof(Top), cudaMemcpyDeviceToHost, stream_), kSampling);
  stream_.wait(kSampling);
  *out = host_top_[0];
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
    int kept[kSites];
    for (int s = 0; s < kSites; s++) {
      const size_t at = size_t(l) * kSites + size_t(s);
      kept[s] = host_kept_[at] + rest_kept_[at];
    }
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
        const size_t heads = part.heads_bytes(part.padded_rows());
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
