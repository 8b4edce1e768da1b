// A model divided between device and CPU: at any point of division the same tokens as undivided, within a budget that
// holds what it says, on a GPU or emulated in CI. Sums of the two are added in another order: logits differ by a
// rounding of an activation to 8 bits here and there, no more.
#include "check.h"

#include <algorithm>
#include <numeric>

#include "cuda/decoder.h"
#include "cuda/device.h"
#include "cuda/split.h"
#include "format/packed_model.h"
#include "on_device.h"
#include "sparse_run/engine.h"
#include "tiny_neurons.h"
#include "tiny_variants.h"

using namespace sr;
using namespace sr_test;

namespace {

const auto kNever = [] { return false; };
constexpr int kUnits = 5;
constexpr double kTolerance = 0.05, kUsual = 1e-3;  // as decoder_check has them

TinySpec wide(TinySpec spec) {
  spec.n_ff = kUnits * kTileRows;
  return spec;
}

DeviceOptions options_for(size_t memory, int n_ctx, int threads = 2) {
  DeviceOptions o;
  o.memory = memory;
  o.n_ctx = n_ctx;
  o.threads = threads;
  return o;
}

// A decoder, a context of 64 tokens, and what it makes of a prompt and of tokens after it.
struct Run {
  cuda::DeviceDecoder decoder;
  cuda::DeviceKv cache;

  Run(const PackedModel& packed, size_t memory, int threads = 2)
      : decoder(packed, options_for(memory, 64, threads)), cache(decoder.config(), 64, decoder.room()) {}

  // Logits of every token of the prompt, then of each token after it.
  std::vector<float> logits(const std::vector<int32_t>& prompt, const std::vector<int32_t>& more,
                            const Skipping& skipping = {}) {
    const size_t vocab = size_t(decoder.config().n_vocab);
    std::vector<float> out((prompt.size() + more.size()) * vocab), row(size_t(decoder.padded_vocab()));
    CHECK(decoder.forward(prompt.data(), int(prompt.size()), 0, &cache, Logits::all, out.data(), kNever, skipping));
    for (size_t i = 0; i < more.size(); i++) {
      const int pos = int(prompt.size() + i);
      CHECK(decoder.forward(&more[i], 1, pos, &cache, Logits::last, row.data(), kNever, skipping));
      std::copy_n(row.begin(), vocab, out.begin() + ptrdiff_t((prompt.size() + i) * vocab));
    }
    return out;
  }

  std::vector<int32_t> greedy(const std::vector<int32_t>& prompt, int n) {
    std::vector<float> row(size_t(decoder.padded_vocab()));
    CHECK(decoder.forward(prompt.data(), int(prompt.size()), 0, &cache, Logits::last, row.data(), kNever));
    std::vector<int32_t> ids = {
        int32_t(std::max_element(row.begin(), row.begin() + decoder.config().n_vocab) - row.begin())};
    while (int(ids.size()) < n) {
      int32_t best = -1;
      const int pos = int(prompt.size() + ids.size()) - 1;
      CHECK(decoder.forward(&ids.back(), 1, pos, &cache, Logits::last, nullptr, kNever, {}, &best));
      decoder.logits(cache, row.data());
      CHECK_EQ(best, int32_t(std::max_element(row.begin(), row.begin() + decoder.config().n_vocab) - row.begin()));
      ids.push_back(best);
    }
    return ids;
  }
};

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) {
    most = std::max(most, double(std::fabs(a[i] - b[i])));
    size = std::max(size, double(std::fabs(a[i])));
  }
  return most / size;
}

// Mean KL divergence of b's distributions from a's, and how often both have the same first token.
struct Closeness {
  double kl = 0, same = 0;
};
Closeness closeness(const std::vector<float>& a, const std::vector<float>& b, size_t vocab) {
  Closeness c;
  const size_t rows = a.size() / vocab;
  for (size_t r = 0; r < rows; r++) {
    const float *x = a.data() + r * vocab, *y = b.data() + r * vocab;
    const auto log_sum = [&](const float* v) {
      double sum = 0;
      for (size_t i = 0; i < vocab; i++) sum += std::exp(double(v[i]));
      return std::log(sum);
    };
    const double lx = log_sum(x), ly = log_sum(y);
    for (size_t i = 0; i < vocab; i++) c.kl += std::exp(x[i] - lx) * (x[i] - lx - y[i] + ly) / double(rows);
    c.same += (std::max_element(x, x + vocab) - x == std::max_element(y, y + vocab) - y) / double(rows);
  }
  return c;
}

