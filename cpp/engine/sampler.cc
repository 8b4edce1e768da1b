// Picks the next token. Vectors live as long as the sampler, so that nothing is allocated per token; no standard
// distribution is used, as those differ between libraries.
#include <algorithm>
#include <cmath>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "sparse_run/engine.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

// A strict total order, so that results do not depend on the sorting algorithm. NaN counts as the least.
bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

constexpr int kBlock = 64;

// Whether a logit is above `limit`; without a branch for each, so that a vocabulary takes microseconds.
bool any_above(float limit, const float* logits, int n) {
  int above = 0;
  for (int i = 0; i < n; i++) above |= logits[i] > limit;
  return above != 0;
}

void check(bool good, const char* what, const std::string& got) {
  if (!good) throw Error(ErrorCode::usage, std::string(what) + ", got " + got);
}

}  // namespace

struct Sampler::Impl {
  SamplerOptions options;
  std::mutex mutex;  // two sessions in two threads may share a sampler
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::vector<int32_t> accepted;
  std::vector<int32_t> recent;  // distinct tokens that the penalty concerns
  std::vector<float> penalised;
  std::vector<Candidate> candidates;
  std::vector<double> weights;

  const float* apply_penalty(const float* logits, int n);
  int32_t greedy(const float* logits, int n) const;
  void keep_top_k(const float* logits, int n);
  void keep_top_p();
  void keep_min_p();
  int32_t draw();
  bool penalises() const { return options.repeat_penalty != 1.0f && options.repeat_last_n != 0 && !accepted.empty(); }
  void find_recent();
  bool keep_known(const TopTokens& top);
  bool keep_certain_top_p(double total);
};

void Sampler::Impl::find_recent() {
  const size_t last = options.repeat_last_n < 0 ? accepted.size() : size_t(options.repeat_last_n);
  recent.assign(accepted.size() > last ? accepted.end() - std::ptrdiff_t(last) : accepted.begin(), accepted.end());
  std::sort(recent.begin(), recent.end());
  recent.erase(std::unique(recent.begin(), recent.end()), recent.end());
}

float penalise(float x, float penalty) { return x <= 0 ? x * penalty : x / penalty; }

// Penalised logits, or the given ones where nothing is penalised.
const float* Sampler::Impl::apply_penalty(const float* logits, int n) {
  if (!penalises()) return logits;
  find_recent();
  penalised.assign(logits, logits + n);
  for (int32_t id : recent) {
    if (id >= 0 && id < n) penalised[size_t(id)] = penalise(penalised[size_t(id)], options.repeat_penalty);
  }
  return penalised.data();
}

// Fills candidates with those of the likeliest that stay so whatever the rest of the vocabulary holds; whether all
// tokens are known. A penalty above 1 makes no token likelier, so that whoever is still likelier than the last one was
// before it is likelier than all that are not here.
bool Sampler::Impl::keep_known(const TopTokens& top) {
  candidates.clear();
  for (int i = 0; i < top.n; i++) candidates.push_back({top.logits[i], top.ids[i]});
  if (penalises()) {
    find_recent();
    const Candidate last = candidates.back();
    for (Candidate& c : candidates) {
      if (std::binary_search(recent.begin(), recent.end(), c.id)) c.logit = penalise(c.logit, options.repeat_penalty);
    }
    std::sort(candidates.begin(), candidates.end(), likelier);
    while (top.n < top.n_vocab && !candidates.empty() && likelier(last, candidates.back())) candidates.pop_back();
  }
  return top.n == top.n_vocab;
}

// keep_top_p on the likeliest of more candidates, whose sum is known to 1e-9; false where that leaves it open.
bool Sampler::Impl::keep_certain_top_p(double total) {
  const double wanted = double(options.top_p) * total;
  double sum = 0;
  for (size_t i = 0; i < candidates.size(); i++) {
    sum += std::exp(double(candidates[i].logit - candidates[0].logit));
    if (sum < wanted * (1 - 1e-8)) continue;
    if (sum < wanted * (1 + 1e-8)) return false;
    candidates.resize(i + 1);
    return true;
  }
  return false;
}

