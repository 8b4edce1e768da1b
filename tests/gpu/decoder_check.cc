// The device decoder against the CPU decoder, on one small model for each thing that families differ in: on a GPU, or
// emulated in CI. Activations go to 8 bits on both sides, and sums are added in another order: where that moves a
// rounding, logits differ by the step of one activation, not by more.
#include "check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "cuda/decoder.h"
#include "cuda/device.h"
#include "format/packed_model.h"
#include "on_device.h"
#include "sparse_run/engine.h"
#include "tiny_variants.h"

using namespace sr;
using namespace sr_test;

namespace {

const auto kNever = [] { return false; };

std::vector<int32_t> some_tokens(int n, int vocab, std::mt19937& rng) {
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(int32_t(rng() % uint32_t(vocab)));
  return ids;
}

// The tokens that a session goes on with after a prompt.
std::vector<int32_t> answer(Session& session, Sampler& sampler, const std::vector<int32_t>& prompt, int n) {
  session.eval(prompt.data(), int(prompt.size()));
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(session.step(&sampler));
  return ids;
}

// Both decoders on one model, and their caches.
struct Pair {
  PackedModel packed;
  Decoder cpu;
  cuda::DeviceDecoder gpu;
  KvCache cpu_cache;
  cuda::DeviceKv gpu_cache;

  explicit Pair(const TinyModel& tiny, int n_ctx = 512)
      : packed(tiny.path()),
        cpu(packed, 1),
        gpu(packed),
        cpu_cache(cpu.config().n_layers, cpu.config().n_kv_heads, cpu.config().head_dim, n_ctx),
        gpu_cache(cpu.config(), n_ctx) {}
  int vocab() const { return cpu.config().n_vocab; }

  // Evaluates on both; the largest difference of the logits relative to the largest logit.
  double run(const std::vector<int32_t>& ids, int pos, const Skipping& on_cpu = {}, const Skipping& on_gpu = {}) {
    const bool all = ids.size() > 1;
    const size_t n = all ? ids.size() * size_t(vocab()) : size_t(cpu.padded_vocab());
    std::vector<float> a(n), b(n, -1e9f);
    const Logits which = all ? Logits::all : Logits::last;
    CHECK(cpu.forward(ids.data(), int(ids.size()), pos, &cpu_cache, which, a.data(), kNever, on_cpu));
    CHECK(gpu.forward(ids.data(), int(ids.size()), pos, &gpu_cache, which, b.data(), kNever, on_gpu));
    double most = 0, size = 0;
    for (size_t i = 0; i < (all ? n : size_t(vocab())); i++) {
      most = std::max(most, double(std::fabs(a[i] - b[i])));
      size = std::max(size, double(std::fabs(a[i])));
    }
    return most / size;
  }
};

// A rounding of 1/127 that falls the other way; most variants have none on most data.
constexpr double kTolerance = 0.05, kUsual = 1e-3;

}  // namespace

// The first case of this program: the emulation stops where a kernel is first launched in a capture.
TEST_CASE("device decoder: what only a later set of masks launches is loaded before it is captured") {
  TinySpec spec;
  spec.activation = "relu";
  spec.neurons = spec.gated = true;
  const TinyModel tiny(spec);
  const PackedModel packed(tiny.path());
  cuda::DeviceDecoder gpu(packed);
  cuda::DeviceKv cache(gpu.config(), 64);
  std::vector<float> first(size_t(gpu.padded_vocab())), again(first);
  Skipping dense;
  dense.exact = false;
  const int32_t id = 5;
  CHECK(gpu.forward(&id, 1, 0, &cache, Logits::last, first.data(), kNever, dense));
  CHECK(gpu.forward(&id, 1, 0, &cache, Logits::last, again.data(), kNever));
  CHECK(std::memcmp(first.data(), again.data(), 197 * sizeof(float)) == 0);
}