std::vector<int32_t> some_tokens(int n, std::mt19937& rng) {
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(int32_t(rng() % 197));
  return ids;
}

std::vector<cuda::FfnUnits> same_layers(int n, int units, size_t bytes) {
  return std::vector<cuda::FfnUnits>(size_t(n), {units, bytes, false});
}

}  // namespace

TEST_CASE("the plan of a division keeps to its room, divides few layers, and uses what it can") {
  const auto layers = same_layers(8, 16, 100);
  CHECK(cuda::plan_split(layers, 8 * 16 * 100) == std::vector<int>(8, 16));
  CHECK(cuda::plan_split(layers, 0) == std::vector<int>(8, 0));
  // One unit too many: the last layer alone gives it up.
  CHECK(cuda::plan_split(layers, 127 * 100) == (std::vector<int>{16, 16, 16, 16, 16, 16, 16, 15}));
  // A quarter of a layer a layer, until all of them are divided.
  CHECK(cuda::plan_split(layers, 120 * 100) == (std::vector<int>{16, 16, 16, 16, 16, 16, 12, 12}));
  CHECK(cuda::plan_split(layers, 64 * 100) == std::vector<int>(8, 8));
  size_t last = 0;
  for (size_t room = 0; room <= 8 * 16 * 100; room += 50) {
    const std::vector<int> hot = cuda::plan_split(layers, room);
    const size_t used = 100 * size_t(std::accumulate(hot.begin(), hot.end(), 0));
    CHECK(used <= room && used + 8 * 100 > room && used + 100 > last);
    last = used;
  }
  auto mixed = layers;
  for (size_t i = 0; i < mixed.size(); i++) mixed[i] = {int(4 + i), 100 + 30 * i, i % 2 == 0};
  for (size_t room = 0; room < 12000; room += 37) {
    const std::vector<int> hot = cuda::plan_split(mixed, room);
    size_t used = 0;
    for (size_t i = 0; i < hot.size(); i++) {
      used += size_t(hot[i]) * mixed[i].bytes;
      CHECK(hot[i] >= 0 && hot[i] <= mixed[i].count);
      if (mixed[i].whole) CHECK(hot[i] == 0 || hot[i] == mixed[i].count);
    }
    CHECK(used <= room);
  }
}

TEST_CASE("hot units come first, by the ranks of their neurons") {
  CHECK(cuda::hot_order(nullptr, 4) == (std::vector<int>{0, 1, 2, 3}));
  std::vector<uint32_t> ranks(3 * kTileRows);
  for (int i = 0; i < 3 * kTileRows; i++) ranks[size_t(i)] = uint32_t(3 * kTileRows - 1 - i);
  CHECK(cuda::hot_order(ranks.data(), 3) == (std::vector<int>{2, 1, 0}));
  std::swap(ranks[0], ranks[size_t(2 * kTileRows)]);  // one neuron does not make a unit hot
  CHECK(cuda::hot_order(ranks.data(), 3) == (std::vector<int>{2, 1, 0}));
}

TEST_CASE("divided at any point: the same tokens as undivided, distributions within 1e-3, memory within the budget") {
  std::mt19937 rng = fresh(11);
  const auto prompt = some_tokens(9, rng), more = some_tokens(3, rng);
  const TinyModel tiny(wide(TinySpec()));
  const PackedModel packed(tiny.path());
  const Run undivided(packed, 0);
  const DeviceStats all = undivided.decoder.stats();
  CHECK_EQ(all.cpu_layers, 0);
  CHECK(all.hot_share == 1);
  const std::vector<float> wanted = Run(packed, 0).logits(prompt, more);
  const std::vector<int32_t> tokens = Run(packed, 0).greedy(prompt, 6);
  int points = 0, last_hot = -1;
  const size_t unit = (all.weights + all.floor) / 400;
  for (size_t memory = all.floor; last_hot < 2 * kUnits; memory += unit) {
    Run run(packed, memory);
    const DeviceStats s = run.decoder.stats();
    const int hot = int(s.hot_share * 2 * kUnits + 0.5);
    CHECK(hot >= last_hot && s.budget == memory && s.floor == all.floor);
    CHECK(s.weights < memory);
    if (hot == last_hot) continue;
    CHECK_EQ(s.cpu_layers == 0, hot == 2 * kUnits);
    CHECK_EQ(s.cpu_weights == 0, hot == 2 * kUnits);
    last_hot = hot;
    points++;
    const Closeness c = closeness(wanted, run.logits(prompt, more), 197);
    CHECK(c.kl < 1e-3);
    CHECK(c.same == 1);
    CHECK(run.greedy(prompt, 6) == tokens);
  }
  CHECK(points >= kUnits);
}

