// What a GPU does with a model of 7B shape: bench [LAYERS [FOLDER [decode]]]. With 0 layers: two small ones, which
// shows that the program works, emulated too. With `decode`: a few tokens only, for a profiler. Prints the copy rate of
// the device, the products alone, and decoding through the engine: dense, greedy, drawn from the likeliest tokens, with
// half of all columns left out, with half of the neurons on the CPU, and with the exact zeros of a ReLU left out;
// dense, columns and zeros once more with kernels that start before the one before is over, and without graphs. The
// models are random bits, written into FOLDER (default /tmp; 3.8 GB at 32 layers) and removed. No timing is taken while
// anything else than the step runs; medians of repetitions.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include "cuda/memory.h"
#include "cuda/upload.h"
#include "kernels/f16.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"

#include <chrono>

namespace {

using namespace sr;
using Clock = std::chrono::steady_clock;

struct Shape {
  int embd, heads, head_dim, ff, vocab, panel_rows;
};
constexpr Shape kSevenB = {4096, 32, 128, 11008, 32000, 1664};  // Llama-2-7B
constexpr Shape kSmall = {128, 4, 32, 256, 300, 128};
Shape shape = kSevenB;
bool wrong = false;  // what must be the same was not

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Random 4-bit weights without minima: any codes, scales that keep activations of ordinary size.
uint64_t state = 88172645463325252ull;
void random_bytes(char* p, size_t n) {
  for (size_t i = 0; i + 8 <= n; i += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::memcpy(p + i, &state, 8);
  }
}
// sd of u - 8 is 4.6
uint16_t scale_for(int cols) { return f32_to_f16(1.0f / std::sqrt(float(cols)) / 4.6f); }

PanelMatrix panel_view(int rows, int cols) {
  PanelMatrix m;
  m.kind = WeightKind::q4;
  m.rows = rows;
  m.cols = cols;
  m.panel_rows = shape.panel_rows;
  return m;
}

std::string panels(int rows, int cols) {
  const PanelMatrix m = panel_view(rows, cols);
  std::string blob(m.total_bytes(), '\0');
  random_bytes(&blob[0], blob.size());
  const uint16_t scale = scale_for(cols);
  char* p = &blob[0];
  for (int r = 0; r < m.padded_rows(); r += m.panel_rows) {
    const int R = std::min(m.panel_rows, m.padded_rows() - r);
    for (int s = 0; s < m.slabs(); s++, p += m.slab_bytes(R))
      for (int i = 0; i < R; i++) std::memcpy(p + 2 * i, &scale, 2);
  }
  return blob;
}

std::string records(int neurons, int cols) {
  NeuronMatrix m;
  m.kind = WeightKind::q4;
  m.neurons = neurons;
  m.cols = cols;
  std::string blob(m.total_bytes(), '\0');
  random_bytes(&blob[0], blob.size());
  const uint16_t scale = scale_for(cols);
  for (int i = 0; i < neurons; i++)
    for (size_t row = 0; row < 2; row++) {
      char* at = &blob[0] + m.offset_of(i) + row * m.up_offset() + m.code_bytes();
      for (size_t k = 0; k < m.scale_bytes() / 2; k++) std::memcpy(at + 2 * k, &scale, 2);
    }
  return blob;
}

// A packed model whose layers hold one layer's bits each at their own place.
class Synthetic {
 public:
  Synthetic(const std::string& folder, int layers, bool relu) : relu_(relu), layers_(layers) {
    path_ = folder + "/sparse-run-bench-" + std::to_string(getpid()) + (relu ? "-relu" : "");
    if (std::system(("mkdir -p '" + path_ + "'").c_str()) != 0)
      throw Error(ErrorCode::runtime, "cannot write to " + folder);
    write_config(0);
    write_weights();
  }
  ~Synthetic() {
    for (const char* file : {"config.json", "weights.safetensors"}) std::remove((path_ + "/" + file).c_str());
    rmdir(path_.c_str());
  }
  const std::string& path() const { return path_; }

  void write_config(double cut) const {
    std::ofstream f(path_ + "/config.json");
    f << "{\"format_version\": 1, \"architecture\": \"bench\", \"n_layers\": " << layers_
      << ", \"n_embd\": " << shape.embd << ", \"n_heads\": " << shape.heads << ", \"n_kv_heads\": " << shape.heads
      << ", \"head_dim\": " << shape.head_dim << ", \"n_ff\": " << shape.ff << ", \"n_vocab\": " << shape.vocab
      << ", \"n_ctx_train\": 4096, \"norm\": \"rms\", \"activation\": \"" << (relu_ ? "relu" : "silu")
      << "\", \"activation_threshold\": " << cut << ", \"rope_style\": \"half\"}";
  }

