// A conversation's state: cached tokens, the last logits, statistics, cancellation. Prompts run in blocks; the cache
// counts a block's tokens only when the whole block is done.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <string>

#include "base/aligned_buffer.h"
#include "engine/model_impl.h"
#include "engine/predictor_impl.h"
#include "engine/sparsity_impl.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kMaxContext = 1 << 26;  // keeps positions and chunks within int
constexpr auto kPollInterval = std::chrono::milliseconds(20);

double seconds_since(Clock::time_point t0) { return std::chrono::duration<double>(Clock::now() - t0).count(); }

int checked_context(const Decoder& decoder, int n_ctx) {
  if (n_ctx < 0 || n_ctx > kMaxContext) {
    throw Error(ErrorCode::usage, "n_ctx must be from 1 to " + std::to_string(kMaxContext) +
                                      ", or 0 for the model's own, got " + std::to_string(n_ctx));
  }
  const int limit = decoder.position_limit();
  if (n_ctx == 0) return limit ? std::min(limit, decoder.config().n_ctx_train) : decoder.config().n_ctx_train;
  if (limit && n_ctx > limit) {
    throw Error(ErrorCode::context, "this model has " + std::to_string(limit) + " positions, a context of " +
                                        std::to_string(n_ctx) + " is not possible: use a smaller one (--ctx-size)");
  }
  return n_ctx;
}

// Refuses a second thread instead of computing nonsense.
class InUse {
 public:
  explicit InUse(std::atomic<bool>* flag) : flag_(flag) {
    if (flag->exchange(true, std::memory_order_acquire)) {
      throw Error(ErrorCode::usage, "this session is in use by another thread: give each thread a session of its own");
    }
  }
  ~InUse() { flag_->store(false, std::memory_order_release); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  std::atomic<bool>* flag_;
};

}  // namespace

static_assert(Session::kTapCount == kTaps && sizeof(Density::site) / sizeof(double) == kAllSites, "names");

struct Session::Impl {
  Impl(std::shared_ptr<Model::Impl> m, int n)
      : model(std::move(m)),
        n_ctx(checked_context(model->decoder, n)),
        room(model.get(), n_ctx),
        cache(model->decoder.config().n_layers, model->decoder.config().n_kv_heads, model->decoder.config().head_dim,
              n_ctx),
        device_cache(model->device ? model->device->make_cache(n_ctx) : nullptr),
        logits(size_t(model->decoder.padded_vocab()), "the logits") {
    tokens.reserve(size_t(std::min(n_ctx, 1 << 16)));
    should_stop = [this] { return stop_requested(); };
  }

  bool stop_requested();
  void check_tokens(const int32_t* ids, int n) const;
  void check_room(int n) const;
  void hold(int n);
  void run(const int32_t* ids, int n, float* all);
  // away: of one token on a device, the logits may stay there; the most likely token comes back alone.
  bool forward(const int32_t* ids, int n, Logits which, float* out, bool away) {
    const int pos = int(tokens.size());
    best = -1;
    logits_away = away && device_cache && n == 1 && which == Logits::last;
    if (device_cache) {
      return model->device->forward(ids, n, pos, device_cache.get(), which, logits_away ? nullptr : out, should_stop,
                                    skipping(), logits_away ? &best : nullptr);
    }
    return model->decoder.forward(ids, n, pos, &cache, which, out, should_stop, skipping());
  }
  int32_t sample(Sampler* sampler);
  int32_t sample_away(Sampler* sampler);
  void need_logits() const {
    if (!has_logits) throw Error(ErrorCode::usage, "there are no logits: evaluate tokens first");
  }
  const float* logits_here() {
    need_logits();
    if (logits_away) model->device->logits(device_cache.get(), logits.data());
    logits_away = false;
    return logits.data();
  }

  Skipping skipping() {
    Skipping s;
    s.plan = sparsity ? &sparsity->plan : nullptr;
    s.mask_blocks = mask_prefill;
    s.exact = exact;
    s.neurons = neurons.get();
    s.mask_neurons = mask_neurons;
    s.predictor = predictor ? &predictor->set : nullptr;
    s.mask_predicted = mask_predicted;
    s.measure = measure;
    s.statistic = statistic.get();
    s.counts = &counts;
    return s;
  }