int32_t Sampler::Impl::greedy(const float* logits, int n) const {
  int32_t best = 0;
  for (int32_t begin = 0; begin < n; begin += kBlock) {
    const int32_t end = std::min(begin + kBlock, n);
    if (!any_above(logits[best], logits + begin, end - begin)) continue;
    for (int32_t i = begin; i < end; i++) {
      if (logits[i] > logits[best]) best = i;
    }
  }
  return best;
}

// Fills candidates with the k most likely tokens, most likely first; with k = 0, with all, in no order.
void Sampler::Impl::keep_top_k(const float* logits, int n) {
  const int k = options.top_k;
  candidates.clear();
  if (k <= 0 || k >= n) {
    for (int32_t i = 0; i < n; i++) candidates.push_back({logits[i], i});
    return;
  }
  // A heap whose front is the least likely of the k best. Few tokens get past it, so blocks are looked at as a whole.
  for (int32_t begin = 0; begin < n; begin += kBlock) {
    const int32_t end = std::min(begin + kBlock, n);
    // An equal logit has a higher id than those kept and loses.
    const bool full = int(candidates.size()) == k;
    if (full && !any_above(candidates.front().logit, logits + begin, end - begin)) continue;
    for (int32_t i = begin; i < end; i++) {
      const Candidate c = {logits[i], i};
      if (int(candidates.size()) < k) {
        candidates.push_back(c);
        std::push_heap(candidates.begin(), candidates.end(), likelier);
      } else if (likelier(c, candidates.front())) {
        std::pop_heap(candidates.begin(), candidates.end(), likelier);
        candidates.back() = c;
        std::push_heap(candidates.begin(), candidates.end(), likelier);
      }
    }
  }
  std::sort_heap(candidates.begin(), candidates.end(), likelier);
}

// Keeps the smallest likeliest set whose probability reaches top_p. Sorts only as far as that set goes.
void Sampler::Impl::keep_top_p() {
  if (options.top_p >= 1.0f) return;
  const float top = std::min_element(candidates.begin(), candidates.end(), likelier)->logit;
  double total = 0;
  for (const Candidate& c : candidates) total += std::exp(double(c.logit - top));
  size_t sorted = 0, count = 0;
  double sum = 0;
  while (count < candidates.size()) {
    if (count == sorted) {
      const size_t next = std::min(candidates.size(), std::max(size_t(128), sorted * 4));
      const auto begin = candidates.begin() + std::ptrdiff_t(sorted);
      const auto middle = candidates.begin() + std::ptrdiff_t(next);
      if (middle != candidates.end()) std::nth_element(begin, middle, candidates.end(), likelier);
      std::sort(begin, middle, likelier);
      sorted = next;
    }
    sum += std::exp(double(candidates[count].logit - top));
    count++;
    if (sum >= double(options.top_p) * total) break;
  }
  candidates.resize(count);
}

void Sampler::Impl::keep_min_p() {
  if (options.min_p <= 0.0f) return;
  const float top = std::min_element(candidates.begin(), candidates.end(), likelier)->logit;
  const float least = top + std::log(options.min_p);
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(),
                                  [&](const Candidate& c) { return c.logit < least; }),
                   candidates.end());
}

int32_t Sampler::Impl::draw() {
  const float top = std::min_element(candidates.begin(), candidates.end(), likelier)->logit;
  weights.clear();
  double total = 0;
  for (const Candidate& c : candidates) {
    weights.push_back(std::exp(double(c.logit - top) / double(options.temperature)));
    total += weights.back();
  }
  double left = double(random() >> 11) * 0x1p-53 * total;  // uniform in [0, total)
  size_t i = 0;
  while (i + 1 < weights.size() && left >= weights[i]) left -= weights[i++];
  return candidates[i].id;
}

Sampler::Sampler(const SamplerOptions& o) : impl_(new Impl) {
  check(o.temperature >= 0 && std::isfinite(o.temperature), "temperature must be 0 or more",
        std::to_string(o.temperature));
  check(o.top_k >= 0, "top_k must be 0 (all) or more", std::to_string(o.top_k));
  check(o.top_p >= 0 && o.top_p <= 1, "top_p must be from 0 to 1", std::to_string(o.top_p));
  check(o.min_p >= 0 && o.min_p <= 1, "min_p must be from 0 to 1", std::to_string(o.min_p));
  check(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty), "repeat_penalty must be above 0",
        std::to_string(o.repeat_penalty));
  check(o.repeat_last_n >= -1, "repeat_last_n must be -1 (all), 0 (none) or more", std::to_string(o.repeat_last_n));
  check(o.seed >= -1, "seed must be -1 (random) or more", std::to_string(o.seed));
  impl_->options = o;
  if (o.seed < 0) {
    std::random_device device;
    impl_->seed = (uint64_t(device()) << 32 | device()) >> 1;  // fits the option, so that a run can be repeated
  } else {
    impl_->seed = uint64_t(o.seed);
  }
  reset();
}