 private:
  struct Tensor {
    std::string name, layout;
    const std::string* data;
    bool floats;
    int n;
  };

  static std::string panel_layout(int rows, int cols) {
    return "{\"layout\": \"panels\", \"version\": 1, \"kind\": \"q4\", \"rows\": " + std::to_string(rows) +
           ", \"cols\": " + std::to_string(cols) + ", \"panel_rows\": " + std::to_string(shape.panel_rows) +
           ", \"group\": 32, \"min\": false}";
  }

  void write_weights() const {
    const std::string qkv = panels(3 * shape.embd, shape.embd), o = panels(shape.embd, shape.embd),
                      down = panels(shape.embd, shape.ff);
    const std::string gate_up = relu_ ? records(shape.ff, shape.embd) : panels(2 * shape.ff, shape.embd);
    const std::string vocab = panels(shape.vocab, shape.embd);
    const std::vector<float> ones(shape.embd, 1.0f);
    const std::string norm(reinterpret_cast<const char*>(ones.data()), ones.size() * 4);
    std::vector<Tensor> all;
    const auto add = [&](const std::string& name, const std::string& data, const std::string& layout) {
      all.push_back({name, layout, &data, layout.empty(), shape.embd});
    };
    add("token_embd", vocab, panel_layout(shape.vocab, shape.embd));
    add("output", vocab, panel_layout(shape.vocab, shape.embd));
    add("output_norm", norm, "");
    const std::string neurons =
        "{\"layout\": \"neurons\", \"version\": 2, \"kind\": \"q4\", \"neurons\": " + std::to_string(shape.ff) +
        ", \"cols\": " + std::to_string(shape.embd) + ", \"gated\": true, \"group\": 32, \"min\": false}";
    for (int l = 0; l < layers_; l++) {
      const std::string at = "layers." + std::to_string(l) + ".";
      add(at + "attn_norm", norm, "");
      add(at + "ffn_norm", norm, "");
      add(at + "attn_qkv", qkv, panel_layout(3 * shape.embd, shape.embd));
      add(at + "attn_o", o, panel_layout(shape.embd, shape.embd));
      add(at + "ffn_gate_up", gate_up, relu_ ? neurons : panel_layout(2 * shape.ff, shape.embd));
      add(at + "ffn_down", down, panel_layout(shape.embd, shape.ff));
    }
    std::string header = "{\"__metadata__\":{", tensors, pads;
    size_t at = 0;
    int pad = 0;
    for (const Tensor& t : all) {
      if (!t.floats) {
        std::string escaped;
        for (char c : t.layout) escaped += c == '"' ? std::string("\\\"") : std::string(1, c);
        header += (header.back() == '{' ? "" : ",") + ("\"layout:" + t.name + "\":\"" + escaped + "\"");
      }
      const std::string shape = t.floats ? std::to_string(t.n) : std::to_string(t.data->size());
      tensors += ",\"" + t.name + "\":{\"dtype\":\"" + (t.floats ? "F32" : "U8") + "\",\"shape\":[" + shape +
                 "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + t.data->size()) + "]}";
      at += t.data->size();
      const size_t gap = (4096 - at % 4096) % 4096;
      if (gap) {
        pads += ",\"__pad__." + std::to_string(pad++) + "\":{\"dtype\":\"U8\",\"shape\":[" + std::to_string(gap) +
                "],\"data_offsets\":[" + std::to_string(at) + "," + std::to_string(at + gap) + "]}";
      }
      at += gap;
    }
    header += "}" + tensors + pads + "}";
    while ((header.size() + 8) % 4096) header += ' ';
    std::ofstream f(path_ + "/weights.safetensors", std::ios::binary);
    const uint64_t n = header.size();
    f.write(reinterpret_cast<const char*>(&n), 8);
    f << header;
    const std::string zeros(4096, '\0');
    for (const Tensor& t : all) {
      f << *t.data;
      f.write(zeros.data(), std::streamsize((4096 - t.data->size() % 4096) % 4096));
    }
    if (!f) throw Error(ErrorCode::runtime, "writing the model failed: is " + path_ + " full?");
  }

  std::string path_;
  bool relu_;
  int layers_;
};

// ---- device

