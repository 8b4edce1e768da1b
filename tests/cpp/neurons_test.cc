// Neurons that are left out: exact zeros, and thresholds of site G. What is skipped changes no bit of what is not, for
// any number of threads, in both layouts; what a layout cannot do is refused with the remedy.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"
#include "tiny_runs.h"

using sr::Density;
using sr::Error;
using sr::Model;
using sr::Session;
using sr::Sparsity;
using sr_test::in_blocks;
using sr_test::open_model;
using sr_test::same_bits;
using sr_test::some_tokens;
using sr_test::stepwise;
using sr_test::TinyModel;
using sr_test::TinySpec;

namespace {

Sparsity plan_of(const Model& model, const char* site, float threshold, int layers, float break_even = 0.9f) {
  Sparsity plan(model, 0);
  plan.set_break_even(site, break_even);
  for (int l = 0; l < layers; l++) plan.set(site, l, &threshold, 1);
  return plan;
}

// Models whose activation gives exact zeros.
std::vector<TinySpec> with_zeros(bool neurons) {
  std::vector<TinySpec> out;
  const auto add = [&](auto set) {
    TinySpec s;
    s.neurons = neurons;
    set(s);
    out.push_back(s);
  };
  add([](TinySpec& s) { s.activation = "relu"; });
  add([](TinySpec& s) { s.activation = "relu2"; s.kind = "q8"; s.has_min = false; });
  add([](TinySpec& s) {
    s.activation = "relu";
    s.more = "\"activation_threshold\": 0.9, ";
    s.kind = "q6";
    s.group = 16;
  });
  add([](TinySpec& s) { s.activation = "silu"; s.more = "\"activation_threshold\": 0.5, "; });
  add([](TinySpec& s) { s.activation = "relu"; s.more = "\"up_relu\": true, "; s.kind = "q5"; });
  add([](TinySpec& s) { s.activation = "relu"; s.gated = false; s.biases = true; s.norm = "layer"; });
  add([](TinySpec& s) { s.activation = "relu"; s.kinds = {{"ffn", "f16"}}; });
  add([](TinySpec& s) { s.activation = "relu2"; s.sub_norms = true; });
  return out;
}

}  // namespace

TEST_CASE("exact zeros: skipped or not, any number of threads, decode and prefill: the same bits") {
  for (const bool neurons : {false, true}) {
    for (const TinySpec& spec : with_zeros(neurons)) {
      const TinyModel tiny(spec);
      const auto ids = some_tokens(30, spec.n_vocab);
      std::vector<float> want;
      for (int threads : {1, 2, 3}) {
        const Model model = open_model(tiny, threads);
        Session with(model, 64), without(model, 64), prompt(model, 64);
        without.set_exact(false);
        const auto a = stepwise(with, ids), b = stepwise(without, ids);
        if (want.empty()) want = b;
        CHECK(same_bits(a, want));
        CHECK(same_bits(b, want));
        CHECK(same_bits(in_blocks(prompt, ids), want));
        const Density on = with.density(), off = without.density();
        CHECK(off.body < 0);
        for (double share : off.site) CHECK(share < 0);
        const bool down = spec.kinds.empty();  // quantised, so that its columns can be left out
        CHECK_EQ(on.site[3] >= 0, down);
        if (down) CHECK(on.site[3] > 0.02 && on.site[3] < 0.8);
        CHECK_EQ(on.site[4] >= 0, neurons && spec.gated);
        if (on.site[4] >= 0) CHECK(on.site[4] > 0.05 && on.site[4] < 0.8);
        // Zeros of up (dReLU) let down skip more than gate's zeros alone.
        if (spec.more.find("up_relu") != std::string::npos && neurons) CHECK(on.site[3] < 0.8 * on.site[4]);
        CHECK(on.body > 0.2 && on.body <= 1);
        if (neurons && spec.gated && down) CHECK(on.body < 0.9);
      }
    }
  }
}

TEST_CASE("exact zeros: a model without them skips nothing") {
  TinySpec spec;
  spec.neurons = true;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  Session s(model, 64);
  stepwise(s, some_tokens(5, spec.n_vocab));
  const Density d = s.density();
  CHECK(d.body < 0);
  for (double share : d.site) CHECK(share < 0);
}