TEST_CASE("divided: every variant's logits are the undivided ones, with whole layers and with neurons on the CPU") {
  std::mt19937 rng = fresh(12);
  int usual = 0, checked = 0;
  for (const Named& v : variants()) {
    const TinyModel tiny(wide(v.spec));
    const PackedModel packed(tiny.path());
    const auto prompt = some_tokens(4, rng), more = some_tokens(1, rng);
    Run undivided(packed, 0);
    const DeviceStats all = undivided.decoder.stats();
    const std::vector<float> wanted = undivided.logits(prompt, more);
    // FFNs take what the weights take beyond the floor's: try none of them, and about half.
    const Run none(packed, all.floor);
    const size_t ffns = all.weights - none.decoder.stats().weights;
    for (size_t memory : {all.floor, all.floor + ffns / 2}) {
      Run run(packed, memory);
      CHECK(run.decoder.stats().cpu_layers > 0);
      const double off = difference(wanted, run.logits(prompt, more));
      if (!(off < kTolerance)) sr_test::fail(__FILE__, __LINE__, v.name + ": off by " + std::to_string(off));
      usual += off < kUsual;
      checked++;
    }
  }
  if (2 * usual < checked) sr_test::fail(__FILE__, __LINE__, "only " + std::to_string(usual) + " of them are close");
}

TEST_CASE("divided: runs repeat bit for bit, whatever the order of execution and the number of threads") {
  std::mt19937 rng = fresh(13);
  const auto prompt = some_tokens(9, rng), more = some_tokens(3, rng);
  const TinyModel tiny(wide(TinySpec()));
  const PackedModel packed(tiny.path());
  const size_t floor = Run(packed, 0).decoder.stats().floor;
  std::vector<float> first;
  in_every_order([&] {
    for (int threads : {1, 3}) {
      Run run(packed, floor + 40000, threads);
      CHECK(run.decoder.stats().cpu_layers > 0 && run.decoder.stats().hot_share > 0);
      for (int again = 0; again < 2; again++) {
        const std::vector<float> now = run.logits(prompt, more);
        if (first.empty()) first = now;
        CHECK(same_bits(first, now));
      }
    }
  });
}

#ifdef SR_CUDA_EMULATED
TEST_CASE("divided: the device has its own neurons to compute while the CPU computes the others") {
  std::mt19937 rng = fresh(18);
  const auto prompt = some_tokens(9, rng), more = some_tokens(4, rng);
  const TinyModel tiny(wide(TinySpec()));
  const PackedModel packed(tiny.path());
  Run run(packed, Run(packed, 0).decoder.stats().floor + 40000);
  CHECK(run.decoder.stats().cpu_layers > 0 && run.decoder.stats().hot_share > 0);
  sr_emu::behind_wait = SIZE_MAX;
  run.logits(prompt, more);  // a block, a first token, and graphs
  CHECK(sr_emu::behind_wait >= 3 && sr_emu::behind_wait < 10);  // gate and up, activation, down
}
#endif