class Timer {
 public:
  Timer() {
    cuda::check(cudaEventCreate(&a_), "timing");
    cuda::check(cudaEventCreate(&b_), "timing");
  }
  ~Timer() {
    cudaEventDestroy(a_);
    cudaEventDestroy(b_);
  }
  // Seconds of fn, which puts work on the stream.
  template <class Fn>
  double operator()(cudaStream_t s, Fn fn) {
    cuda::check(cudaEventRecord(a_, s), "timing");
    fn();
    cuda::check(cudaEventRecord(b_, s), "timing");
    cuda::check(cudaEventSynchronize(b_), "timing");
    float ms = 0;
    cuda::check(cudaEventElapsedTime(&ms, a_, b_), "timing");
    return ms / 1e3;
  }

 private:
  cudaEvent_t a_, b_;
};

// Bytes read and written a second by a device-to-device copy, GB/s.
double copy_rate(cudaStream_t s, size_t bytes) {
  const cuda::DeviceBuffer<uint8_t> a(bytes, "the copy test"), b(bytes, "the copy test");
  cuda::check(cudaMemsetAsync(a.data(), 0x5b, bytes, s), "the copy test");
  Timer timer;
  std::vector<double> rates;
  for (int i = 0; i < 12; i++) {
    const double t = timer(s, [&] {
      cuda::check(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice, s), "the copy test");
    });
    if (i >= 2) rates.push_back(2e-9 * double(bytes) / t);
  }
  return median(rates);
}

// One shape's products, over copies of the matrix that together exceed any cache.
void products(cudaStream_t s, const char* name, int rows, int cols, double copy, size_t footprint) {
  const std::string blob = panels(rows, cols);
  PanelMatrix m = panel_view(rows, cols);
  m.data = reinterpret_cast<const uint8_t*>(blob.data());
  const size_t copies = std::max<size_t>(2, footprint / blob.size());
  std::vector<cuda::DeviceMatrix> w;
  for (size_t i = 0; i < copies; i++) w.emplace_back(std::vector<PanelMatrix>{m}, nullptr, name);
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> x(static_cast<size_t>(cols));
  for (auto& v : x) v = normal(rng);
  const auto dx = cuda::to_device(x.data(), x.size(), name);
  const cuda::Step start = {0, 0};
  const auto step = cuda::to_device(&start, 1, name);
  cudaDeviceProp device;
  cuda::check(cudaGetDeviceProperties(&device, 0), name);
  const int usual = cuda::plan_gemv(w[0].view(), device.multiProcessorCount).splits;
  const int zero = 0;
  Timer timer;
  std::printf("%-10s %6d x %-6d", name, rows, cols);
  double dense = 0;
  for (double density : {1.0, 0.5, 0.1}) {
    // Thresholds by the normal distribution's quantiles.
    const float cut = density == 1.0 ? 0.0f : density == 0.5 ? 0.6745f : 1.6449f;
    const std::vector<float> threshold(size_t(cols), cut);
    const auto thresholds = cuda::to_device(threshold.data(), threshold.size(), name);
    const auto kept = cuda::to_device(&zero, 1, name);
    const cuda::DeviceVectors in(1, cols, name);
    cuda::Mask mask = {};
    if (density < 1) mask = {thresholds.data(), nullptr, 0, kept.data(), cols};
    cuda::PrepareArgs a = {};
    a.x = dx.data();
    a.ldx = size_t(cols);
    a.width = cols;
    a.residual_scale = 1;
    a.out = in.view();
    a.quantise = 1;
    a.mask = mask;
    a.step = step.data();
    cuda::prepare(s, a, 1);
    double best = 0;
    int best_splits = 0;
    for (int splits = 1; splits <= 32; splits *= 2) {
      if (splits > 1 && splits > w[0].view().slabs / 8) break;
      const int used = splits == 32 ? usual : splits;
      const cuda::GemvPlan plan = {used};
      const cuda::DeviceBuffer<float> partial(std::max<size_t>(1, cuda::gemv_partial_floats(w[0].view(), plan)), name);
      const std::vector<int> none(size_t(w[0].view().groups), 0);
      const auto tickets = cuda::to_device(none.data(), none.size(), name);
      const cuda::DeviceBuffer<float> y(size_t(w[0].view().y_rows), name);
      const auto all = [&] {
        for (const auto& one : w)
          cuda::gemv(s, one.view(), in.view(), mask, plan, {partial.data(), tickets.data()}, step.data(), y.data());
      };
      all();
      std::vector<double> times;
      for (int i = 0; i < 7; i++) times.push_back(timer(s, all) / double(copies));
      const double rate = double(blob.size()) / median(times) / 1e9;
      if (rate > best) {
        best = rate;
        best_splits = used;
      }
      if (density == 1.0 && used == usual && dense == 0) dense = rate;
    }
    if (density == 1.0) {
      std::printf("  dense %7.1f GB/s = %3.0f%% of copy (cut in %d); best %7.1f (in %d)", dense, 100 * dense / copy,
                  usual, best, best_splits);
      dense = best;
    } else {
      std::printf("   %2.0f%% of columns: %.2fx", 100 * density, best / dense);
    }
  }
  std::printf("\n");
}

