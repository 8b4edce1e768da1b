// Decoding with single neurons in memory: the bits of the whole model in memory for sets, predictors, thresholds and
// zeros, any number of slots and threads; and clear errors where the file or the disk goes wrong.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <thread>

#include "check.h"
#include "fault_source.h"
#include "model/decoder.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"
#include "sparse_run/predictor.h"
#include "tiny_neurons.h"

using sr::Error;
using sr::ErrorCode;
using sr::Logits;
using sr_test::FaultSource;
using sr_test::TinyModel;
using sr_test::TinySpec;

namespace {

TinySpec by_neuron() {
  TinySpec s;
  s.n_layers = 4;
  s.n_embd = 192;
  s.n_ff = 256;
  s.n_vocab = 300;
  s.neurons = true;
  return s;
}

std::vector<std::pair<const char*, TinySpec>> variants() {
  std::vector<std::pair<const char*, TinySpec>> v;
  const auto add = [&](const char* name, auto set) {
    TinySpec s = by_neuron();
    set(s);
    v.push_back({name, s});
  };
  add("q4 with minima", [](TinySpec&) {});
  add("zeros, q5 and q6, products", [](TinySpec& s) {
    s.units = true;
    s.activation = "relu";
    s.kinds = {{"ffn_gate_up", "q5"}, {"ffn_down", "q6"}};
    s.has_min = false;
  });
  add("not gated, biases, groups of 16", [](TinySpec& s) {
    s.gated = false;
    s.biases = true;
    s.activation = "relu";
    s.group = 16;
    s.kinds = {{"ffn_down", "q5"}};
  });
  add("float rows, q8 columns", [](TinySpec& s) {
    s.kinds = {{"ffn_gate_up", "f16"}, {"ffn_down", "q8"}};
    s.n_embd = 160;
  });
  add("wide enough for stretches of columns, scales that are products", [](TinySpec& s) {
    s.units = true;
    s.n_layers = 3;
    s.n_embd = 320;
    s.n_ff = 6592;
    s.activation = "relu";
  });
  return v;
}

// Random sets of some layers, another share in each; odd layers none: all their neurons.
std::unique_ptr<sr::NeuronSets> random_sets(const TinySpec& s, double share, uint32_t seed) {
  std::mt19937 rng(seed);
  auto sets = std::make_unique<sr::NeuronSets>(s.n_layers, s.n_ff);
  for (int l = 0; l < s.n_layers; l++) {
    std::vector<int32_t> ids;
    for (int i = 0; i < s.n_ff; i++) {
      if (double(rng() % 1000) < 1000 * share * (l == 2 ? 0 : 1)) ids.push_back(i);
    }
    if (l != 1) sets->set(l, ids.data(), ids.size());
  }
  return sets;
}

struct RandomPredictor {
  explicit RandomPredictor(const TinySpec& s) {
    std::mt19937 rng(4);
    constexpr int kRank = 24;
    const auto codes = [&](size_t count) {
      std::vector<int8_t> out(count);
      for (auto& c : out) c = int8_t(int(rng() % 255) - 127);
      return out;
    };
    set.neurons.resize(size_t(s.n_layers));
    for (int l = 0; l < s.n_layers; l++) {
      if (l == 3) continue;  // all neurons of this layer
      const auto a = codes(size_t(kRank) * size_t(s.n_embd)), b = codes(size_t(s.n_ff) * kRank);
      const std::vector<float> a_scale(kRank, 0.01f / std::sqrt(float(s.n_embd))),
          threshold(size_t(s.n_ff), l == 2 ? 0.8f : 0.2f);
      const std::vector<float> b_scale(size_t(s.n_ff), 0.01f / std::sqrt(float(kRank)));
      const sr::LowRankWeights w = {kRank,    s.n_ff,         a.data(),        a_scale.data(),
                                    b.data(), b_scale.data(), threshold.data()};
      set.neurons[size_t(l)] = std::make_unique<sr::LowRank>(w, s.n_embd, &set.memory);
      set.most_scratch = std::max(set.most_scratch, set.neurons[size_t(l)]->scratch_bytes());
    }
    set.most_rank = kRank;
    set.dense_tokens = 12;
  }
  sr::PredictorSet set;
};

// slots: 0 = all in memory, else above the fewest.
struct Opened {
  Opened(TinyModel& tiny, int threads, int more_slots, bool by_gate = false, int gate_percent = 0)
      : source(more_slots < 0 ? nullptr : sr::open_direct(sr::PackedModel::weight_file(tiny.path()))),
        packed(source ? std::make_unique<sr::PackedModel>(tiny.path(), source)
                      : std::make_unique<sr::PackedModel>(tiny.path())),
        decoder(*packed, threads) {
    if (!source) return;
    CHECK_EQ(decoder.store_refusal(), std::string());
    sr::NeuronStore* store =
        decoder.make_store(*packed, sr::open_direct(sr::NeuronFile::path_in(tiny.path())), by_gate);
    const auto plan = decoder.plan_residency(decoder.room_without_ffn());
    decoder.load_resident(*packed, plan, std::make_shared<sr::ReadQueue>(source, 2, 16 * sr::kReadAlign), nullptr);
    const sr::GateRows* gates = store->gates();
    if (gates) CHECK_EQ(gates->refusal(), std::string());
    decoder.open_store(store->least_slots() + more_slots, 0, gates ? gates->all_blocks() * gate_percent / 100 : 0, 3,
                       16 * sr::kReadAlign, nullptr);
  }
  std::shared_ptr<sr::ByteSource> source;
  std::unique_ptr<sr::PackedModel> packed;
  sr::Decoder decoder;
};

// Logits of a block and of single tokens after it.
std::vector<float> run(sr::Decoder& d, const sr::Skipping& skipping) {
  const sr::DecoderConfig& c = d.config();
  sr::KvCache cache(c.n_layers, c.n_kv_heads, c.head_dim, 64);
  const std::function<bool()> never = [] { return false; };
  std::vector<float> out, last(size_t(d.padded_vocab()));
  std::vector<int32_t> ids;
  for (int i = 0; i < 24; i++) ids.push_back((i * 37 + 5) % c.n_vocab);
  const auto step = [&](int at, int n) {
    CHECK(d.forward(ids.data() + at, n, at, &cache, Logits::last, last.data(), never, skipping));
    out.insert(out.end(), last.begin(), last.begin() + c.n_vocab);
  };
  step(0, 9);
  for (int i = 9; i < 18; i++) step(i, 1);
  step(18, 3);
  for (int i = 21; i < 24; i++) step(i, 1);
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A model that is opened with a budget and a share of its neurons.
struct Model {
  explicit Model(const TinySpec& s) : spec(s), tiny(s) {
    tiny.write_raw("neurons.safetensors", sr_test::neurons_of(tiny, s, 3).bytes());
  }
  sr::ModelOptions options(size_t budget, double share) const {
    sr::ModelOptions o;
    o.path = tiny.path();
    o.threads = 2;
    o.memory_budget = budget;
    o.n_ctx = 256;
    o.neuron_share = share;
    return o;
  }
  // Under which a quarter of the weights would fit, or all but the FFNs and that share of the neurons; to be asked for
  // right before it is used, because the process itself counts.
  size_t budget(double share) const {
    sr::Model(options(size_t(2) << 30, share));  // what it leaves behind in the heap is there from now on
    const sr::MemoryStats m = sr::Model(options(size_t(2) << 30, share)).memory();
    const auto source = sr::open_direct(sr::PackedModel::weight_file(tiny.path()));
    const sr::PackedModel packed(tiny.path(), source);
    sr::Decoder decoder(packed, 1);
    const sr::NeuronStore& store =
        *decoder.make_store(packed, sr::open_direct(sr::NeuronFile::path_in(tiny.path())), false);
    const int64_t wanted = int64_t(share * double(store.all_neurons())) + store.least_slots();
    return m.floor - (size_t(2) << 30) / 1000 + m.resident / 4 + store.bytes(std::min(wanted, store.all_neurons())) +
           (size_t(1) << 20);
  }
  TinySpec spec;
  TinyModel tiny;
};

TinySpec larger() {
  TinySpec s = by_neuron();
  s.n_layers = 12;
  s.n_embd = 256;
  s.n_ff = 4096;
  s.activation = "relu";
  return s;
}

std::vector<int32_t> greedy(sr::Session& s, int n, const std::function<void(int)>& before = nullptr) {
  sr::SamplerOptions options;
  options.temperature = 0;
  sr::Sampler sampler(options);
  std::vector<int32_t> prompt, out;
  for (int i = 0; i < 20; i++) prompt.push_back((i * 31 + 7) % 300);
  s.truncate(0);
  s.eval(prompt.data(), int(prompt.size()));
  for (int i = 0; i < n; i++) {
    if (before) before(i);
    out.push_back(s.step(&sampler));
  }
  return out;
}

void use_sets(sr::Session& s, double share) {
  std::mt19937 rng(8);
  std::vector<std::vector<int32_t>> sets(size_t(s.n_layers()));
  std::vector<const std::vector<int32_t>*> lists;
  for (auto& ids : sets) {
    for (int i = 0; i < s.n_ff(); i++) {
      if (rng() % 1000 < 1000 * share) ids.push_back(i);
    }
    lists.push_back(&ids);
  }
  s.set_neurons(lists, false);
}

ErrorCode code_of(const std::function<void()>& fn, std::string* text = nullptr) {
  try {
    fn();
  } catch (const Error& e) {
    if (text) *text = e.what();
    return e.code();
  }
  return ErrorCode::isa;  // nothing was thrown
}

struct Faults {
  Faults() {
    sr::wrap_sources([this](std::shared_ptr<sr::ByteSource> inner) {
      auto made = std::make_shared<FaultSource>(std::move(inner));
      (made->path().find("neurons") != std::string::npos ? neurons : weights) = made;
      return made;
    });
  }
  ~Faults() { sr::wrap_sources(nullptr); }
  std::shared_ptr<FaultSource> neurons, weights;
};

// Errors and stalls of one file while an answer is generated that reads it at every token.
void expect_faults_end_cleanly(sr::Session& s, FaultSource& file, const std::string& name) {
  const auto expected = greedy(s, 14);
  std::string text;
  // What is read ahead may carry the answer a little further.
  CHECK(code_of([&] { greedy(s, 14, [&](int i) { file.fail_with = i >= 3 ? EIO : 0; }); }, &text) ==
        ErrorCode::runtime);
  CHECK(text.find("cannot read") == 0);
  CHECK(text.find(name) != std::string::npos);
  file.fail_with = 0;
  CHECK(greedy(s, 14) == expected);
  for (int round = 0; round < 2; round++) {
    std::atomic<bool> stalled{false};
    ErrorCode code = ErrorCode::isa;
    std::thread generation([&] {
      code = code_of([&] {
        greedy(s, 14, [&](int i) {
          if (i != 4) return;
          file.stall();
          stalled = true;
        });
      });
    });
    while (!stalled) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    s.cancel();
    generation.join();
    CHECK(code == ErrorCode::cancelled);
    file.go_on();
    CHECK(greedy(s, 14) == expected);
  }
}

}  // namespace

TEST_CASE("single neurons give the bits of the whole model in memory, for every method, number of slots and threads") {
  for (const auto& variant : variants()) {
    TinyModel tiny(variant.second);
    tiny.write_raw("neurons.safetensors",
                   sr_test::neurons_of(tiny, variant.second, 7, variant.second.gated ? 0 : 4096).bytes());
    Opened resident(tiny, 1, -1);
    const auto few = random_sets(variant.second, 0.2, 1), most = random_sets(variant.second, 0.9, 2);
    const RandomPredictor predictor(variant.second);
    std::array<int, sr::kSites> widths{};
    for (int i = 0; i < sr::kSites; i++) widths[size_t(i)] = resident.decoder.site_width(sr::Site(i));
    sr::SparsityPlan z(variant.second.n_layers, widths, 0), g(variant.second.n_layers, widths, 0);
    const float threshold = 0.05f;
    for (int l = 0; l < variant.second.n_layers; l++) {
      z.set(l, sr::Site::Z, &threshold, 1);
      if (variant.second.gated) g.set(l, sr::Site::G, &threshold, 1);
    }
    std::vector<sr::Skipping> all;
    const auto with = [&](auto set) {
      sr::Skipping s;
      set(s);
      all.push_back(s);
    };
    with([&](sr::Skipping& s) { s.neurons = few.get(); });
    with([&](sr::Skipping& s) { s.neurons = most.get(); });
    with([&](sr::Skipping& s) { s.neurons = few.get(), s.exact = false; });
    with([&](sr::Skipping& s) { s.predictor = &predictor.set; });
    with([&](sr::Skipping& s) { s.predictor = &predictor.set, s.neurons = most.get(); });
    with([&](sr::Skipping& s) { s.neurons = most.get(), s.plan = &z; });
    with([&](sr::Skipping& s) { s.predictor = &predictor.set, s.plan = &g; });
    for (int threads : {1, 2, 3}) {
      for (int more : {0, 100, 1000}) {
        Opened stored(tiny, threads, more);
        for (size_t i = 0; i < all.size(); i++) {
          const auto before = stored.decoder.store()->pool().stats();
          if (!same_bits(run(stored.decoder, all[i]), run(resident.decoder, all[i]))) {
            sr_test::fail(__FILE__, __LINE__,
                          std::string(variant.first) + ", " + std::to_string(threads) + " threads, " +
                              std::to_string(more) + " more slots, method " + std::to_string(i) + ": other bits");
          }
          CHECK_EQ(stored.decoder.store()->pool().stats().tokens - before.tokens, i == 3 || i == 6 ? 9 : 12);
        }
        // Without a word on which neurons are needed, all weights are streamed.
        const auto before = stored.decoder.store()->pool().stats();
        CHECK(same_bits(run(stored.decoder, {}), run(resident.decoder, {})));
        CHECK_EQ(stored.decoder.store()->pool().stats().tokens, before.tokens);
      }
    }
  }
}

TEST_CASE("a fixed set is read once: after that decoding reads nothing") {
  Model model(larger());
  sr::Model whole([&] {
    sr::ModelOptions o;
    o.path = model.tiny.path();
    o.threads = 2;
    return o;
  }());
  sr::Session reference(whole, 256);
  use_sets(reference, 0.1);
  const auto expected = greedy(reference, 12);

  const size_t budget = model.budget(0.15);
  const sr::Model opened(model.options(budget, 0.15));
  const sr::MemoryStats start = opened.memory();
  CHECK(start.process + start.working + start.contexts + start.resident + start.ring + start.neurons <= budget);
  CHECK(start.neuron_slots > 12 * 4096 * 0.15);
  CHECK(start.streamed > 0);
  CHECK_EQ(start.no_neurons, std::string());
  sr::Session s(opened, 256);
  use_sets(s, 0.1);
  CHECK(greedy(s, 12) == expected);
  const sr::MemoryStats first = opened.memory();
  CHECK_EQ(first.neuron_tokens, 12);
  CHECK(first.neuron_hits > 10 * first.neuron_misses);
  int64_t at_decode = 0;
  CHECK(greedy(s, 12, [&](int i) {
    if (i != 2) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // what is read ahead for a next prompt is there
    at_decode = opened.memory().read_bytes;
  }) == expected);
  const sr::MemoryStats second = opened.memory();
  CHECK_EQ(second.neuron_misses, first.neuron_misses);
  CHECK_EQ(second.read_bytes, at_decode);
  CHECK_EQ(second.neuron_tokens, 24);
  CHECK_EQ(second.passes, 26);
}

TEST_CASE(
    "without a file, room or a layout for them there are no single neurons, and it says why; results are the same") {
  Model model(larger());
  std::vector<int32_t> expected;
  {
    sr::Model roomy(model.options(size_t(1) << 30, 1));
    CHECK_EQ(roomy.memory().no_neurons, std::string());
    sr::Session first(roomy, 256);
    use_sets(first, 0.2);
    expected = greedy(first, 8);
  }
  const size_t budget = model.budget(0.1), neurons = sr::Model(model.options(budget, 1)).memory().neurons;
  CHECK(neurons > size_t(4) << 20);
  const auto why = [&](const sr::ModelOptions& options) {
    const sr::Model opened(options);
    CHECK_EQ(opened.memory().neuron_slots, 0);
    CHECK_EQ(opened.memory().neurons, size_t(0));
    sr::Session s(opened, 256);
    use_sets(s, 0.2);
    CHECK(greedy(s, 8) == expected);
    return opened.memory().no_neurons;
  };
  CHECK_EQ(why(model.options(budget, 0)), std::string());
  CHECK(why(model.options(budget - neurons, 1)).find("leaves room for") != std::string::npos);
  CHECK(std::remove((model.tiny.path() + "/neurons.safetensors").c_str()) == 0);
  CHECK(why(model.options(budget, 1)).find("--order") != std::string::npos);
}

TEST_CASE("a file of neurons that is damaged, or belongs to other weights, is refused by name") {
  TinySpec spec = by_neuron();
  Model model(spec);
  const auto refused = [&](const sr_test::SafetensorsText& file, const char* word) {
    model.tiny.write_raw("neurons.safetensors", file.bytes());
    std::string text;
    CHECK(code_of([&] { sr::Model m(model.options(size_t(1) << 30, 1)); }, &text) == ErrorCode::model);
    CHECK(text.find("neurons.safetensors") != std::string::npos);
    CHECK(text.find(word) != std::string::npos);
  };
  const auto sound = sr_test::neurons_of(model.tiny, spec, 3);
  auto file = sound;
  file.tensors.erase("layers.1.ffn_positions");
  refused(file, "missing");
  file = sound;
  std::memcpy(&file.tensors["layers.1.ffn_positions"].data[8], &file.tensors["layers.1.ffn_positions"].data[0], 4);
  refused(file, "permutation");
  file = sound;
  file.tensors["layers.0.ffn_positions"].data[3] = 'x';
  refused(file, "permutation");
  file = sound;
  file.tensors["layers.2.ffn_records"].data.resize(file.tensors["layers.2.ffn_records"].data.size() - 64);
  file.tensors["layers.2.ffn_records"].shape = {int64_t(file.tensors["layers.2.ffn_records"].data.size())};
  refused(file, "same size");
  file = sound;
  file.tensors["layers.2.ffn_heads"].data.resize(64);
  file.tensors["layers.2.ffn_heads"].shape = {64};
  refused(file, "sizes of the weights");
  TinySpec others = spec;
  others.seed = 77;
  TinyModel another(others);
  refused(sr_test::neurons_of(another, others, 3), "other neurons");
  file = sound;
  file.metadata["neurons_version"] = "2";
  model.tiny.write_raw("neurons.safetensors", file.bytes());
  CHECK(code_of([&] { sr::Model m(model.options(size_t(1) << 30, 1)); }) == ErrorCode::unsupported);
  model.tiny.write_raw("neurons.safetensors", "short");
  CHECK(code_of([&] { sr::Model m(model.options(size_t(1) << 30, 1)); }) == ErrorCode::model);
}

TEST_CASE(
    "an error, or a stall that is cancelled, while a neuron is read ends the generation, and the next one works") {
  Model model(larger());
  const size_t budget = model.budget(0.1);
  Faults faults;
  sr::Model opened(model.options(budget, 0.1));
  CHECK(opened.memory().neuron_slots > 0);
  sr::Session s(opened, 256);
  use_sets(s, 0.5);  // more than there are slots for: reads at every token
  expect_faults_end_cleanly(s, *faults.neurons, "neurons.safetensors");
}

TEST_CASE("where attention has to leave memory too, decoding reads FFNs whole again, with the same results") {
  Model model(larger());
  sr::Model opened(model.options(model.budget(0.1), 0.1));
  sr::Session s(opened, 256);
  use_sets(s, 0.05);
  const auto expected = greedy(s, 8);
  CHECK_EQ(opened.memory().neuron_tokens, 8);
  opened.set_aside(size_t(1) << 30, true);
  CHECK(greedy(s, 8) == expected);
  CHECK_EQ(opened.memory().neuron_tokens, 8);
}

TEST_CASE(
    "neurons that their gates choose give the bits of the whole model in memory, however many gate rows and slots "
    "there are") {
  std::vector<std::pair<const char*, TinySpec>> all = variants();
  all[1].second.more = "\"activation_threshold\": 0.3, \"up_relu\": true, ";
  TinySpec floats = all[3].second;
  floats.activation = "relu2";
  floats.n_embd = 192;
  all.push_back({"float rows, zeros", floats});
  for (const auto& variant : all) {
    TinyModel tiny(variant.second);
    tiny.write_raw("neurons.safetensors", sr_test::neurons_of(tiny, variant.second, 7).bytes());
    Opened resident(tiny, 1, -1);
    std::array<int, sr::kSites> widths{};
    for (int i = 0; i < sr::kSites; i++) widths[size_t(i)] = resident.decoder.site_width(sr::Site(i));
    sr::SparsityPlan g(variant.second.n_layers, widths, 0), later(variant.second.n_layers, widths, 12);
    const float most = 0.5f, few = 0.01f;
    for (int l = 0; l < variant.second.n_layers; l++) {
      if (variant.second.gated && l != 1) g.set(l, sr::Site::G, l == 2 ? &few : &most, 1);
      if (variant.second.gated) later.set(l, sr::Site::G, &most, 1);
      later.set(l, sr::Site::Z, &few, 1);
    }
    const bool zeros = variant.second.activation != "silu";
    std::vector<sr::Skipping> methods(4);
    methods[1].plan = &g;
    methods[2].plan = &later;
    methods[3].exact = false;
    int64_t from_store = 0;
    for (int threads : {1, 2, 3}) {
      for (int more : {0, 300}) {
        for (int percent : {0, 37, 100}) {
          Opened stored(tiny, threads, more, true, percent);
          for (size_t i = 0; i < methods.size(); i++) {
            const auto before = stored.decoder.store()->pool().stats();
            if (!same_bits(run(stored.decoder, methods[i]), run(resident.decoder, methods[i]))) {
              sr_test::fail(__FILE__, __LINE__,
                            std::string(variant.first) + ", " + std::to_string(threads) + " threads, " +
                                std::to_string(more) + " more slots, " + std::to_string(percent) +
                                "% of the gates, method " + std::to_string(i) + ": other bits");
            }
            const int64_t tokens = stored.decoder.store()->pool().stats().tokens - before.tokens;
            from_store += tokens;
            if (i == 3 || (i == 0 && !zeros)) CHECK_EQ(tokens, 0);
          }
        }
      }
    }
    CHECK(from_store > 0);
  }
}

namespace {

// Four of five neurons are 0, others at every token.
TinySpec sparse() {
  TinySpec s = larger();
  s.more = "\"activation_threshold\": 0.95, ";
  return s;
}

sr::ModelOptions by_gate(const Model& model, size_t budget) {
  sr::ModelOptions o = model.options(budget, 0);
  o.by_gate = true;
  return o;
}

}  // namespace

TEST_CASE(
    "where gates choose, only what they leave is read, within the budget and with the tokens of the model in memory") {
  Model model(sparse());
  sr::ModelOptions o;
  o.path = model.tiny.path();
  o.threads = 2;
  sr::Model whole(o);
  sr::Session reference(whole, 256);
  const auto expected = greedy(reference, 16);
  const size_t budget = model.budget(0) - (size_t(5) << 20);  // some gate rows are streamed
  sr::Model opened(by_gate(model, budget));
  const sr::MemoryStats start = opened.memory();
  CHECK_EQ(start.no_neurons, std::string());
  CHECK(start.neuron_slots > 0);
  CHECK(start.gates > 0 && start.gates < start.neurons);
  CHECK(start.process + start.working + start.contexts + start.resident + start.ring + start.neurons <= budget);
  sr::Session s(opened, 256);
  CHECK(greedy(s, 16) == expected);
  const sr::MemoryStats m = opened.memory();
  CHECK_EQ(m.neuron_tokens, 16);
  // What a prompt's block leaves is lent to single neurons, and to nobody while the caller has taken it.
  CHECK(m.neuron_slots > 0 && m.neuron_slots <= start.neuron_slots);
  opened.set_aside(budget - start.process - start.working - start.contexts - start.resident - start.ring -
                       start.neurons, false);
  CHECK(greedy(s, 2) == std::vector<int32_t>(expected.begin(), expected.begin() + 2));
  CHECK_EQ(opened.memory().neuron_tokens, 16);
  opened.set_aside(0, false);
  CHECK(greedy(s, 16) == expected);
  CHECK(opened.memory().neuron_tokens >= 31);  // but for the one that brought attention back
  CHECK(m.neuron_hits > 0 && m.neuron_misses > 0);
  CHECK(m.neuron_hits + m.neuron_misses < 16 * 12 * 4096 / 2);
  // Lists instead of gates, and all neurons: streamed.
  const int64_t singly = opened.memory().neuron_tokens;
  use_sets(s, 0.3);
  use_sets(reference, 0.3);
  CHECK(greedy(s, 8) == greedy(reference, 8));
  s.set_neurons({}, false);
  s.set_exact(false);
  CHECK(greedy(s, 16) == expected);
  CHECK_EQ(opened.memory().neuron_tokens, singly);
  CHECK(singly <= 32);
  // Where all fits, nothing is read singly, and nothing is said.
  const sr::MemoryStats roomy = sr::Model(by_gate(model, size_t(1) << 30)).memory();
  CHECK_EQ(roomy.neuron_slots, 0);
  CHECK_EQ(roomy.streamed, size_t(0));
  CHECK_EQ(roomy.no_neurons, std::string());
}

TEST_CASE(
    "an error, or a stall that is cancelled, in either file ends a generation in which gates choose, and the next one "
    "works") {
  Model model(sparse());
  const size_t budget = model.budget(0) - (size_t(5) << 20);  // some gate rows are streamed
  Faults faults;
  sr::Model opened(by_gate(model, budget));
  CHECK(opened.memory().neuron_slots > 0);
  CHECK(opened.memory().gates_streamed > 0);
  sr::Session s(opened, 256);
  expect_faults_end_cleanly(s, *faults.neurons, "neurons.safetensors");
  expect_faults_end_cleanly(s, *faults.weights, "weights.safetensors");
}