TEST_CASE("layouts: the same weights by column and by neuron give nearly the same logits and the same greedy tokens") {
  for (const char* kind : {"q4", "q6", "f32"}) {
    TinySpec spec;
    spec.kind = kind;
    const TinyModel panels(spec);
    spec.neurons = true;
    const TinyModel neurons(spec);
    const Model a = open_model(panels, 2), b = open_model(neurons, 2);
    const auto ids = some_tokens(20, spec.n_vocab);
    Session x(a, 64), y(b, 64);
    sr::SamplerOptions greedy;
    greedy.temperature = 0;
    sr::Sampler first(greedy), second(greedy);
    x.eval(ids.data(), 20);
    y.eval(ids.data(), 20);
    for (int i = 0; i < 20; i++) {
      double largest = 0, difference = 0;
      for (int v = 0; v < x.n_vocab(); v++) {
        largest = std::max(largest, std::fabs(double(x.logits()[v])));
        difference = std::max(difference, std::fabs(double(x.logits()[v]) - y.logits()[v]));
      }
      // Other sums of floats now and then round an activation to another of its 8-bit codes.
      CHECK(difference < (kind[0] == 'f' ? 1e-5 : 0.02) * largest);
      CHECK_EQ(x.step(&first), y.step(&second));
    }
  }
}

TEST_CASE("site G: threshold 0 is dense, a threshold gives the bits of masked blocks, in any number of threads") {
  for (const char* kind : {"q4", "q8", "bf16"}) {
    for (const char* activation : {"silu", "gelu_tanh", "gelu", "relu"}) {
      TinySpec spec;
      spec.neurons = true;
      spec.activation = activation;
      spec.kind = kind;
      if (spec.kind == "bf16") spec.kinds = {{"ffn_down", "q8"}};
      const TinyModel tiny(spec);
      const auto ids = some_tokens(24, spec.n_vocab);
      std::vector<float> masked;
      for (int threads : {1, 2, 3}) {
        const Model model = open_model(tiny, threads);
        Session dense(model, 64);
        dense.set_exact(false);
        const auto want = stepwise(dense, ids);
        const Sparsity nothing = plan_of(model, "G", 0, spec.n_layers);
        Session zero(model, 64);
        zero.set_sparsity(&nothing, false);
        CHECK(same_bits(stepwise(zero, ids), want));
        // break_even 0: what is kept is computed with the rest and dropped; 1: list and gather. The same bits.
        for (float break_even : {0.0f, 0.9f, 1.0f}) {
          const Sparsity plan = plan_of(model, "G", 0.15f, spec.n_layers, break_even);
          Session sparse(model, 64), blocks(model, 64);
          sparse.set_sparsity(&plan, false);
          blocks.set_sparsity(&plan, true);
          const auto got = stepwise(sparse, ids);
          if (masked.empty()) masked = got;
          CHECK(same_bits(got, masked));
          CHECK(same_bits(in_blocks(blocks, ids), masked));
          CHECK(!same_bits(got, want));
          const Density d = sparse.density(), e = blocks.density();
          CHECK(d.site[4] > 0.1 && d.site[4] < 0.95);
          CHECK_NEAR(d.site[4], e.site[4], 1e-12);
          CHECK(d.site[3] <= d.site[4] + 1e-9);
        }
      }
    }
  }
}

TEST_CASE("site G: a threshold of its own for every neuron, and sites together") {
  TinySpec spec;
  spec.neurons = true;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(24, spec.n_vocab);
  std::vector<float> own(size_t(spec.n_ff));
  const float never = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < own.size(); i++) own[i] = i % 3 ? 0.05f * float(i % 7) : never;
  const float small = 0.1f;
  for (const bool others : {false, true}) {
    Sparsity plan(model, 5);
    plan.set("G", 1, own.data(), own.size());
    if (others) {
      for (const char* site : {"A", "O", "Z"}) plan.set(site, 1, &small, 1);
    }
    Session sparse(model, 64), blocks(model, 64);
    sparse.set_sparsity(&plan, false);
    blocks.set_sparsity(&plan, true);
    CHECK(same_bits(stepwise(sparse, ids), in_blocks(blocks, ids)));
    // A third of the neurons is never kept; only positions from 5 on are counted.
    CHECK(sparse.density().site[4] < 0.67);
  }
}

TEST_CASE("sites: what a layout cannot do is refused with the remedy, impossible thresholds by value") {
  TinySpec spec;
  const TinyModel panels(spec);
  spec.neurons = true;
  const TinyModel neurons(spec);
  spec.gated = false;
  const TinyModel plain(spec);
  const Model a = open_model(panels, 1), b = open_model(neurons, 1), c = open_model(plain, 1);
  const float t = 0.1f, nan = NAN, negative = -0.1f;
  CHECK_THROWS(Sparsity(a, 0).set("G", 0, &t, 1), Error, "sparse-run convert --layout neurons");
  CHECK_THROWS(Sparsity(b, 0).set("M", 0, &t, 1), Error, "sparse-run convert --layout panels");
  CHECK_THROWS(Sparsity(c, 0).set("G", 0, &t, 1), Error, "use site Z");
  CHECK_THROWS(Sparsity(b, 0).set("G", 1, &nan, 1), Error, "site G in layer 1 must be 0 or more");
  CHECK_THROWS(Sparsity(b, 0).set("G", 1, &negative, 1), Error, "must be 0 or more");
  const std::vector<float> few(7, 0.1f);
  CHECK_THROWS(Sparsity(b, 0).set("G", 1, few.data(), few.size()), Error, "7 values, this model needs 1 or 192");
  CHECK_THROWS(Sparsity(b, 0).set("Q", 1, &t, 1), Error, "unknown site 'Q'");
}