// ---- the whole step

struct Decoding {
  double tokens_per_s, ms;
};

Decoding decode(Session& session, int past, int tokens) {
  std::vector<int32_t> prompt;
  for (int i = 0; i < past; i++) prompt.push_back(1 + i * 37 % (shape.vocab - 1));
  session.truncate(0);
  session.eval(prompt.data(), past);
  std::vector<double> times;
  for (int i = 0; i < tokens + 3; i++) {
    const int32_t id = 1 + i * 101 % (shape.vocab - 1);
    const auto t0 = Clock::now();
    session.eval(&id, 1);
    if (i >= 3) times.push_back(std::chrono::duration<double>(Clock::now() - t0).count());
  }
  const double t = median(times);
  return {1 / t, 1e3 * t};
}

// Magnitudes below which a share of a site's inputs lies, layer by layer, from a few tokens through the CPU.
std::vector<std::vector<float>> quantiles(Session& session, int layers, double share, int taps_wanted) {
  const int n = 8;
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(100 + 17 * i);
  std::vector<float> x(size_t(n) * shape.embd), out(x.size());
  session.truncate(0);
  session.embed(ids.data(), n, x.data());
  std::vector<std::vector<float>> found;
  for (int l = 0; l < layers; l++) {
    std::vector<std::vector<float>> taps;
    std::vector<float*> to(Session::kTapCount, nullptr);
    for (int i = 0; i < Session::kTapCount; i++) {
      taps.emplace_back(size_t(n) * size_t(std::max(1, session.tap_width(i))));
      if (taps_wanted >> i & 1 && session.tap_width(i)) to[size_t(i)] = taps.back().data();
    }
    session.run_layer(l, 0, x.data(), n, out.data(), to.data());
    x = out;
    std::vector<float> cuts;
    for (int i = 0; i < Session::kTapCount; i++) {
      if (!to[size_t(i)]) {
        cuts.push_back(0);
        continue;
      }
      auto& v = taps[size_t(i)];
      for (auto& f : v) f = std::fabs(f);
      std::nth_element(v.begin(), v.begin() + long(double(v.size()) * share), v.end());
      cuts.push_back(v[size_t(double(v.size()) * share)]);
    }
    found.push_back(cuts);
  }
  return found;
}

Model open(const std::string& path, size_t device_memory = 0) {
  ModelOptions options;
  options.path = path;
  options.device = "cuda";
  options.device_memory = device_memory;
  options.n_ctx = 1024;
  return Model(options);
}

// Decoding with a sampler of this temperature and the usual options: the host sees a token, or the likeliest ones.
double sampled_rate(Session& session, int past, int tokens, float temperature) {
  SamplerOptions options;
  options.temperature = temperature;
  Sampler sampler(options);
  decode(session, past, 1);
  std::vector<double> times;
  for (int i = 0; i < tokens; i++) {
    const auto t0 = Clock::now();
    session.step(&sampler);
    if (i) times.push_back(std::chrono::duration<double>(Clock::now() - t0).count());
  }
  return 1 / median(times);
}

// What else the decoder can do (cpp/kernels/cuda/README.md), and how it is asked for.
struct Switch {
  const char *name, *value, *what;
};
constexpr Switch kSwitches[] = {{"SPARSE_RUN_CUDA_OVERLAP", "1", "kernels that start early"},
                                {"SPARSE_RUN_CUDA_GRAPHS", "0", "without graphs"}};
class Switched {
 public:
  explicit Switched(const Switch& s) : name_(s.name) { setenv(s.name, s.value, 1); }
  ~Switched() { unsetenv(name_); }
  Switched(const Switched&) = delete;
  Switched& operator=(const Switched&) = delete;

 private:
  const char* name_;
};