TEST_CASE("divided: thresholds and exact zeros work on both sides, and are counted together") {
  std::mt19937 rng = fresh(14);
  for (bool neurons : {false, true})
    for (bool blocks : {false, true}) {
      TinySpec spec = wide(TinySpec());
      spec.neurons = neurons;
      spec.activation = neurons ? "relu" : "silu";
      const TinyModel tiny(spec);
      const PackedModel packed(tiny.path());
      SparsityPlan plan(2, {{96, 64, 96, kUnits * kTileRows, kUnits * kTileRows}}, 3);
      for (Site s : {Site::A, Site::O, Site::M, Site::Z, Site::G}) plan.set_break_even(s, 0.9f);
      for (int l = 0; l < 2; l++)
        for (Site s : {Site::A, Site::O, Site::M, Site::Z, Site::G}) {
          if (s == (neurons ? Site::M : Site::G)) continue;
          std::vector<float> t(size_t(plan.width(s)));
          for (auto& v : t)
            v = (s == Site::Z ? 0.02f : s == Site::G ? 0.1f : 0.3f) * (1 + 0.5f * float(rng() % 100) / 100);
          plan.set(l, s, t.data(), t.size());
        }
      const auto prompt = some_tokens(9, rng), more = some_tokens(3, rng);
      SiteCounts whole, parts;
      Skipping skipping;
      skipping.plan = &plan;
      skipping.mask_blocks = blocks;
      skipping.counts = &whole;
      Run undivided(packed, 0);
      const std::vector<float> wanted = undivided.logits(prompt, more, skipping);
      skipping.counts = &parts;
      Run run(packed, undivided.decoder.stats().floor + 40000);
      CHECK(run.decoder.stats().cpu_layers == 2 && run.decoder.stats().hot_share > 0.1);
      CHECK(difference(wanted, run.logits(prompt, more, skipping)) < kTolerance);
      for (size_t s = 0; s < size_t(kSites); s++) {
        CHECK_EQ(whole.offered[s].load(), parts.offered[s].load());
        CHECK_NEAR(whole.kept[s].load(), parts.kept[s].load(), 2 + 0.01 * double(whole.offered[s].load()));
      }
      CHECK_EQ(whole.bytes_held.load(), parts.bytes_held.load());
      CHECK(parts.kept[3] > 0 && parts.kept[3] < parts.offered[3]);
      // Leaving out exact zeros changes no bit.
      Skipping exact, dense;
      dense.exact = false;
      CHECK(same_bits(run.logits(prompt, more, exact), run.logits(prompt, more, dense)));
    }
}

TEST_CASE("divided: the neurons that convert --order found hot are those on the device") {
  TinySpec spec = wide(TinySpec());
  spec.neurons = true;
  TinyModel tiny(spec);
  const PackedModel plain(tiny.path());
  const DecoderConfig c = read_decoder_config(plain);
  CHECK(cuda::read_ranks(plain, load_weights(plain, c, 1), c.n_ff).empty());
  std::mt19937 rng = fresh(15);
  const auto prompt = some_tokens(9, rng), more = some_tokens(3, rng);
  const size_t floor = Run(plain, 0).decoder.stats().floor;
  const std::vector<float> wanted = Run(plain, 0).logits(prompt, more),
                           as_stored = Run(plain, floor + 40000).logits(prompt, more);

  tiny.write_raw("neurons.safetensors", neurons_of(tiny, spec, 5).bytes());
  const PackedModel packed(tiny.path());
  const std::vector<uint32_t> ranks = cuda::read_ranks(packed, load_weights(packed, c, 1), c.n_ff);
  CHECK_EQ(ranks.size(), size_t(2 * c.n_ff));
  CHECK(cuda::hot_order(ranks.data(), kUnits) != cuda::hot_order(nullptr, kUnits));
  const std::vector<float> ordered = Run(packed, floor + 40000).logits(prompt, more);
  CHECK(!same_bits(ordered, as_stored));  // other neurons
  CHECK(difference(wanted, ordered) < kTolerance);

  tiny.write_raw("neurons.safetensors", "no file of neurons");
  const PackedModel damaged(tiny.path());
  CHECK_THROWS(Run(damaged, floor + 40000), Error, "neurons.safetensors");
  CHECK(same_bits(Run(damaged, 0).logits(prompt, more), wanted));  // not looked at where all fits
}

TEST_CASE("divided: budgets below the floor, above what is free, and contexts beyond it are refused in one line") {
  const TinyModel tiny(wide(TinySpec()));
  const PackedModel packed(tiny.path());
  const DeviceStats all = Run(packed, 0).decoder.stats();
  CHECK_THROWS(cuda::DeviceDecoder(packed, options_for(all.floor - 1, 64)), Error, "is too small on");
  CHECK_THROWS(cuda::DeviceDecoder(packed, options_for(all.floor - 1, 64)), Error,
               "give at least that (--device-memory)");
  CHECK_THROWS(cuda::DeviceDecoder(packed, options_for(all.floor, 65)), Error, "a context of 65 tokens");
  CHECK_THROWS(cuda::DeviceDecoder(packed, options_for(size_t(1) << 60, 64)), Error, "free on");
  Run run(packed, all.floor);
  CHECK_THROWS(cuda::DeviceKv(run.decoder.config(), 64, run.decoder.room()), Error, "--device-memory");
  try {
    cuda::DeviceDecoder(packed, options_for(1, 64));
    CHECK(false);
  } catch (const Error& e) {
    CHECK(e.code() == ErrorCode::budget);
    CHECK(std::string(e.what()).find('\n') == std::string::npos);
  }
#ifdef SR_CUDA_EMULATED
  // What was promised is what is taken: nothing but the budget's bytes.
  {
    const size_t before = sr_emu::allocated;
    const Run another(packed, all.floor + 40000);
    CHECK(sr_emu::allocated - before <= all.floor + 40000);
  }
#endif
}