TEST_CASE("device decoder: every variant's logits are the CPU's, prompt and decode") {
  std::mt19937 rng = fresh(1);
  int usual = 0, all = 0;
  for (const Named& v : variants()) {
    const TinyModel tiny(v.spec);
    Pair pair(tiny);
    const double block = pair.run(some_tokens(50, pair.vocab(), rng), 0);
    double steps = 0;
    for (int i = 0; i < 3; i++) steps = std::max(steps, pair.run(some_tokens(1, pair.vocab(), rng), 50 + i));
    const std::string found =
        v.name + ": prompt off by " + std::to_string(block) + ", decode by " + std::to_string(steps);
    if (!(block < kTolerance && steps < kTolerance)) sr_test::fail(__FILE__, __LINE__, found);
    usual += block < kUsual && steps < kUsual;
    all++;
  }
  if (2 * usual < all) sr_test::fail(__FILE__, __LINE__, "only " + std::to_string(usual) + " variants are close");
}

TEST_CASE("device decoder: long contexts in several stretches of keys, windows, and any order of execution") {
  TinySpec spec;
  spec.more = "\"window\": [0, 100], ";
  const TinyModel tiny(spec);
  std::mt19937 rng = fresh(2);
  const auto prompt = some_tokens(256, 197, rng), more = some_tokens(40, 197, rng);
  std::vector<float> first;
  in_every_order([&] {
    Pair pair(tiny, 700);
    CHECK(pair.run(prompt, 0) < kTolerance);
    CHECK(pair.run(more, 256) < kTolerance);
    for (int i = 0; i < 3; i++) CHECK(pair.run({more[size_t(i)]}, 296 + i) < kTolerance);
    std::vector<float> logits(size_t(pair.cpu.padded_vocab()));
    CHECK(pair.gpu.forward(more.data(), 1, 299, &pair.gpu_cache, Logits::last, logits.data(), kNever));
    logits.resize(197);
    if (first.empty()) first = logits;
    CHECK(first == logits);
  });
}

TEST_CASE(
    "device decoder: a step is captured once and replayed, for each cache, after truncation, with and without masks") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  std::mt19937 rng = fresh(3);
  const PackedModel packed(tiny.path());
  cuda::DeviceDecoder gpu(packed);
  cuda::DeviceKv one(gpu.config(), 64), two(gpu.config(), 64);
  std::array<int, kSites> widths{{96, 64, 96, 192, 192}};
  SparsityPlan plan(2, widths, 2);
  for (Site s : {Site::A, Site::O, Site::M, Site::Z, Site::G}) plan.set_break_even(s, 0.9f);
  const float cut = 0.4f;
  for (int l = 0; l < 2; l++)
    for (Site s : {Site::A, Site::O, Site::M, Site::Z}) plan.set(l, s, &cut, 1);
  Skipping sparse;
  sparse.plan = &plan;
  const auto ids = some_tokens(6, 197, rng);
  const auto run = [&](cuda::DeviceKv* cache, const Skipping& skipping) {
    std::vector<float> out;
    for (int i = 0; i < 6; i++) {
      std::vector<float> logits(size_t(gpu.padded_vocab()));
      CHECK(gpu.forward(&ids[size_t(i)], 1, i, cache, Logits::last, logits.data(), kNever, skipping));
      out.insert(out.end(), logits.begin(), logits.begin() + 197);
    }
    return out;
  };
  const auto dense = run(&one, {}), masked = run(&one, sparse);
  CHECK(dense == run(&two, {}));
  CHECK(masked == run(&two, sparse));
  CHECK(dense == run(&one, {}));
  CHECK(dense != masked);
  CHECK(std::equal(dense.begin(), dense.begin() + 2 * 197, masked.begin()));  // the first two tokens stay dense
}

TEST_CASE("device decoder: kernels that start before the one before is over give the same bits") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const PackedModel packed(tiny.path());
  std::mt19937 rng = fresh(7);
  const auto ids = some_tokens(20, 197, rng);
  const auto run = [&] {
    cuda::DeviceDecoder gpu(packed);
    cuda::DeviceKv cache(gpu.config(), 64);
    std::vector<float> out;
    for (size_t i = 0; i < ids.size(); i++) {
      std::vector<float> logits(size_t(gpu.padded_vocab()));
      CHECK(gpu.forward(&ids[i], 1, int(i), &cache, Logits::last, logits.data(), kNever));
      out.insert(out.end(), logits.begin(), logits.begin() + 197);
    }
    return out;
  };
  const char* switch_name = "SPARSE_RUN_CUDA_OVERLAP";
  const std::string before = std::getenv(switch_name) ? std::getenv(switch_name) : "";
  setenv(switch_name, "0", 1);
  const auto apart = run();
  setenv(switch_name, "1", 1);
  CHECK(apart == run());