  std::shared_ptr<Model::Impl> model;
  std::shared_ptr<Sparsity::Impl> sparsity;
  bool mask_prefill = false, exact = true;
  std::unique_ptr<NeuronSets> neurons;
  bool mask_neurons = false;
  std::shared_ptr<Predictor::Impl> predictor;
  bool mask_predicted = false, measure = false;
  std::unique_ptr<NeuronStatistic> statistic;
  SiteCounts counts;
  int n_ctx;
  Model::Impl::ContextRoom room;
  KvCache cache;  // address space; memory only as it is used
  std::unique_ptr<DeviceCache> device_cache;  // instead, where a device runs the model
  AlignedBuffer<float> logits;
  bool has_logits = false;
  bool logits_away = false;  // they are still on the device
  int32_t best = -1;         // the most likely token, where the device has said so
  DeviceTop top;             // the likeliest ones, where it was asked
  std::vector<int32_t> tokens;
  // What other threads may read while one evaluates.
  std::atomic<int> n_past{0};
  std::atomic<int> held{0};  // positions of the cache whose memory is in use
  mutable std::mutex stats_mutex;
  Stats stats;
  std::atomic<bool> cancelled{false};
  std::atomic<bool> in_use{false};
  std::function<bool()> poll;
  std::function<bool()> should_stop;
  Clock::time_point last_poll = Clock::now();
};

bool Session::Impl::stop_requested() {
  if (cancelled.load(std::memory_order_relaxed)) return true;
  if (!poll) return false;
  const Clock::time_point now = Clock::now();
  if (now - last_poll < kPollInterval) return false;
  last_poll = now;
  return poll();
}

void Session::Impl::check_tokens(const int32_t* ids, int n) const {
  if (n < 1) throw Error(ErrorCode::usage, "there are no tokens to evaluate");
  const int n_vocab = model->decoder.config().n_vocab;
  for (int i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= n_vocab) {
      throw Error(ErrorCode::usage, "token " + std::to_string(ids[i]) + " at index " + std::to_string(i) +
                                        " is outside the vocabulary of " + std::to_string(n_vocab) + " tokens");
    }
  }
}

void Session::Impl::check_room(int n) const {
  if (size_t(n) <= size_t(n_ctx) - tokens.size()) return;
  throw Error(ErrorCode::context, std::to_string(tokens.size()) + " cached and " + std::to_string(n) +
                                      " new tokens do not fit into the context of " + std::to_string(n_ctx) +
                                      ": shorten the text or use a larger context (--ctx-size)");
}

// Memory for the first n positions, and no more: what a longer context, or a pass that was given up, has left behind
// must not stay in use once weights are in its place.
void Session::Impl::hold(int n) {
  if (n < held) {
    if (device_cache && n) return;  // keeps what it has
    cache.keep(n);
  }
  room.use(n);
  held = n;
}

// Evaluates ids; `all` is null or receives [n, n_vocab].
void Session::Impl::run(const int32_t* ids, int n, float* all) {
  check_tokens(ids, n);
  check_room(n);
  const size_t n_vocab = size_t(model->decoder.config().n_vocab);
  const Clock::time_point t0 = Clock::now();
  const auto count = [&](int done) {
    std::lock_guard<std::mutex> lock(stats_mutex);
    (n == 1 ? stats.decode_tokens : stats.prompt_tokens) += done;
    (n == 1 ? stats.decode_seconds : stats.prompt_seconds) += seconds_since(t0);
  };
  has_logits = false;
  int done = 0;
  while (done < n) {
    const int block = std::min(n - done, kMaxBlock);
    const bool every = all && block > 1;
    const Logits which = every ? Logits::all : all || done + block == n ? Logits::last : Logits::none;
    float* out = every ? all + size_t(done) * n_vocab : logits.data();
    bool whole = false;
    NeuronStatistic* counting = block > 1 ? statistic.get() : nullptr;
    if (counting) counting->begin_block();
    try {
      hold(int(tokens.size()) + block);
      whole = !should_stop() && forward(ids + done, block, which, out, !all);
    } catch (...) {
      if (counting) counting->undo_block();
      count(done);
      throw;
    }
    if (counting && whole) counting->end_block(block);
    if (!whole) {
      if (counting) counting->undo_block();
      cancelled.store(false, std::memory_order_relaxed);
      count(done);
      throw Error(ErrorCode::cancelled, "cancelled");
    }
    if (all && !every) std::memcpy(all + size_t(done) * n_vocab, logits.data(), n_vocab * sizeof(float));
    tokens.insert(tokens.end(), ids + done, ids + done + block);
    n_past = int(tokens.size());
    done += block;
  }
  if (all) std::memcpy(logits.data(), all + size_t(n - 1) * n_vocab, n_vocab * sizeof(float));
  has_logits = true;
  count(n);
}

