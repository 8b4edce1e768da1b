// The sampler draws from the distribution that its options describe, and repeats itself from its seed.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "check.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"

using sr::Sampler;
using sr::SamplerOptions;

namespace {

// Everything off: plain softmax at temperature 1.
SamplerOptions plain(int64_t seed = 1) {
  SamplerOptions o;
  o.temperature = 1;
  o.top_k = 0;
  o.top_p = 1;
  o.min_p = 0;
  o.seed = seed;
  return o;
}

std::map<int, double> frequencies(const SamplerOptions& o, const std::vector<float>& logits, int n = 20000) {
  Sampler s(o);
  std::map<int, double> f;
  for (int i = 0; i < n; i++) f[s.sample(logits.data(), int(logits.size()))] += 1.0 / n;
  return f;
}

std::set<int> support(const SamplerOptions& o, const std::vector<float>& logits) {
  std::set<int> ids;
  for (const auto& f : frequencies(o, logits, 5000)) ids.insert(f.first);
  return ids;
}

// Probabilities 0.4, 0.3, 0.2, 0.1 of tokens 2, 0, 3, 1.
const std::vector<float> kFour = {std::log(0.3f), std::log(0.1f), std::log(0.4f), std::log(0.2f)};

}  // namespace

TEST_CASE("sampler: temperature 1 draws the softmax") {
  auto f = frequencies(plain(), kFour, 100000);
  CHECK_NEAR(f[2], 0.4, 0.01);
  CHECK_NEAR(f[0], 0.3, 0.01);
  CHECK_NEAR(f[3], 0.2, 0.01);
  CHECK_NEAR(f[1], 0.1, 0.01);
}

TEST_CASE("sampler: temperature sharpens and flattens after the other filters") {
  SamplerOptions o = plain();
  o.temperature = 0.5f;  // p^2 renormalised: .16 .09 .04 .01 of .30
  auto f = frequencies(o, kFour, 100000);
  CHECK_NEAR(f[2], 16.0 / 30, 0.01);
  CHECK_NEAR(f[1], 1.0 / 30, 0.01);
  o.temperature = 100;
  o.min_p = 0.6f;  // looks at the probabilities before temperature: 0.4 and 0.3 stay
  CHECK(support(o, kFour) == (std::set<int>{0, 2}));
  CHECK_NEAR(frequencies(o, kFour, 50000)[0], 0.5, 0.02);
}

TEST_CASE("sampler: temperature 0 is greedy, the lowest id wins ties") {
  SamplerOptions o = plain();
  o.temperature = 0;
  Sampler s(o);
  const std::vector<float> tie = {1, 3, 2, 3, 3};
  CHECK_EQ(s.sample(tie.data(), 5), 1);
  o.temperature = 1;
  o.top_k = 1;
  Sampler one(o);
  CHECK_EQ(one.sample(tie.data(), 5), 1);
}

TEST_CASE("sampler: top-k keeps the k most likely, lower ids first on ties") {
  SamplerOptions o = plain();
  o.top_k = 2;
  CHECK(support(o, kFour) == (std::set<int>{0, 2}));
  o.top_k = 100;
  CHECK_EQ(support(o, kFour).size(), size_t(4));
  // Long enough for the block filter, with ties across blocks.
  std::vector<float> logits(1000, 0.0f);
  logits[700] = 1;
  logits[3] = 1;
  o.top_k = 4;
  CHECK(support(o, logits) == (std::set<int>{0, 1, 3, 700}));
}

TEST_CASE("sampler: top-p keeps the smallest set that reaches p, at least one token") {
  SamplerOptions o = plain();
  o.top_p = 0.65f;
  CHECK(support(o, kFour) == (std::set<int>{0, 2}));
  o.top_p = 0.75f;
  CHECK(support(o, kFour) == (std::set<int>{0, 2, 3}));
  o.top_p = 0;
  CHECK(support(o, kFour) == std::set<int>{2});
  // After top-k the probabilities are those among the kept: 4/7 and 3/7.
  o.top_k = 2;
  o.top_p = 0.55f;
  CHECK(support(o, kFour) == std::set<int>{2});
  // A flat distribution over many tokens: about half of them.
  std::vector<float> flat(3000, 0.0f);
  o = plain();
  o.top_p = 0.5f;
  for (int id : support(o, flat)) CHECK(id <= 1500);
}