#ifdef SR_CUDA_EMULATED
  CHECK_EQ(sr_emu::overlapped, 0LL);  // the device is too old
  sr_emu::faults.capability = 90;
  CHECK(apart == run());
  CHECK(sr_emu::overlapped > 20);
  sr_emu::overlapped = 0;
  sr_emu::faults.ptx = 75;  // the code for an older GPU, translated: it does not wait for what comes before
  CHECK(apart == run());
  CHECK_EQ(sr_emu::overlapped, 0LL);
  sr_emu::faults.capability = 75;
  sr_emu::faults.ptx = 0;
#endif
  setenv(switch_name, before.c_str(), 1);
}

TEST_CASE("device decoder: thresholds at A, O, M, Z and G mask and count as the CPU's do") {
  std::mt19937 rng = fresh(4);
  for (bool neurons : {false, true})
    for (bool blocks : {false, true}) {
      TinySpec spec;
      spec.neurons = neurons;
      const TinyModel tiny(spec);
      Pair pair(tiny);
      std::array<int, kSites> widths{{96, 64, 96, 192, 192}};
      SparsityPlan plan(2, widths, 3);
      for (Site s : {Site::A, Site::O, Site::M, Site::Z, Site::G}) plan.set_break_even(s, 0.9f);
      for (int l = 0; l < 2; l++)
        for (int s = 0; s < kSites; s++) {
          if (!pair.cpu.site_refusal(l, Site(s)).empty()) continue;
          std::vector<float> thresholds(size_t(widths[size_t(s)]));
          for (auto& t : thresholds)
            t = (s == 3 ? 0.02f : s == 4 ? 0.1f : 0.3f) * (1 + 0.5f * float(rng() % 100) / 100);
          plan.set(l, Site(s), thresholds.data(), thresholds.size());
        }
      SiteCounts a, b;
      Skipping on_cpu, on_gpu;
      on_cpu.plan = on_gpu.plan = &plan;
      on_cpu.mask_blocks = on_gpu.mask_blocks = blocks;
      on_cpu.counts = &a;
      on_gpu.counts = &b;
      CHECK(pair.run(some_tokens(20, 197, rng), 0, on_cpu, on_gpu) < kTolerance);
      for (int i = 0; i < 3; i++) CHECK(pair.run(some_tokens(1, 197, rng), 20 + i, on_cpu, on_gpu) < kTolerance);
      CHECK(a.offered[neurons ? 4 : 2] > 0);
      for (size_t s = 0; s < size_t(kSites); s++) {
        CHECK_EQ(a.offered[s].load(), b.offered[s].load());
        CHECK_NEAR(a.kept[s].load(), b.kept[s].load(), 2 + 0.01 * double(a.offered[s].load()));
        if (a.offered[s]) CHECK(a.kept[s] > 0 && a.kept[s] < a.offered[s]);
      }
      CHECK_EQ(a.bytes_held.load(), b.bytes_held.load());
      CHECK_NEAR(b.bytes_read.load(), a.bytes_read.load(), 0.03 * double(a.bytes_read.load()));
    }
}

TEST_CASE("device decoder: leaving out exact zeros changes no bit") {
  std::mt19937 rng = fresh(5);
  for (const char* activation : {"relu", "relu2"})
    for (bool neurons : {false, true})
      for (bool gated : {false, true}) {
        TinySpec spec;
        spec.activation = activation;
        spec.neurons = neurons;
        spec.gated = gated;
        const TinyModel tiny(spec);
        const PackedModel packed(tiny.path());
        cuda::DeviceDecoder gpu(packed);
        cuda::DeviceKv cache(gpu.config(), 64);
        Skipping exact, dense;
        dense.exact = false;
        SiteCounts counts;
        exact.counts = &counts;
        const auto ids = some_tokens(4, 197, rng);
        std::vector<float> a(size_t(gpu.padded_vocab())), b(a);
        for (int i = 0; i < 4; i++) {
          CHECK(gpu.forward(&ids[size_t(i)], 1, i, &cache, Logits::last, a.data(), kNever, exact));
          CHECK(gpu.forward(&ids[size_t(i)], 1, i, &cache, Logits::last, b.data(), kNever, dense));
          CHECK(std::memcmp(a.data(), b.data(), 197 * sizeof(float)) == 0);
        }
        CHECK(counts.kept[3] > 0 && counts.kept[3] < counts.offered[3]);
      }
}