void set_sites(Sparsity* s, const std::vector<std::vector<float>>& cuts) {
  const char* names[] = {"A", "O", "M", "Z"};
  for (size_t l = 0; l < cuts.size(); l++)
    for (size_t i = 0; i < 4; i++) s->set(names[i], int(l), &cuts[l][i], 1);
}

// A second model beside the first; null, with a line, where there is no room for what of it is to be there.
std::unique_ptr<Model> open_beside(const std::string& path, const char* what, size_t device_memory = 0) {
  try {
    std::unique_ptr<Model> model(new Model(open(path, device_memory)));
    if (device_memory || model->device_memory().cpu_layers == 0) return model;
  } catch (const Error& e) {
    if (e.code() != ErrorCode::budget) throw;
  }
  std::printf("%s: no room on the GPU for a second model beside the first, not measured\n", what);
  return nullptr;
}

// The same model with room for about half of its neurons: the CPU computes the others.
void divided(const std::string& path, const DeviceMemory& all, int past, int tokens, double undivided) {
  const std::unique_ptr<Model> opened = open_beside(path, "divided", all.floor + all.weights / 3);
  if (!opened) return;
  const Model& model = *opened;
  const DeviceMemory m = model.device_memory();
  Session session(model, 1024);
  const Decoding d = decode(session, past, tokens);
  std::printf("divided, %.0f%% of the neurons on the GPU, %.2f GB on the CPU (%d threads, %d layers): %.1f tok/s, "
              "%.2fx undivided\n",
              100 * m.hot_share, double(m.cpu_weights) / 1e9, model.threads(), m.cpu_layers, d.tokens_per_s,
              d.tokens_per_s / undivided);
}