TEST_CASE("taps: act(gate) times up is what down multiplies, in both layouts") {
  for (const bool neurons : {false, true}) {
    TinySpec spec;
    spec.neurons = neurons;
    spec.activation = "relu";
    spec.more = "\"up_relu\": true, ";
    const TinyModel tiny(spec);
    const Model model = open_model(tiny, 2);
    Session s(model, 64);
    const auto ids = some_tokens(9, spec.n_vocab);
    std::vector<float> x(size_t(9 * spec.n_embd)), out(x.size());
    s.embed(ids.data(), 9, x.data());
    std::vector<std::vector<float>> taps;
    float* buffers[Session::kTapCount];
    for (int i = 0; i < Session::kTapCount; i++) {
      taps.emplace_back(size_t(9 * s.tap_width(i)));
      buffers[i] = taps.back().data();
    }
    s.run_layer(0, 0, x.data(), 9, out.data(), buffers);
    const auto &z = taps[3], &g = taps[4], &u = taps[5];
    double energy = 0;
    for (size_t i = 0; i < z.size(); i++) {
      CHECK_EQ(z[i], g[i] * u[i]);
      CHECK(g[i] >= 0 && u[i] >= 0);
      energy += std::fabs(z[i]);
    }
    CHECK(energy > 1);
  }
}

TEST_CASE("site N: chosen neurons give the bits of masked blocks, in any number of threads; all of them are dense") {
  for (const bool gated : {true, false}) {
    for (const char* activation : {"silu", "relu"}) {
      TinySpec spec;
      spec.neurons = true;
      spec.gated = gated;
      spec.biases = !gated;
      spec.activation = activation;
      const TinyModel tiny(spec);
      const auto ids = some_tokens(24, spec.n_vocab);
      std::vector<int32_t> every, some, none;
      for (int i = 0; i < spec.n_ff; i++) {
        every.push_back(i);
        if (i % 3 == 0 || (i > 60 && i < 80)) some.push_back(i);
      }
      std::vector<float> dense, chosen;
      for (int threads : {1, 2, 3, 5}) {
        Model model = open_model(tiny, threads);
        Session s(model, 64);
        const auto run = [&](const std::vector<int32_t>* first, const std::vector<int32_t>* second, bool blocks) {
          s.truncate(0);
          s.set_neurons({first, second}, blocks);
          return blocks ? in_blocks(s, ids) : stepwise(s, ids);
        };
        const auto want = run(nullptr, nullptr, false);
        if (dense.empty()) dense = want;
        CHECK(same_bits(want, dense));
        CHECK(same_bits(run(&every, &every, false), dense));
        s.density();
        const auto got = run(&some, nullptr, false);
        const Density d = s.density();
        if (chosen.empty()) chosen = got;
        CHECK(same_bits(got, chosen));
        CHECK(!same_bits(got, dense));
        CHECK_NEAR(d.site[5], double(some.size()) / spec.n_ff, 1e-12);
        CHECK(d.body > 0.3 && d.body < 0.95);
        CHECK(same_bits(run(&some, nullptr, true), chosen));
        CHECK_NEAR(s.density().site[5], d.site[5], 1e-12);
        CHECK(same_bits(run(&none, &some, false), run(&none, &some, true)));
        // Where a break-even was measured, it decides what is read, and nothing else.
        double body[2] = {};
        for (const int at : {0, 1}) {
          model.set_break_even("N", float(at));
          model.set_break_even("G", float(at));
          s.density();
          CHECK(same_bits(run(&some, nullptr, false), chosen));
          body[at] = s.density().body;
        }
        CHECK(body[1] < body[0]);
        // Thresholds of G work within the sets.
        const Sparsity plan = plan_of(model, gated ? "G" : "Z", 0.1f, spec.n_layers);
        s.set_sparsity(&plan, true);
        CHECK(same_bits(run(&some, &some, false), run(&some, &some, true)));
        s.set_sparsity(nullptr, false);
        s.truncate(0);
        s.set_neurons({}, false);
        CHECK(same_bits(stepwise(s, ids), dense));
      }
    }
  }
}

TEST_CASE("break-evens of rows are of the sites N and G and from 0 to 1") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  Model model = open_model(tiny, 1);
  CHECK_THROWS(model.set_break_even("Z", 0.5f), Error, "N and G");
  CHECK_THROWS(model.set_break_even("N", 1.5f), Error, "from 0 to 1");
  CHECK_THROWS(model.set_break_even("G", NAN), Error, "from 0 to 1");
}