TEST_CASE(
    "device decoder: a stop ends a prompt; logits that are not numbers are an error, and the next pass is sound") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  Pair pair(tiny);
  std::mt19937 rng = fresh(6);
  const auto ids = some_tokens(30, 197, rng);
  std::vector<float> logits(30 * 197);
  int asked = 0;
  CHECK(
      !pair.gpu.forward(ids.data(), 30, 0, &pair.gpu_cache, Logits::all, logits.data(), [&] { return ++asked == 2; }));
  CHECK_EQ(asked, 2);
  CHECK(!pair.gpu.forward(ids.data(), 1, 0, &pair.gpu_cache, Logits::last, logits.data(), [] { return true; }));
  CHECK(pair.run(ids, 0) < kTolerance);

  TinyModel broken(spec);
  const float nan = std::nanf("");
  std::memcpy(&broken.weights().tensors["output_norm"].data[0], &nan, sizeof nan);
  broken.write();
  const PackedModel packed(broken.path());
  cuda::DeviceDecoder gpu(packed);
  cuda::DeviceKv cache(gpu.config(), 64);
  CHECK_THROWS(gpu.forward(ids.data(), 4, 0, &cache, Logits::last, logits.data(), kNever), Error, "not a number");
  CHECK_THROWS(gpu.forward(ids.data(), 1, 0, &cache, Logits::last, logits.data(), kNever), Error, "not a number");
}

TEST_CASE(
    "session on the device: tokens, truncation and statistics as on the CPU; auto takes the GPU where there is one") {
  CHECK_EQ(device_problem(), std::string());
  const DeviceInfo info = device_info();
  CHECK(info.built && info.devices > 0 && !info.name.empty() && !info.capability.empty() && !info.code.empty());
  CHECK(info.memory > 0 && info.free_memory > 0 && info.multiprocessors > 0 && !info.driver_cuda.empty());
  const TinySpec spec;
  const TinyModel tiny(spec);
  ModelOptions options;
  options.path = tiny.path();
  options.threads = 1;
  const Model cpu(options);
  CHECK_EQ(cpu.device(), std::string("cpu"));
  options.device = "auto";
  CHECK(Model(options).device() != "cpu");
  options.device = "tpu";
  CHECK_THROWS(Model(options), Error, "unknown device 'tpu'");
  options.device = "cuda";
  const Model gpu(options);
  CHECK(!gpu.copied());
  const std::vector<int32_t> prompt = {5, 9, 100, 33, 7};
  const auto greedy = [&](const Model& model) {
    SamplerOptions sampling;
    sampling.temperature = 0;
    Sampler sampler(sampling);
    Session session(model, 64);
    const std::vector<int32_t> ids = answer(session, sampler, prompt, 8);
    session.truncate(5);
    session.eval(&ids[0], 1);
    CHECK_EQ(session.sample(&sampler), ids[1]);
    CHECK_EQ(session.stats().prompt_tokens, 5);
    CHECK_EQ(session.n_past(), 6);
    CHECK(session.kv_bytes() > 0);
    std::vector<float> all(5 * size_t(session.n_vocab()));
    session.truncate(0);
    session.eval_all(prompt.data(), 5, all.data());
    CHECK(std::equal(all.end() - session.n_vocab(), all.end(), session.logits()));
    return ids;
  };
  CHECK(greedy(cpu) == greedy(gpu));
#ifdef SR_CUDA_EMULATED
  sr_emu::faults.devices = 0;
  CHECK_THROWS(Model(options), Error, "no NVIDIA GPU was found: use --device cpu");
  options.device = "auto";
  CHECK_EQ(Model(options).device(), std::string("cpu"));
  sr_emu::faults.devices = 1;
  options.device = "cuda";
  sr_emu::faults.driver = 11040;
  CHECK_THROWS(Model(options), Error, "the NVIDIA driver is for CUDA 11.4, this build for 12.4: update the driver");
  CHECK_EQ(device_info().driver_cuda, std::string("11.4"));
  sr_emu::faults.driver = 0;
  CHECK_THROWS(Model(options), Error, "no NVIDIA driver was found");
  sr_emu::faults.driver = 12080;
  sr_emu::faults.code = cudaErrorNoKernelImageForDevice;
  options.device = "cuda";
  CHECK_THROWS(Model(options), Error, "no code for emulated GPU, compute capability 7.5 (no kernel image");
  options.device = "auto";
  CHECK_EQ(Model(options).device(), std::string("cpu"));
  for (cudaError_t e : {cudaErrorInvalidDeviceFunction, cudaErrorInvalidKernelImage, cudaErrorInvalidPtx,
                        cudaErrorJitCompilerNotFound, cudaErrorUnsupportedPtxVersion}) {
    sr_emu::faults.code = e;
    CHECK(device_problem().find("this build has no code for emulated GPU") == 0);
  }
  // Not the build's fault: another program has the GPU, or all of its memory; a machine that is still starting.
  sr_emu::faults.code = cudaErrorDevicesUnavailable;
  CHECK_EQ(device_problem(), std::string("the GPU does not answer (CUDA-capable device(s) is/are busy or unavailable): "
                                         "use --device cpu"));
  sr_emu::faults.code = cudaErrorMemoryAllocation;
  CHECK_EQ(device_problem(), std::string("the GPU does not answer (out of memory): use --device cpu"));
  sr_emu::faults.code = cudaSuccess;
  sr_emu::faults.count = cudaErrorSystemNotReady;
  CHECK_EQ(device_problem(), std::string("the GPU does not answer (system not yet initialized): use --device cpu"));
  sr_emu::faults.count = cudaSuccess;
  CHECK_EQ(device_problem(), std::string());
  CHECK_EQ(int(cudaGetLastError()), int(cudaSuccess));
  sr_emu::faults.memory = sr_emu::allocated + 1000;
  CHECK_EQ(Model(options).device(), std::string("cpu"));  // does not fit
  sr_emu::faults = {};
#endif
}