TEST_CASE("sampler: min-p is relative to the most likely token") {
  SamplerOptions o = plain();
  o.min_p = 0.49f;  // 0.4 * 0.49 = 0.196
  CHECK(support(o, kFour) == (std::set<int>{0, 2, 3}));
  o.min_p = 0.51f;
  CHECK(support(o, kFour) == (std::set<int>{0, 2}));
  o.min_p = 1;
  CHECK(support(o, kFour) == std::set<int>{2});
}

TEST_CASE("sampler: the repetition penalty concerns the last accepted tokens, once each") {
  SamplerOptions o = plain();
  o.temperature = 0;
  o.repeat_penalty = 2;
  o.repeat_last_n = 2;
  Sampler s(o);
  const std::vector<float> logits = {4, 3, -1, -1.5f};
  CHECK_EQ(s.sample(logits.data(), 4), 0);
  s.accept(0);
  s.accept(0);
  CHECK_EQ(s.sample(logits.data(), 4), 1);  // 4 / 2 < 3
  s.accept(3);
  s.accept(3);
  CHECK_EQ(s.sample(logits.data(), 4), 0);  // forgotten
  s.accept(99);                             // an id that is not there does no harm
  const std::vector<float> negative = {-9, -1.2f, -1, -9};
  s.reset();
  CHECK_EQ(s.sample(negative.data(), 4), 2);
  s.accept(2);
  CHECK_EQ(s.sample(negative.data(), 4), 1);  // -1 becomes -2
  o.repeat_last_n = 0;
  Sampler off(o);
  off.accept(0);
  CHECK_EQ(off.sample(logits.data(), 4), 0);
}

TEST_CASE("sampler: the penalty remembers exactly its window over a long run") {
  SamplerOptions o = plain();
  o.temperature = 0;
  o.repeat_penalty = 10;
  o.repeat_last_n = 3;
  Sampler s(o);
  std::vector<float> logits(8, 1.0f);
  logits[5] = 2;
  s.accept(5);
  for (int i = 0; i < 50; i++) {
    const int want = i < 3 ? 0 : 5;  // 5 is inside the window for three acceptances of another
    if (i >= 1 && i < 3) CHECK_EQ(s.sample(logits.data(), 8), 1);
    if (i >= 3) CHECK_EQ(s.sample(logits.data(), 8), want);
    s.accept(0);
  }
}

TEST_CASE("sampler: the same seed repeats, another differs, reset starts again") {
  std::vector<float> logits(500);
  for (size_t i = 0; i < logits.size(); i++) logits[i] = float((i * 37) % 101) / 50.0f;
  const auto run = [&](Sampler& s) {
    std::vector<int> ids;
    for (int i = 0; i < 50; i++) ids.push_back(s.sample(logits.data(), 500));
    return ids;
  };
  SamplerOptions o;
  o.seed = 42;
  Sampler a(o), b(o);
  const auto first = run(a);
  CHECK(first == run(b));
  CHECK(first != run(a));
  a.reset();
  CHECK(first == run(a));
  o.seed = 43;
  Sampler c(o);
  CHECK(first != run(c));
  o.seed = -1;
  Sampler d(o), e(o);
  CHECK(d.seed() != e.seed());
  o.seed = int64_t(d.seed());
  Sampler again(o);
  CHECK(run(d) == run(again));
}

TEST_CASE("sampler: the sequence of a seed is the same on every machine") {
  std::vector<float> logits(100);
  for (size_t i = 0; i < logits.size(); i++) logits[i] = float((i * 7) % 13) / 4.0f;
  SamplerOptions o = plain(1234);
  o.top_k = 20;
  Sampler s(o);
  std::vector<int> ids;
  for (int i = 0; i < 8; i++) ids.push_back(s.sample(logits.data(), 100));
  // From std::mt19937_64, whose output the C++ standard fixes.
  std::string text;
  for (int id : ids) text += std::to_string(id) + " ";
  CHECK_EQ(text, std::string("59 11 72 59 37 59 33 59 "));
}