TEST_CASE("site N: lists that are no sets are refused, and so are panels") {
  TinySpec spec;
  const TinyModel panels(spec);
  spec.neurons = true;
  const TinyModel neurons(spec);
  const Model a = open_model(panels, 1), b = open_model(neurons, 1);
  Session x(a, 64), y(b, 64);
  const std::vector<int32_t> good = {1, 5}, falling = {5, 1}, twice = {5, 5}, high = {191, 192}, negative = {-1, 2};
  CHECK_THROWS(x.set_neurons({&good, nullptr}, false), Error, "sparse-run convert --layout neurons");
  x.set_neurons({nullptr, nullptr}, false);
  CHECK_THROWS(y.set_neurons({&good}, false), Error, "neurons for 1 layers, this model has 2");
  for (const auto* bad : {&falling, &twice, &high, &negative}) {
    CHECK_THROWS(y.set_neurons({nullptr, bad}, false), Error, "of layer 1 must be ascending, from 0 to 191");
  }
  y.set_neurons({nullptr, &good}, false);
}

TEST_CASE("statistics of a prompt are those of its taps, however it is cut and for any number of threads") {
  for (const bool neurons : {false, true}) {
    TinySpec spec;
    spec.neurons = neurons;
    const TinyModel tiny(spec);
    const auto ids = some_tokens(300, spec.n_vocab);
    const size_t width = size_t(spec.n_ff);
    // The reference, from single layers' runs.
    std::vector<double> griffin(2 * width), core(2 * width);
    {
      const Model model = open_model(tiny, 1);
      Session s(model, 512);
      std::vector<float> x(300 * size_t(spec.n_embd)), z(300 * width);
      s.embed(ids.data(), 300, x.data());
      for (int l = 0; l < 2; l++) {
        for (int at = 0; at < 300; at += 150) {
          float* taps[Session::kTapCount] = {};
          taps[3] = z.data() + size_t(at) * width;
          float* rows = x.data() + size_t(at * spec.n_embd);
          s.run_layer(l, at, std::vector<float>(rows, rows + 150 * spec.n_embd).data(), 150, rows, taps);
        }
        for (size_t t = 0; t < 300; t++) {
          const float* row = z.data() + t * width;
          double norm = 0;
          std::vector<std::pair<float, int>> positive;
          for (size_t j = 0; j < width; j++) {
            norm += double(row[j]) * row[j];
            if (row[j] > 0) positive.push_back({-row[j], int(j)});
          }
          for (size_t j = 0; j < width; j++) griffin[size_t(l) * width + j] += double(row[j]) * row[j] / norm;
          std::sort(positive.begin(), positive.end());
          for (size_t i = 0; i < (positive.size() + 4) / 5; i++) core[size_t(l) * width + size_t(positive[i].second)]++;
        }
      }
    }
    for (int threads : {1, 3}) {
      const Model model = open_model(tiny, threads);
      std::vector<float> got(2 * width), whole;
      for (const auto& cut : std::vector<std::vector<int>>{{300}, {7, 256, 37}, {100, 100, 100}}) {
        Session s(model, 512);
        CHECK_THROWS(s.statistic(nullptr), Error, "nothing is collected");
        CHECK_THROWS(s.collect("mean"), Error, "unknown statistic 'mean'");
        for (const char* kind : {"griffin", "core"}) {
          s.truncate(0);
          s.collect(kind);
          int at = 0;
          for (int n : cut) {
            s.eval(ids.data() + at, n);
            at += n;
          }
          CHECK_EQ(s.statistic(got.data()), 300);
          for (size_t i = 0; i < got.size(); i++) {
            const double want = kind[0] == 'g' ? griffin[i] : core[i];
            CHECK_NEAR(got[i], want, 1e-6 * (1 + want));
          }
          if (kind[0] == 'g') {
            if (whole.empty()) whole = got;
            CHECK(same_bits(got, whole));
          }
          // Single tokens are not counted, and the logits are those of a session that counts nothing.
          s.eval(ids.data(), 1);
          CHECK_EQ(s.statistic(nullptr), 300);
        }
        const auto after = std::vector<float>(s.logits(), s.logits() + s.n_vocab());
        Session plain(model, 512);
        plain.eval(ids.data(), 300);
        plain.eval(ids.data(), 1);
        CHECK(same_bits(after, std::vector<float>(plain.logits(), plain.logits() + plain.n_vocab())));
        s.cancel();
        try {
          s.eval(ids.data(), 20);
        } catch (const Error&) {
        }
        CHECK_EQ(s.statistic(nullptr), 300);
        s.collect("");
        CHECK_THROWS(s.statistic(nullptr), Error, "nothing is collected");
      }
    }
  }
}