TEST_CASE("session on the device: what a sampler draws from the likeliest tokens is what it draws from all logits") {
  for (int vocab : {197, 700}) {  // fewer than the device's 256, and more
    TinySpec spec;
    spec.n_vocab = vocab;
    const TinyModel tiny(spec);
    ModelOptions options;
    options.path = tiny.path();
    options.threads = 1;
    options.device = "cuda";
    const Model gpu(options);
    const std::vector<int32_t> prompt = {5, 9, 100, 33, 7};
    int decided = 0, drawn = 0;
    for (int i = 0; i < 24; i += vocab < kDeviceTop ? 5 : 1) {
      SamplerOptions sampling;
      sampling.temperature = 0.9f;
      sampling.seed = 100 + i;
      sampling.top_k = i % 3 == 0 ? 0 : i % 3 == 1 ? 7 : 40;
      sampling.top_p = i / 3 % 2 ? 0.7f : 1.0f;
      sampling.min_p = i / 6 % 2 ? 0.1f : 0.0f;
      sampling.repeat_penalty = i / 12 ? 1.3f : 1.0f;
      Sampler from_top(sampling), from_all(sampling);
      Session session(gpu, 64);
      session.eval(prompt.data(), 5);
      session.eval(prompt.data(), 1);
      for (int step = 0; step < 2; step++, drawn++) {
#ifdef SR_CUDA_EMULATED
        const long long launches = sr_emu::launches, copies = sr_emu::copied;
#endif
        const int32_t token = session.sample(&from_top);  // accepts
#ifdef SR_CUDA_EMULATED
        // find_top is four kernels, and none where the options want all logits; 256 tokens are less than all of 700.
        const bool asked = from_top.may_sample_top(std::min(vocab, kDeviceTop));
        CHECK_EQ(sr_emu::launches - launches, asked ? 4LL : 0LL);
        const long long copied = sr_emu::copied - copies, all = vocab * (long long)sizeof(float);
        const long long top = sizeof(cuda::Top);
        CHECK(copied == (asked ? top : 0) || copied == (asked ? top : 0) + all);
        decided += copied == top;
#else
        decided++;
#endif
        CHECK_EQ(token, from_all.sample(session.logits(), session.n_vocab()));
        from_all.accept(token);
        session.eval(&token, 1);
      }
    }
    CHECK(2 * decided > drawn);
  }
}