// The token that a sampler chooses while the logits are on the device, -1 where it needs them all.
int32_t Session::Impl::sample_away(Sampler* sampler) {
  if (!logits_away) return -1;
  if (best >= 0 && sampler->greedy()) return best;
  const int n_vocab = model->decoder.config().n_vocab;
  if (!sampler->may_sample_top(std::min(n_vocab, kDeviceTop))) return -1;
  model->device->top(device_cache.get(), &top);
  return sampler->sample_top({top.logits.data(), top.ids.data(), int(top.ids.size()), n_vocab, top.total});
}

int32_t Session::Impl::sample(Sampler* sampler) {
  need_logits();
  int32_t token = sample_away(sampler);
  if (token < 0) token = sampler->sample(logits_here(), model->decoder.config().n_vocab);
  sampler->accept(token);
  return token;
}

Session::Session(const Model& model, int n_ctx) : impl_(new Impl(model.impl_, n_ctx)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;

int Session::n_ctx() const { return impl_->n_ctx; }
int Session::n_past() const { return impl_->n_past; }
int Session::n_vocab() const { return impl_->model->decoder.config().n_vocab; }
size_t Session::kv_bytes() const {
  const int n = impl_->held;
  return impl_->device_cache ? impl_->device_cache->bytes(n) : impl_->cache.bytes(n);
}
void Session::cancel() { impl_->cancelled.store(true, std::memory_order_relaxed); }

std::vector<int32_t> Session::tokens() const {
  InUse guard(&impl_->in_use);
  return impl_->tokens;
}

Stats Session::stats() const {
  std::lock_guard<std::mutex> lock(impl_->stats_mutex);
  return impl_->stats;
}

void Session::set_poll(std::function<bool()> poll) {
  InUse guard(&impl_->in_use);
  impl_->poll = std::move(poll);
}

void Session::truncate(int n) {
  InUse guard(&impl_->in_use);
  Impl& s = *impl_;
  if (n < 0 || n > int(s.tokens.size())) {
    throw Error(ErrorCode::usage, "cannot keep " + std::to_string(n) + " of " + std::to_string(s.tokens.size()) +
                                      " cached tokens");
  }
  if (n == int(s.tokens.size())) return;
  s.tokens.resize(size_t(n));
  s.n_past = n;
  s.has_logits = false;
  s.hold(n);
}

void Session::eval(const int32_t* tokens, int n) {
  InUse guard(&impl_->in_use);
  impl_->run(tokens, n, nullptr);
}

void Session::eval_all(const int32_t* tokens, int n, float* out) {
  InUse guard(&impl_->in_use);
  impl_->run(tokens, n, out);
}

const float* Session::logits() const {
  InUse guard(&impl_->in_use);
  return impl_->logits_here();
}

void Session::set_sparsity(const Sparsity* sparsity, bool mask_prefill) {
  InUse guard(&impl_->in_use);
  if (sparsity && sparsity->impl_->model != impl_->model) {
    throw Error(ErrorCode::usage, "these thresholds are bound to another model: make them for the session's own");
  }
  impl_->sparsity = sparsity ? sparsity->impl_ : nullptr;
  impl_->mask_prefill = mask_prefill;
}

void Session::set_exact(bool on) {
  InUse guard(&impl_->in_use);
  impl_->exact = on;
}

void Session::set_neurons(const std::vector<const std::vector<int32_t>*>& sets, bool mask_prefill) {
  InUse guard(&impl_->in_use);
  const Decoder& d = impl_->model->decoder;
  if (sets.empty()) {
    impl_->neurons = nullptr;
    return;
  }
  if (sets.size() != size_t(d.config().n_layers)) {
    throw Error(ErrorCode::usage, "there are neurons for " + std::to_string(sets.size()) + " layers, this model has " +
                                      std::to_string(d.config().n_layers));
  }
  auto made = std::make_unique<NeuronSets>(d.config().n_layers, d.config().n_ff);
  for (int l = 0; l < d.config().n_layers; l++) {
    const std::vector<int32_t>* ids = sets[size_t(l)];
    if (!ids) continue;
    const std::string why = d.site_refusal(l, Site::N);
    if (!why.empty()) throw Error(ErrorCode::usage, "site N of layer " + std::to_string(l) + " " + why);
    made->set(l, ids->data(), ids->size());
  }
  impl_->neurons = std::move(made);
  impl_->mask_neurons = mask_prefill;
}

void Session::set_predictor(const Predictor* predictor, bool mask_prefill, bool measure) {
  InUse guard(&impl_->in_use);
  if (predictor && predictor->impl_->model != impl_->model) {
    throw Error(ErrorCode::usage, "this predictor is bound to another model: make one for the session's own");
  }
  impl_->predictor = predictor ? predictor->impl_ : nullptr;
  impl_->mask_predicted = mask_prefill;
  impl_->measure = measure;
}

void Session::collect(const std::string& kind) {
  InUse guard(&impl_->in_use);
  const DecoderConfig& c = impl_->model->decoder.config();
  impl_->statistic =
      kind.empty() ? nullptr : std::make_unique<NeuronStatistic>(kind, c.n_layers, c.n_ff, kMaxBlock);
}

int64_t Session::statistic(float* out) const {
  InUse guard(&impl_->in_use);
  if (!impl_->statistic) throw Error(ErrorCode::usage, "nothing is collected: call collect before the prompt");
  const std::vector<double>& sums = impl_->statistic->sums();
  for (size_t i = 0; out && i < sums.size(); i++) out[i] = float(sums[i]);
  return impl_->statistic->tokens();
}

int Session::n_layers() const { return impl_->model->decoder.config().n_layers; }
int Session::n_ff() const { return impl_->model->decoder.config().n_ff; }

Density Session::density() {
  InUse guard(&impl_->in_use);
  SiteCounts& c = impl_->counts;
  Density d;
  for (size_t i = 0; i < size_t(kAllSites); i++) {
    const int64_t kept = c.kept[i].exchange(0), offered = c.offered[i].exchange(0);
    if (offered) d.site[i] = double(kept) / double(offered);
  }
  const int64_t read = c.bytes_read.exchange(0), held = c.bytes_held.exchange(0);
  if (held) d.body = double(read) / double(held);
  const int64_t found = c.found.exchange(0), needed = c.needed.exchange(0);
  if (needed) d.recall = double(found) / double(needed);
  return d;
}

void Session::embed(const int32_t* tokens, int n, float* out) {
  InUse guard(&impl_->in_use);
  impl_->check_tokens(tokens, n);
  impl_->check_room(n);
  impl_->model->decoder.embed(tokens, n, 0, out);
}

void Session::run_layer(int layer, int pos, const float* x, int n, float* out, float* const* taps) {
  InUse guard(&impl_->in_use);
  Impl& s = *impl_;
  if (!s.tokens.empty()) {
    throw Error(ErrorCode::usage, "single layers run only while no tokens are cached: truncate(0)");
  }
  if (layer < 0 || layer >= s.model->decoder.config().n_layers) {
    throw Error(ErrorCode::usage, "there is no layer " + std::to_string(layer));
  }
  if (n < 1 || n > kMaxBlock || pos < 0 || pos > s.n_ctx - n) {
    throw Error(ErrorCode::usage, "single layers take 1 to " + std::to_string(kMaxBlock) +
                                      " rows inside the context of " + std::to_string(s.n_ctx));
  }
  s.hold(pos + n);
  LayerRun run = {layer, x, out, {}};
  for (int i = 0; taps && i < kTaps; i++) run.taps[i] = taps[i];
  s.model->decoder.run_layer(run, n, pos, &s.cache, s.skipping());
}

int Session::n_embd() const { return impl_->model->decoder.config().n_embd; }
int Session::tap_width(int tap) const {
  const Decoder& d = impl_->model->decoder;
  const bool of_gate = tap == int(Site::G) || tap == kTapUp;
  return of_gate ? (d.config().ffn_gated ? d.config().n_ff : 0) : d.site_width(Site(tap));
}

int32_t Session::sample(Sampler* sampler) {
  InUse guard(&impl_->in_use);
  return impl_->sample(sampler);
}

int32_t Session::step(Sampler* sampler) {
  InUse guard(&impl_->in_use);
  Impl& s = *impl_;
  s.need_logits();
  s.check_room(1);
  const Clock::time_point t0 = Clock::now();
  const int32_t token = s.sample(sampler);
  {
    std::lock_guard<std::mutex> lock(s.stats_mutex);
    s.stats.decode_seconds += seconds_since(t0);
  }
  s.run(&token, 1, nullptr);
  return token;
}

}  // namespace sr