Sampler::~Sampler() = default;
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;

int32_t Sampler::sample(const float* logits, int n_vocab) {
  check(n_vocab > 0, "logits must not be empty", "0 values");
  Impl& s = *impl_;
  std::lock_guard<std::mutex> lock(s.mutex);
  logits = s.apply_penalty(logits, n_vocab);
  if (s.options.temperature == 0 || s.options.top_k == 1) return s.greedy(logits, n_vocab);
  s.keep_top_k(logits, n_vocab);
  s.keep_top_p();
  s.keep_min_p();
  return s.draw();
}

bool Sampler::may_sample_top(int n) const {
  const SamplerOptions& o = impl_->options;
  if (o.repeat_penalty < 1.0f && o.repeat_last_n != 0) return false;  // makes tokens likelier that are not among them
  if (o.temperature == 0 || o.top_k == 1) return true;
  if (o.top_k > 0) return o.top_k <= n;
  // top_p is a share of what all tokens have after the penalty, of which the sum before it says nothing.
  if (o.top_p < 1.0f) return o.repeat_penalty == 1.0f || o.repeat_last_n == 0;
  return o.min_p > 0.0f;
}

int32_t Sampler::sample_top(const TopTokens& top) {
  Impl& s = *impl_;
  if (top.n < 1 || !may_sample_top(top.n)) return -1;
  std::lock_guard<std::mutex> lock(s.mutex);
  const SamplerOptions& o = s.options;
  const auto by_id = [](const Candidate& a, const Candidate& b) { return a.id < b.id; };
  const bool all = s.keep_known(top);
  if (s.candidates.empty()) return -1;
  if (o.temperature == 0 || o.top_k == 1) return s.candidates[0].id;
  // keep_top_k makes a list in order, else one by id, which is what is drawn from where top_p does not order it.
  const bool chosen = o.top_k > 0 && o.top_k < top.n_vocab;
  bool back_by_id = false;
  if (chosen) {
    if (s.candidates.size() < size_t(o.top_k)) return -1;
    s.candidates.resize(size_t(o.top_k));
  } else if (all) {
    std::sort(s.candidates.begin(), s.candidates.end(), by_id);
  } else if (o.top_p < 1.0f) {
    if (!s.keep_certain_top_p(top.total)) return -1;
  } else {
    // Of all tokens those that min_p leaves: certain where the last one here is none of them.
    if (s.candidates.back().logit >= s.candidates[0].logit + std::log(o.min_p)) return -1;
    back_by_id = true;
  }
  if (chosen || all) s.keep_top_p();
  s.keep_min_p();
  if (back_by_id) std::sort(s.candidates.begin(), s.candidates.end(), by_id);
  return s.draw();
}

void Sampler::accept(int32_t token) {
  Impl& s = *impl_;
  if (s.options.repeat_penalty == 1.0f || s.options.repeat_last_n == 0) return;
  std::lock_guard<std::mutex> lock(s.mutex);
  const size_t last = size_t(s.options.repeat_last_n);
  if (s.options.repeat_last_n > 0 && s.accepted.size() >= 2 * last) {  // forget in bulk, not token by token
    s.accepted.erase(s.accepted.begin(), s.accepted.end() - std::ptrdiff_t(last));
  }
  s.accepted.push_back(token);
}

bool Sampler::greedy() const {
  const SamplerOptions& o = impl_->options;
  return (o.temperature == 0 || o.top_k == 1) && (o.repeat_penalty == 1.0f || o.repeat_last_n == 0);
}

void Sampler::reset() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->accepted.clear();
  impl_->random.seed(impl_->seed);
}

uint64_t Sampler::seed() const { return impl_->seed; }

}  // namespace sr
