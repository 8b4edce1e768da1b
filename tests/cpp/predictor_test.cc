// Predictors at run time: their arithmetic, what they leave out in decode and in blocks, heads, and measuring.
#include "sparse_run/predictor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "check.h"
#include "sparse_run/error.h"
#include "tiny_runs.h"

using sr::Density;
using sr::Error;
using sr::LowRankWeights;
using sr::Model;
using sr::Predictor;
using sr::Session;
using sr_test::in_blocks;
using sr_test::open_model;
using sr_test::same_bits;
using sr_test::some_tokens;
using sr_test::stepwise;
using sr_test::TinyModel;
using sr_test::TinySpec;

namespace {

// Random weights whose thresholds are the same for all.
struct Random {
  std::vector<int8_t> a, b;
  std::vector<float> a_scale, b_scale, threshold;
  LowRankWeights w;
  // Multiplies all codes; their scales make up for it.
  void widen(int by) {
    for (auto* codes : {&a, &b}) {
      for (int8_t& c : *codes) c = int8_t(c * by);
    }
    for (auto* scales : {&a_scale, &b_scale}) {
      for (float& f : *scales) f /= float(by);
    }
  }
  // Codes: up to 127, or so many.
  Random(int n_embd, int rank, int n, float at, uint32_t seed, int most = 127) {
    std::mt19937 rng(seed);
    const auto codes = [&](size_t count) {
      std::vector<int8_t> out(count);
      for (auto& c : out) c = int8_t(int(rng() % uint32_t(2 * most + 1)) - most);
      return out;
    };
    a = codes(size_t(rank) * n_embd);
    b = codes(size_t(n) * rank);
    for (int i = 0; i < rank; i++) a_scale.push_back(0.01f / std::sqrt(float(n_embd)) * float(1 + i % 3));
    for (int i = 0; i < n; i++) b_scale.push_back(0.01f / std::sqrt(float(rank)) * float(1 + i % 2));
    threshold.assign(size_t(n), at);
    w = {rank, n, a.data(), a_scale.data(), b.data(), b_scale.data(), threshold.data()};
  }
};

constexpr float kAll = -1e9f, kNone = 1e9f;

TinySpec spec_of(const char* activation, bool gated) {
  TinySpec s;
  s.neurons = true;
  s.activation = activation;
  s.gated = gated;
  s.biases = !gated;
  s.n_layers = 3;
  s.n_heads = 6;
  s.n_kv_heads = 2;
  return s;
}

}  // namespace