void whole(const std::string& folder, int layers, double copy, bool tiny) {
  const int past = tiny ? 4 : 64, tokens = tiny ? 3 : 48, prompted = tiny ? 20 : 512;
  {
    const Synthetic synthetic(folder, layers, false);
    const Model model = open(synthetic.path());
    Session session(model, 1024);
    const Decoding dense = decode(session, past, tokens);
    const double rate = double(model.bytes_per_token()) * dense.tokens_per_s / 1e9;
    std::printf(
        "decode, %d layers of %s shape, 4 bits, dense: %.1f tok/s, %.2f ms, %.1f GB/s = %.0f%% of the copy rate "
        "(target 75%%)\n",
        layers, tiny ? "a small" : "7B", dense.tokens_per_s, dense.ms, rate, 100 * rate / copy);
    std::printf("greedy, chosen on the device: %.1f tok/s\n", sampled_rate(session, past, tokens, 0));
    std::printf("drawn from the device's likeliest tokens: %.1f tok/s\n", sampled_rate(session, past, tokens, 0.8f));
    std::vector<int32_t> prompt(static_cast<size_t>(prompted));
    for (size_t i = 0; i < prompt.size(); i++) prompt[i] = int32_t(1 + i * 37 % (shape.vocab - 1));
    std::vector<double> times;
    for (int i = 0; i < 4; i++) {
      session.truncate(0);
      const auto t0 = Clock::now();
      session.eval(prompt.data(), int(prompt.size()));
      if (i) times.push_back(std::chrono::duration<double>(Clock::now() - t0).count());
    }
    std::printf("prompt of %d tokens: %.0f tok/s\n", prompted, prompted / median(times));

    const auto cuts = quantiles(session, layers, 0.5, 15);
    Sparsity half(model, 0);
    set_sites(&half, cuts);
    session.truncate(0);
    session.set_sparsity(&half, false);
    session.density();
    const Decoding sparse = decode(session, past, tokens);
    const Density d = session.density();
    std::printf(
        "half of all columns left out (A %.0f%%, O %.0f%%, M %.0f%%, Z %.0f%% kept): %.1f tok/s, %.2fx dense (target "
        "1.5x)\n",
        100 * d.site[0], 100 * d.site[1], 100 * d.site[2], 100 * d.site[3], sparse.tokens_per_s,
        sparse.tokens_per_s / dense.tokens_per_s);
    const auto logits = [](const Session& s) { return std::vector<float>(s.logits(), s.logits() + s.n_vocab()); };
    for (const Switch& w : kSwitches) {
      const Switched on(w);
      const std::unique_ptr<Model> again = open_beside(synthetic.path(), w.what);
      if (!again) continue;
      Session other(*again, 1024);
      // Both ways one after the other: a GPU's clock moves between the first line and this one.
      session.set_sparsity(nullptr, false);
      const Decoding d1 = decode(session, past, tokens), d2 = decode(other, past, tokens);
      const bool same = logits(session) == logits(other);
      Sparsity other_half(*again, 0);
      set_sites(&other_half, cuts);
      other.set_sparsity(&other_half, false);
      session.set_sparsity(&half, false);
      const Decoding s1 = decode(session, past, tokens), s2 = decode(other, past, tokens);
      std::printf("%s: dense %.1f tok/s, %.2fx; half of the columns %.1f tok/s, %.2fx; logits %s\n", w.what,
                  d2.tokens_per_s, d2.tokens_per_s / d1.tokens_per_s, s2.tokens_per_s,
                  s2.tokens_per_s / s1.tokens_per_s, same ? "the same" : "DIFFER");
      wrong = wrong || !same;
    }
    divided(synthetic.path(), model.device_memory(), past, tokens, dense.tokens_per_s);
  }
  const Synthetic synthetic(folder, layers, true);
  {
    // A ReLU with a cut that makes 90% of the neurons exact zeros.
    const Model model = open(synthetic.path());
    Session session(model, 64);
    const auto cuts = quantiles(session, std::min(layers, 2), 0.9, 16);
    synthetic.write_config(double(cuts.back()[4]));
  }
  const Model model = open(synthetic.path());
  Session session(model, 1024);
  session.set_exact(false);
  const Decoding dense = decode(session, past, tokens);
  session.set_exact(true);
  session.density();
  const Decoding sparse = decode(session, past, tokens);
  const Density d = session.density();
  std::printf("ReLU by neuron, %.0f%% of the neurons exactly 0: %.1f tok/s, %.2fx its own dense at %.1f (target 2x)\n",
              100 - 100 * d.site[4], sparse.tokens_per_s, sparse.tokens_per_s / dense.tokens_per_s, dense.tokens_per_s);
  const Switched on(kSwitches[0]);
  const std::unique_ptr<Model> again = open_beside(synthetic.path(), kSwitches[0].what);
  if (!again) return;
  Session other(*again, 1024);
  other.set_exact(false);
  const Decoding dense2 = decode(other, past, tokens);
  other.set_exact(true);
  const Decoding sparse2 = decode(other, past, tokens);
  std::printf("the same, %s: %.1f tok/s, %.2fx its own dense at %.1f\n", kSwitches[0].what, sparse2.tokens_per_s,
              sparse2.tokens_per_s / dense2.tokens_per_s, dense2.tokens_per_s);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a run that is cut off has printed what it found
  try {
    const int layers = argc > 1 ? std::atoi(argv[1]) : 32;
    const std::string folder = argc > 2 ? argv[2] : "/tmp";
    const std::string problem = gpu_problem();
    if (!problem.empty()) throw Error(ErrorCode::runtime, problem);
    cudaDeviceProp device;
    cuda::check(cudaGetDeviceProperties(&device, 0), "its properties");
    const bool tiny = layers == 0;  // does the program itself work?
    if (argc > 3 && std::string(argv[3]) == "decode") {
      if (tiny) shape = kSmall;
      const Synthetic synthetic(folder, tiny ? 2 : layers, false);
      const Model model = open(synthetic.path());
      Session session(model, 1024);
      std::printf("decoding a token: %.2f ms\n", decode(session, tiny ? 4 : 64, 3).ms);
      return 0;
    }
    cuda::Stream s;
    const double copy = copy_rate(s, size_t(tiny ? 1 : 1024) << 20);
    std::printf("%s, compute capability %d.%d, %d multiprocessors, %.1f GB; copy %.1f GB/s read and written\n",
                device.name, device.major, device.minor, device.multiProcessorCount,
                double(device.totalGlobalMem) / 1e9, copy);
    const size_t footprint = size_t(tiny ? 1 : 512) << 20;
    if (tiny) {
      shape = kSmall;
      products(s, "small", 320, 256, copy, footprint);
      whole(folder, 2, copy, true);
      return wrong;
    }
    products(s, "q, k, v", 3 * shape.embd, shape.embd, copy, footprint);
    products(s, "o", shape.embd, shape.embd, copy, footprint);
    products(s, "gate, up", 2 * shape.ff, shape.embd, copy, footprint);
    products(s, "down", shape.embd, shape.ff, copy, footprint);
    products(s, "head", shape.vocab, shape.embd, copy, footprint);
    whole(folder, layers, copy, false);
    return wrong;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