TEST_CASE(
    "divided: a session's tokens are the CPU's, greedy ones come from the device alone, logits can still be had") {
  CHECK_EQ(device_problem(), std::string());
  const TinyModel tiny(wide(TinySpec()));
  ModelOptions options;
  options.path = tiny.path();
  options.threads = 2;
  const std::vector<int32_t> prompt = {5, 9, 100, 33, 7};
  const auto tokens_of = [&](const Model& model, float temperature) {
    SamplerOptions sampling;
    sampling.temperature = temperature;
    sampling.seed = 3;
    Sampler sampler(sampling), greedy(SamplerOptions{0, 0, 1, 0, 1, 0, 1});
    CHECK(greedy.greedy() && sampler.greedy() == (temperature == 0));
    Session session(model, 64);
    session.eval(prompt.data(), 5);
    std::vector<int32_t> ids;
    for (int i = 0; i < 8; i++) {
      if (i == 4) {  // both ways to the same token
        const int32_t best = session.sample(&greedy);
        const float* logits = session.logits();
        CHECK_EQ(best, int32_t(std::max_element(logits, logits + session.n_vocab()) - logits));
      }
      ids.push_back(session.step(&sampler));
    }
    return ids;
  };
  const Model cpu(options);
  CHECK_EQ(cpu.device_memory().budget, size_t(0));
  options.device_memory = 1 << 20;
  CHECK_THROWS(Model(options), Error, "a device memory budget is for a GPU");
  options.device = "cuda";
  options.n_ctx = 64;
  options.device_memory = 0;
  const Model gpu(options);
  options.device_memory = gpu.device_memory().floor + 40000;
  const Model divided(options);
  CHECK(divided.device_memory().cpu_layers == 2 && divided.device_memory().cpu_weights > 0);
  for (float temperature : {0.0f, 0.8f}) {
    const std::vector<int32_t> wanted = tokens_of(cpu, temperature);
    CHECK(tokens_of(gpu, temperature) == wanted);
    CHECK(tokens_of(divided, temperature) == wanted);
  }
  options.device_memory = gpu.device_memory().floor - 1;
  CHECK_THROWS(Model(options), Error, "is too small on");
  options.device = "auto";
  CHECK_EQ(Model(options).device(), std::string("cpu"));
}

#ifdef SR_CUDA_EMULATED
TEST_CASE("divided: a copy that fails mid-run gives one clear line, and the next start is sound") {
  const TinyModel tiny(wide(TinySpec()));
  const PackedModel packed(tiny.path());
  const size_t memory = Run(packed, 0).decoder.stats().floor + 40000;
  const std::vector<int32_t> prompt = {5, 9, 100, 33, 7}, more = {8, 2};
  const std::vector<float> wanted = Run(packed, memory).logits(prompt, more);
  int failures = 0;
  for (int copies = 0;; copies++) {
    {
      Run run(packed, memory);
      sr_emu::faults.fail_copy_after = copies;
      try {
        const std::vector<float> now = run.logits(prompt, more);
        sr_emu::faults = {};
        CHECK(same_bits(now, wanted));
        break;
      } catch (const Error& e) {
        failures++;
        const std::string line = e.what();
        CHECK(e.code() == ErrorCode::runtime);
        CHECK(line.find("the GPU failed (") == 0 && line.find("start again, with --device cpu") != std::string::npos);
        CHECK(line.find('\n') == std::string::npos);
        const int32_t id = 1;
        std::vector<float> row(256);
        CHECK_THROWS(run.decoder.forward(&id, 1, 0, &run.cache, Logits::last, row.data(), kNever), Error,
                     "the GPU failed");
      }
    }
    sr_emu::faults = {};
    CHECK_EQ(sr_emu::allocated, size_t(0));
  }
  CHECK(failures > 10);
}
#endif