TEST_CASE("predictors: all predicted is dense; decode has the bits of masked blocks, for any number of threads") {
  for (const bool gated : {true, false}) {
    for (const char* activation : {"relu", "silu"}) {
      const TinySpec spec = spec_of(activation, gated);
      const TinyModel tiny(spec);
      const auto ids = some_tokens(40, spec.n_vocab);
      std::vector<float> dense, sparse, with_heads;
      for (int threads : {1, 2, 3, 5}) {
        const Model model = open_model(tiny, threads);
        Session s(model, 64);
        const auto want = stepwise(s, ids);
        if (dense.empty()) dense = want;
        CHECK(same_bits(want, dense));
        const auto run = [&](const Predictor& p, bool blocks) {
          s.truncate(0);
          s.density();
          s.set_predictor(&p, blocks, false);
          return blocks ? in_blocks(s, ids) : stepwise(s, ids);
        };
        Predictor everything(model, 5), some(model, 5), more(model, 5);
        for (int l = 0; l < spec.n_layers; l++) {
          everything.set_neurons(l, Random(spec.n_embd, 24, spec.n_ff, kAll, 1).w);
          if (l) everything.set_heads(l, Random(spec.n_embd, 7, spec.n_heads, kAll, 2).w);
          if (l == 1) continue;  // a layer without a predictor
          some.set_neurons(l, Random(spec.n_embd, l ? 530 : 33, spec.n_ff, 0.1f, 3).w);
          more.set_neurons(l, Random(spec.n_embd, l ? 530 : 33, spec.n_ff, 0.1f, 3).w);
        }
        for (int l = 1; l < spec.n_layers; l++) more.set_heads(l, Random(spec.n_embd, 9, spec.n_heads, 0.0f, 4).w);
        CHECK(same_bits(run(everything, false), dense));
        CHECK(same_bits(run(everything, true), dense));

        const auto a = run(some, false);
        const Density d = s.density();
        if (sparse.empty()) sparse = a;
        CHECK(same_bits(a, sparse));
        CHECK(!same_bits(a, dense));
        // The first positions are dense.
        CHECK(!std::memcmp(a.data(), dense.data(), 5 * size_t(spec.n_vocab) * sizeof(float)));
        CHECK(same_bits(run(some, true), sparse));
        const Density e = s.density();
        CHECK(d.site[5] > 0.05 && d.site[5] < 0.95);
        CHECK_NEAR(d.site[5], e.site[5], 1e-12);
        CHECK(d.site[6] < 0);

        const auto h = run(more, false);
        const Density f = s.density();
        if (with_heads.empty()) with_heads = h;
        CHECK(same_bits(h, with_heads));
        CHECK(!same_bits(h, sparse));
        CHECK(f.site[6] > 0.05 && f.site[6] < 0.95);
        CHECK(same_bits(run(more, true), with_heads));
        CHECK_NEAR(s.density().site[6], f.site[6], 1e-12);
        // Blocks without masking are dense, and so is decoding without the predictor.
        s.truncate(0);
        s.set_predictor(&more, false, false);
        CHECK(same_bits(in_blocks(s, ids), dense));
        s.truncate(0);
        s.set_predictor(nullptr, false, false);
        CHECK(same_bits(stepwise(s, ids), dense));
      }
    }
  }
}

TEST_CASE("predictors: small codes take half of the bytes and name the same neurons and heads") {
  const TinySpec spec = spec_of("silu", true);
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(30, spec.n_vocab);
  Session s(model, 64);
  std::vector<float> out[2];
  size_t bytes[2];
  double kept[2];
  for (int wide : {0, 1}) {
    Predictor p(model, 0);
    for (int l = 0; l < spec.n_layers; l++) {
      Random neurons(spec.n_embd, 96, spec.n_ff, 0.0f, 6, 7), heads(spec.n_embd, 40, spec.n_heads, 0.0f, 7, 7);
      if (wide) neurons.widen(16);
      if (wide) heads.widen(16);
      p.set_neurons(l, neurons.w);
      if (l) p.set_heads(l, heads.w);
    }
    bytes[wide] = p.bytes();
    s.truncate(0);
    s.density();
    s.set_predictor(&p, true, false);
    out[wide] = stepwise(s, ids);
    kept[wide] = s.density().site[5];
    s.truncate(0);
    CHECK(same_bits(in_blocks(s, ids), out[wide]));
  }
  CHECK(same_bits(out[0], out[1]));
  CHECK(kept[0] > 0.1 && kept[0] < 0.9);
  CHECK(double(bytes[0]) < 0.65 * double(bytes[1]));
}

TEST_CASE("predictors: nothing predicted leaves only the attention; no head leaves only the FFN") {
  TinySpec spec = spec_of("relu", true);
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(20, spec.n_vocab);
  Session s(model, 64);
  Predictor nothing(model, 0);
  for (int l = 0; l < spec.n_layers; l++) {
    nothing.set_neurons(l, Random(spec.n_embd, 8, spec.n_ff, kNone, 1).w);
    if (l) nothing.set_heads(l, Random(spec.n_embd, 8, spec.n_heads, kNone, 1).w);
  }
  s.set_predictor(&nothing, false, false);
  const auto a = stepwise(s, ids);
  const Density d = s.density();
  CHECK_EQ(d.site[5], 0.0);
  CHECK_EQ(d.site[6], 0.0);
  // The same by other means: no neurons at all, and nothing of what attn_o multiplies (no biases here).
  s.set_predictor(nullptr, false, false);
  const std::vector<int32_t> none;
  s.set_neurons({&none, &none, &none}, false);
  sr::Sparsity plan(model, 0);
  const float never = std::numeric_limits<float>::infinity();
  for (int l = 1; l < spec.n_layers; l++) plan.set("O", l, &never, 1);
  s.set_sparsity(&plan, false);
  s.truncate(0);
  CHECK(same_bits(stepwise(s, ids), a));
}