#ifdef SR_CUDA_EMULATED
TEST_CASE("a thread that has chosen another GPU gets the first one's results, and has its own again afterwards") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  ModelOptions options;
  options.path = tiny.path();
  options.threads = 1;
  options.device = "cuda";
  const std::vector<int32_t> prompt = {5, 9, 100, 33, 7};
  const auto tokens = [&](const Model& model) {
    SamplerOptions sampling;
    sampling.seed = 3;
    Sampler sampler(sampling);
    Session session(model, 64);
    const std::vector<int32_t> ids = answer(session, sampler, prompt, 6);
    CHECK(session.logits()[0] == session.logits()[0]);
    return ids;
  };
  sr_emu::faults.devices = 2;
  std::unique_ptr<Model> here(new Model(options)), there;
  const auto wanted = tokens(*here);
  std::thread other([&] {
    CHECK_EQ(int(cudaSetDevice(1)), int(cudaSuccess));
    CHECK_EQ(device_problem(), std::string());
    CHECK(device_info().devices == 2);
    CHECK(tokens(*here) == wanted);
    there.reset(new Model(options));
    CHECK(tokens(*there) == wanted);
    CHECK_EQ(sr_emu::elsewhere, size_t(0));
    here.reset();
    options.device_memory = 1;
    CHECK_THROWS(Model(options), Error, "is too small on");  // what fails gives the device back too
    int device = -1;
    cudaGetDevice(&device);
    CHECK_EQ(device, 1);
  });
  other.join();
  CHECK(tokens(*there) == wanted);  // and it was made there
  there.reset();
  CHECK_EQ(sr_emu::allocated, size_t(0));
  CHECK_EQ(int(cudaGetLastError()), int(cudaSuccess));
  sr_emu::faults = {};
}
#endif

TEST_CASE("device decoder: fixed sets of neurons are refused by name") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const PackedModel packed(tiny.path());
  cuda::DeviceDecoder gpu(packed);
  cuda::DeviceKv cache(gpu.config(), 64);
  const NeuronSets sets(2, 192);
  Skipping skipping;
  skipping.neurons = &sets;
  std::vector<float> logits(256);
  const int32_t id = 1;
  CHECK_THROWS(gpu.forward(&id, 1, 0, &cache, Logits::last, logits.data(), kNever, skipping), Error, "--device cpu");
}

#ifdef SR_CUDA_EMULATED
TEST_CASE("too little device memory and a device that fails give one clear line each") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const PackedModel packed(tiny.path());
  sr_emu::faults.memory = 20000;
  CHECK_THROWS(cuda::DeviceDecoder(packed), Error, "not enough GPU memory for this model");
  sr_emu::faults.memory = size_t(1) << 34;
  CHECK_EQ(sr_emu::allocated, size_t(0));
  {
    cuda::DeviceDecoder gpu(packed);
    CHECK_THROWS(cuda::DeviceKv(gpu.config(), 1 << 26, gpu.room()), Error,
                 "not enough GPU memory for a context of 67108864 tokens");
    sr_emu::faults.memory = sr_emu::allocated + 100000;
    CHECK_THROWS(cuda::DeviceKv(gpu.config(), 2048, gpu.room()), Error, "not enough GPU memory for the cached keys");
    CHECK_EQ(int(cudaGetLastError()), int(cudaSuccess));  // else the next kernel would be blamed for it
    sr_emu::faults.memory = size_t(1) << 34;
    cuda::DeviceKv cache(gpu.config(), 64);
    std::vector<float> logits(256);
    const int32_t ids[3] = {1, 2, 3};
    CHECK(gpu.forward(ids, 1, 0, &cache, Logits::last, logits.data(), kNever));
    sr_emu::faults.fail_launch_after = 5;
    CHECK_THROWS(gpu.forward(ids, 3, 1, &cache, Logits::last, logits.data(), kNever), Error, "the GPU failed");
    CHECK_THROWS(gpu.forward(ids, 1, 1, &cache, Logits::last, logits.data(), kNever), Error, "--device cpu");
  }
  sr_emu::faults = {};
  CHECK_EQ(sr_emu::allocated, size_t(0));
}
#endif