TEST_CASE("sampler: what the likeliest tokens decide is what all logits decide, and the rest is left open") {
  std::mt19937 rng(5);
  std::normal_distribution<float> normal(0, 1);
  int sure = 0, open = 0;
  for (int round = 0; round < 400; round++) {
    const int n = round % 5 == 4 ? 60 : 3000, n_top = std::min(n, 64);
    std::vector<float> logits(static_cast<size_t>(n));
    for (float& x : logits) x = normal(rng) * (round % 2 ? 4.0f : 1.0f);
    if (round % 7 == 0)
      for (float& x : logits) x = std::round(x);  // many equal ones
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (int i = 0; i < n; i++) ids[size_t(i)] = i;
    const auto likelier = [&](int a, int b) {
      return logits[size_t(a)] != logits[size_t(b)] ? logits[size_t(a)] > logits[size_t(b)] : a < b;
    };
    std::sort(ids.begin(), ids.end(), likelier);
    std::vector<float> top;
    double total = 0;
    for (int i = 0; i < n_top; i++) top.push_back(logits[size_t(ids[size_t(i)])]);
    for (float x : logits) total += std::exp(double(x - top[0]));
    total *= 1 + (round % 3 - 1) * 0.9e-9;  // as far off as allowed
    SamplerOptions o = plain(round);
    o.temperature = round % 11 == 0 ? 0.0f : 0.9f;
    o.top_k = round % 4 == 0 ? 0 : round % 4 == 1 ? 5 : round % 4 == 2 ? 64 : 200;
    o.top_p = round / 4 % 2 ? 0.8f : 1.0f;
    o.min_p = round / 8 % 2 ? 0.2f : 0.0f;
    o.repeat_penalty = round / 16 % 3 == 1 ? 1.4f : round / 16 % 3 == 2 ? 0.8f : 1.0f;
    o.repeat_last_n = round / 48 % 2 ? 10 : -1;
    Sampler whole(o), from_top(o);
    for (int i = 0; i < 12; i++) {
      const int32_t recent = ids[size_t(i * (round % 13))];  // also the likeliest ones
      whole.accept(recent);
      from_top.accept(recent);
    }
    for (int step = 0; step < 3; step++) {
      const int32_t got = from_top.sample_top({top.data(), ids.data(), n_top, n, total});
      // What is left open has changed nothing: a draw from all logits is that of a sampler that was never asked.
      const int32_t wanted = whole.sample(logits.data(), n);
      CHECK_EQ(got < 0 ? from_top.sample(logits.data(), n) : got, wanted);
      (got < 0 ? open : sure)++;
      whole.accept(wanted);
      from_top.accept(wanted);
    }
  }
  CHECK(sure > 300);
  CHECK(open > 20);
}

TEST_CASE("sampler: the likeliest tokens are asked for only by options that they can decide") {
  const auto asks = [](auto set) {
    SamplerOptions o = plain();
    set(o);
    return Sampler(o).may_sample_top(256);
  };
  CHECK(Sampler(SamplerOptions()).may_sample_top(256));  // the usual ones
  CHECK(asks([](auto& o) { o.temperature = 0; }));
  CHECK(asks([](auto& o) { o.top_k = 256; }));
  CHECK(asks([](auto& o) { o.top_k = 256, o.top_p = 0.9f, o.min_p = 0.1f, o.repeat_penalty = 1.1f; }));
  CHECK(asks([](auto& o) { o.top_p = 0.9f; }));
  CHECK(asks([](auto& o) { o.min_p = 0.1f, o.repeat_penalty = 1.1f; }));
  CHECK(asks([](auto& o) { o.top_p = 0.9f, o.repeat_penalty = 0.9f, o.repeat_last_n = 0; }));  // no penalty
  CHECK(!asks([](auto&) {}));                  // plain temperature: any token may be drawn
  CHECK(!asks([](auto& o) { o.top_k = 257; }));
  CHECK(!asks([](auto& o) { o.top_k = 40, o.repeat_penalty = 0.9f; }));    // makes others likelier
  CHECK(!asks([](auto& o) { o.temperature = 0, o.repeat_penalty = 0.9f; }));
  CHECK(!asks([](auto& o) { o.top_p = 0.9f, o.repeat_penalty = 1.1f; }));  // the sum after the penalty is not known
}

TEST_CASE("sampler: impossible options are refused by name") {
  const auto with = [](auto set) {
    SamplerOptions o;
    set(o);
    Sampler s(o);
  };
  CHECK_THROWS(with([](auto& o) { o.temperature = -1; }), sr::Error, "temperature");
  CHECK_THROWS(with([](auto& o) { o.temperature = NAN; }), sr::Error, "temperature");
  CHECK_THROWS(with([](auto& o) { o.top_k = -1; }), sr::Error, "top_k");
  CHECK_THROWS(with([](auto& o) { o.top_p = 1.5f; }), sr::Error, "top_p");
  CHECK_THROWS(with([](auto& o) { o.min_p = -0.1f; }), sr::Error, "min_p");
  CHECK_THROWS(with([](auto& o) { o.repeat_penalty = 0; }), sr::Error, "repeat_penalty");
  CHECK_THROWS(with([](auto& o) { o.repeat_last_n = -2; }), sr::Error, "repeat_last_n");
  CHECK_THROWS(with([](auto& o) { o.seed = -2; }), sr::Error, "seed");
}