TEST_CASE("predictors: what is named is what double precision names, up to the rounding of 8 bits") {
  const TinySpec spec = spec_of("relu", true);
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(30, spec.n_vocab);
  Session s(model, 64);
  std::vector<float> x(size_t(30 * spec.n_embd)), next(x.size()), z(size_t(30 * spec.n_ff));
  s.embed(ids.data(), 30, x.data());
  const Random r(spec.n_embd, 32, spec.n_ff, 0.2f, 5);
  Predictor p(model, 0);
  p.set_neurons(0, r.w);
  float* taps[Session::kTapCount] = {};
  taps[3] = z.data();
  s.run_layer(0, 0, x.data(), 30, next.data(), taps);
  int named = 0, found = 0, needed = 0, close = 0;
  for (int t = 0; t < 30; t++) {
    const float* row = x.data() + t * spec.n_embd;
    double square = 0;
    for (int i = 0; i < spec.n_embd; i++) square += double(row[i]) * row[i];
    const double root = std::sqrt(square / spec.n_embd);
    std::vector<double> hidden(32);
    for (int k = 0; k < 32; k++) {
      for (int i = 0; i < spec.n_embd; i++) hidden[size_t(k)] += row[i] / root * r.a[size_t(k * spec.n_embd + i)];
      hidden[size_t(k)] *= r.a_scale[size_t(k)];
    }
    for (int j = 0; j < spec.n_ff; j++) {
      double score = 0;
      for (int k = 0; k < 32; k++) score += hidden[size_t(k)] * r.b[size_t(j * 32 + k)];
      score *= r.b_scale[size_t(j)];
      const bool active = z[size_t(t * spec.n_ff + j)] != 0;
      named += score > 0.2;
      needed += active;
      found += active && score > 0.2;
      close += std::fabs(score - 0.2) < 0.02;
    }
  }
  s.set_predictor(&p, false, true);
  s.density();
  const auto measured = in_blocks(s, ids);
  const Density d = s.density();
  const double all = 30.0 * spec.n_ff;
  CHECK(named > 0.05 * all && named < 0.95 * all);
  CHECK_NEAR(d.site[5] * all, named, close);
  CHECK_NEAR(d.recall * needed, found, close);
  // Measuring changes nothing.
  s.truncate(0);
  s.set_predictor(nullptr, false, false);
  CHECK(same_bits(in_blocks(s, ids), measured));
}

TEST_CASE("predictors: what does not fit the model is refused") {
  TinySpec spec = spec_of("relu", true);
  const TinyModel neurons(spec);
  spec.neurons = false;
  const TinyModel panels(spec);
  const Model a = open_model(panels, 1), b = open_model(neurons, 1);
  const Random good(spec.n_embd, 8, spec.n_ff, 0, 1), small(spec.n_embd, 8, 64, 0, 1), heads(spec.n_embd, 8, 6, 0, 1);
  Predictor p(a, 0), q(b, 0);
  CHECK_THROWS(p.set_neurons(0, good.w), Error, "sparse-run convert --layout neurons");
  p.set_heads(1, heads.w);
  CHECK_THROWS(q.set_neurons(3, good.w), Error, "no such layer");
  CHECK_THROWS(q.set_neurons(1, small.w), Error, "has rank 8 and 64 neurons, this model has 192");
  CHECK_THROWS(q.set_heads(0, heads.w), Error, "heads of layer 0");
  Random damaged(spec.n_embd, 8, spec.n_ff, NAN, 1);
  CHECK_THROWS(q.set_neurons(0, damaged.w), Error, "threshold 0 is not a finite number");
  CHECK_THROWS(Predictor(b, -1), Error, "dense_tokens");
  Session s(b, 16);
  CHECK_THROWS(s.set_predictor(&p, false, false), Error, "bound to another model");
}
