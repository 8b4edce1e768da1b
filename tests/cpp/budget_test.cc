// Models under a memory budget: the same bits as in memory for any part of the weights on flash, and clear errors,
// never a wrong token, when the file or the disk goes wrong.
#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "base/aligned_buffer.h"
#include "base/memory_info.h"
#include "check.h"
#include "fault_source.h"
#include "format/packed_model.h"
#include "model/attention.h"
#include "model/decoder.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"
#include "tiny_runs.h"

using sr::Error;
using sr::ErrorCode;
using sr::Logits;
using sr_test::FaultSource;
using sr_test::some_tokens;
using sr_test::TinyModel;
using sr_test::TinySpec;

namespace {

// A decoder with exactly `room` bytes for weights; 0: all in memory.
struct Opened {
  Opened(const std::string& path, int threads, size_t room)
      : source(room ? sr::open_direct(sr::PackedModel::weight_file(path)) : nullptr),
        packed(source ? std::make_unique<sr::PackedModel>(path, source) : std::make_unique<sr::PackedModel>(path)),
        decoder(*packed, threads) {
    if (!room) return;
    const sr::ResidencyPlan plan = decoder.plan_residency(room);
    streamed = plan.streamed_bytes;
    decoder.load_resident(*packed, plan, std::make_shared<sr::ReadQueue>(source, 2, 16 * sr::kReadAlign), nullptr);
  }
  std::shared_ptr<sr::ByteSource> source;
  std::unique_ptr<sr::PackedModel> packed;
  sr::Decoder decoder;
  size_t streamed = 0;
};

// Logits of a prompt, last and all, and of tokens one by one after it.
std::vector<float> run(sr::Decoder& d, const std::vector<int32_t>& prompt, const std::vector<int32_t>& more) {
  const sr::DecoderConfig& c = d.config();
  sr::KvCache cache(c.n_layers, c.n_kv_heads, c.head_dim, 512);
  const std::function<bool()> never = [] { return false; };
  std::vector<float> out, last(size_t(d.padded_vocab())), all(prompt.size() * size_t(c.n_vocab));
  const int n = int(prompt.size());
  const auto keep = [&] { out.insert(out.end(), last.begin(), last.begin() + c.n_vocab); };
  CHECK(d.forward(prompt.data(), n, 0, &cache, Logits::last, last.data(), never));
  keep();
  CHECK(d.forward(prompt.data(), n, n, &cache, Logits::none, nullptr, never));
  for (size_t i = 0; i < more.size(); i++) {
    CHECK(d.forward(&more[i], 1, 2 * n + int(i), &cache, Logits::last, last.data(), never));
    keep();
  }
  CHECK(d.forward(prompt.data(), n, 0, &cache, Logits::all, all.data(), never));
  out.insert(out.end(), all.begin(), all.end());
  return out;
}

TinySpec larger() {
  TinySpec s;
  s.n_layers = 5;
  s.n_embd = 192;
  s.n_ff = 512;
  s.n_vocab = 1000;
  return s;
}

std::vector<std::pair<const char*, TinySpec>> variants() {
  std::vector<std::pair<const char*, TinySpec>> v;
  const auto add = [&](const char* name, auto set) {
    TinySpec s = larger();
    set(s);
    v.push_back({name, s});
  };
  add("q4 with minima, tied", [](TinySpec&) {});
  add("scales that are products", [](TinySpec& s) { s.units = true; });
  add("untied, q8", [](TinySpec& s) { s.tied = false; s.kind = "q8"; s.has_min = false; });
  add("floats", [](TinySpec& s) { s.kind = "f16"; s.tied = false; });
  add("parts, biases, not gated", [](TinySpec& s) {
    s.qkv_in_parts = s.biases = true;
    s.gated = false;
    s.activation = "relu";
    s.n_embd = 160;
  });
  add("by neuron", [](TinySpec& s) { s.neurons = true; });
  add("by neuron, zeros", [](TinySpec& s) {
    s.neurons = s.biases = true;
    s.activation = "relu";
  });
  add("positions, norms of branches", [](TinySpec& s) {
    s.positions = s.post_norms = s.sub_norms = true;
    s.rope_style = "none";
    s.kinds = {{"ffn_down", "q6"}};
  });
  add("wide enough for stretches of columns", [](TinySpec& s) {
    s.n_layers = 2;
    s.n_embd = 320;
    s.n_ff = 6592;
    s.biases = true;
  });
  return v;
}

sr::ModelOptions with_budget(const std::string& path, size_t budget, int threads = 2) {
  sr::ModelOptions options;
  options.path = path;
  options.threads = threads;
  options.memory_budget = budget;
  options.n_ctx = 256;
  return options;
}

// A model of a few megabytes, and a budget under which most of it is streamed.
struct Streamed {
  Streamed() : tiny([] {
                 TinySpec s = larger();
                 s.n_layers = 24;
                 s.n_embd = 256;
                 s.n_ff = 1024;
                 return s;
               }()) {}
  size_t budget() const {
    const sr::Model all(with_budget(tiny.path(), size_t(2) << 30));
    const sr::MemoryStats m = all.memory();
    return m.floor - (size_t(2) << 30) / 1000 + (size_t(1) << 20);  // more while contexts are short
  }
  TinyModel tiny;
};

std::vector<int32_t> greedy(sr::Session& s, const std::vector<int32_t>& prompt, int n) {
  sr::SamplerOptions options;
  options.temperature = 0;
  sr::Sampler sampler(options);
  s.truncate(0);
  s.eval(prompt.data(), int(prompt.size()));
  std::vector<int32_t> out;
  for (int i = 0; i < n; i++) out.push_back(s.step(&sampler));
  return out;
}

size_t taken(const sr::MemoryStats& m) { return m.process + m.working + m.contexts + m.resident + m.ring; }

// Wraps every source that is opened while it lives.
struct Faults {
  Faults() {
    sr::wrap_sources([this](std::shared_ptr<sr::ByteSource> inner) {
      last = std::make_shared<FaultSource>(std::move(inner));
      return last;
    });
  }
  ~Faults() { sr::wrap_sources(nullptr); }
  std::shared_ptr<FaultSource> last;
};

ErrorCode code_of(const std::function<void()>& fn, std::string* text = nullptr) {
  try {
    fn();
  } catch (const Error& e) {
    if (text) *text = e.what();
    return e.code();
  }
  return ErrorCode::isa;  // nothing was thrown
}

}  // namespace

TEST_CASE("streamed equals resident bit for bit, for every kind of model, room and number of threads") {
  for (const auto& variant : variants()) {
    const TinyModel tiny(variant.second);
    Opened resident(tiny.path(), 1, 0);
    const auto prompt = some_tokens(37, variant.second.n_vocab), more = some_tokens(5, variant.second.n_vocab, 3);
    const std::vector<float> expected = run(resident.decoder, prompt, more);
    const size_t total = resident.packed->tensor_bytes();
    int partly = 0;
    for (int threads : {1, 2, 3}) {
      for (size_t percent : {1, 35, 60, 80, 97, 120}) {
        Opened streamed(tiny.path(), threads, std::max<size_t>(1, total * percent / 100));
        partly += streamed.streamed > 0;
        const std::vector<float> got = run(streamed.decoder, prompt, more);
        if (got.size() != expected.size() ||
            std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) != 0) {
          sr_test::fail(__FILE__, __LINE__, std::string(variant.first) + ", " + std::to_string(threads) + " threads, " +
                                                std::to_string(percent) + "%: other bits");
        }
      }
    }
    CHECK(partly >= 6);
  }
}

TEST_CASE("a budget is divided without a gap, and refused below its floor with the floor") {
  const Streamed model;
  const size_t budget = model.budget();
  const sr::Model opened(with_budget(model.tiny.path(), budget));
  const sr::MemoryStats m = opened.memory();
  CHECK(m.process + m.working + m.contexts + m.resident + m.ring <= budget);
  CHECK(m.streamed > 0);
  CHECK(m.resident > 0);
  CHECK_EQ(m.n_ctx, 256);
  std::string text;
  CHECK(code_of([&] { sr::Model(with_budget(model.tiny.path(), 1000000)); }, &text) == ErrorCode::budget);
  CHECK(text.find("below this model's floor of ") != std::string::npos);
  // What the text tells to use works.
  const size_t at = text.find("--memory-budget ") + 16;
  const size_t floor = size_t(std::atol(text.c_str() + at)) * 1000000 + 1000000;  // the process may have grown
  CHECK(sr::Model(with_budget(model.tiny.path(), floor)).memory().budget == floor);
  CHECK(code_of([&] { sr::Model(with_budget(model.tiny.path(), size_t(1) << 60)); }, &text) == ErrorCode::budget);
  CHECK(text.find("more than the") != std::string::npos);
}

TEST_CASE("what contexts and prompts do not use yet holds weights, which give way and come back, with the same bits") {
  const Streamed model;
  const auto prompt = some_tokens(250, 1000);
  sr::ModelOptions o;
  o.path = model.tiny.path();
  o.threads = 2;
  const sr::Model whole(o);
  sr::Session reference(whole, 300);
  const std::vector<int32_t> expected = greedy(reference, prompt, 30);
  sr::ModelOptions options = with_budget(model.tiny.path(), model.budget() + (size_t(2) << 20));
  options.n_ctx = 300;
  const sr::Model opened(options);
  const size_t at_first = opened.memory().resident;
  CHECK(opened.memory().streamed > 0);
  sr::Session s(opened, 300);
  CHECK_EQ(opened.memory().contexts, size_t(0));
  for (int round = 0; round < 2; round++) {
    s.truncate(0);
    s.eval(prompt.data(), 250);
    const sr::MemoryStats filled = opened.memory();
    CHECK(filled.contexts > 0);
    CHECK(filled.resident < at_first);
    CHECK(taken(filled) <= filled.budget);
    CHECK(greedy(s, prompt, 30) == expected);
    const sr::MemoryStats decoding = opened.memory();
    CHECK(decoding.resident > filled.resident);  // the memory of the prompt's block
    CHECK(taken(decoding) <= decoding.budget);
    s.truncate(0);
    CHECK_EQ(opened.memory().contexts, size_t(0));
    const int32_t one = 7;
    s.eval(&one, 1);
    CHECK(opened.memory().resident > decoding.resident);
  }
}

TEST_CASE("a context that becomes shorter gives its memory back, since weights take it, and keeps what is left of it") {
  constexpr int kLayers = 8, kHeads = 4, kDim = 128, kContext = 4096;
  sr::KvCache cache(kLayers, kHeads, kDim, kContext);
  std::vector<float> k(kDim), v(kDim);
  std::vector<uint16_t> scratch(kDim);
  const auto fill = [&] {
    for (int pos = 0; pos < kContext; pos++) {
      for (int i = 0; i < kDim; i++) k[size_t(i)] = float(pos % 100 + i), v[size_t(i)] = float(pos % 77);
      for (int l = 0; l < kLayers; l++) {
        for (int h = 0; h < kHeads; h++) cache.write(l, h, pos, k.data(), v.data(), scratch.data());
      }
    }
  };
  const size_t half = cache.bytes(kContext) / 2;
  fill();
  const std::vector<uint16_t> first(cache.k(7, 3, 0), cache.k(7, 3, 0) + 2 * kDim * sr::kAttentionChunk);
  const size_t full = sr::resident_memory();
  cache.keep(kContext / 2 - 100);  // a segment that is begun stays
  if (full && sr::kDiscardsPages) {
    const size_t now = sr::resident_memory(), slack = size_t(2) << 20;
    CHECK(now + half < full + slack);
    CHECK(now + half + slack > full);
    cache.keep(kContext / 2);
    CHECK(sr::resident_memory() + slack > now);
  }
  CHECK(std::equal(first.begin(), first.end(), cache.k(7, 3, 0)));
  fill();
  CHECK(sr::resident_memory() + (size_t(2) << 20) > full);
  cache.keep(0);
  if (full && sr::kDiscardsPages) CHECK(sr::resident_memory() < full - half);
}

TEST_CASE("what a caller sets aside leaves the weights and comes back to them, unless it is for good") {
  const Streamed model;
  const auto prompt = some_tokens(20, 1000);
  sr::Model opened(with_budget(model.tiny.path(), model.budget() + (size_t(2) << 20)));
  sr::Session s(opened, 256);
  const auto expected = greedy(s, prompt, 6);
  const sr::MemoryStats before = opened.memory();
  const size_t bytes = size_t(2) << 20;
  CHECK(before.resident > 2 * bytes);
  opened.set_aside(bytes);
  const sr::MemoryStats during = opened.memory();
  CHECK(taken(during) + bytes <= during.budget);
  CHECK(during.resident + bytes / 2 <= before.resident);
  CHECK(greedy(s, prompt, 6) == expected);
  CHECK(taken(opened.memory()) + bytes <= during.budget);
  opened.set_aside(0);
  CHECK(greedy(s, prompt, 6) == expected);
  CHECK(opened.memory().resident + bytes / 4 >= before.resident);
  opened.set_aside(bytes, true);
  opened.set_aside(0);
  CHECK(greedy(s, prompt, 6) == expected);
  CHECK(taken(opened.memory()) + bytes <= during.budget);
}

TEST_CASE("an error while weights come back ends the pass, and the next one works") {
  const Streamed model;
  const auto prompt = some_tokens(200, 1000);
  const size_t budget = model.budget();
  Faults faults;
  sr::Model opened(with_budget(model.tiny.path(), budget));
  sr::Session s(opened, 256);
  const auto expected = greedy(s, prompt, 8);
  for (int round = 0; round < 3; round++) {
    s.truncate(0);
    s.eval(prompt.data(), int(prompt.size()));
    sr::SamplerOptions greedily;
    greedily.temperature = 0;
    sr::Sampler sampler(greedily);
    faults.last->fail_with = EIO;
    std::string text;
    CHECK(code_of([&] { s.step(&sampler); }, &text) == ErrorCode::runtime);
    CHECK(text.find("cannot read") == 0);
    CHECK_EQ(s.n_past(), int(prompt.size()));
    faults.last->fail_with = 0;
    CHECK(greedy(s, prompt, 8) == expected);
  }
}

TEST_CASE("contexts beyond the budget are refused, and those that are closed make room") {
  const Streamed model;
  const sr::Model opened(with_budget(model.tiny.path(), model.budget()));
  std::string text;
  CHECK(code_of([&] { sr::Session(opened, 2048); }, &text) == ErrorCode::budget);
  CHECK(text.find("--ctx-size") != std::string::npos);
  {
    sr::Session first(opened, 256);
    CHECK(code_of([&] { sr::Session(opened, 256); }) == ErrorCode::budget);
  }
  sr::Session again(opened, 256);
}

TEST_CASE("an I/O error in the middle of a generation ends it with a clear text, and the next generation works") {
  const Streamed model;
  const auto prompt = some_tokens(40, 1000);
  sr::Model whole([&] {
    sr::ModelOptions o;
    o.path = model.tiny.path();
    o.threads = 2;
    return o;
  }());
  sr::Session reference(whole, 256);
  const std::vector<int32_t> expected = greedy(reference, prompt, 12);

  const size_t budget = model.budget();
  Faults faults;
  sr::Model opened(with_budget(model.tiny.path(), budget));
  sr::Session s(opened, 256);
  CHECK(opened.memory().streamed > 0);
  CHECK(greedy(s, prompt, 12) == expected);
  for (int when = 0; when < 6; when++) {
    sr::SamplerOptions options;
    options.temperature = 0;
    sr::Sampler sampler(options);
    s.truncate(0);
    std::vector<int32_t> got;
    std::string text;
    const ErrorCode code = code_of(
        [&] {
          if (when == 0) faults.last->fail_with = EIO;
          s.eval(prompt.data(), int(prompt.size()));
          for (int i = 1; i < 12; i++) {
            if (i == when) faults.last->fail_with = EIO;
            got.push_back(s.step(&sampler));
          }
        },
        &text);
    CHECK(code == ErrorCode::runtime);
    CHECK(text.find("cannot read") == 0);
    CHECK(text.find("weights.safetensors") != std::string::npos);
    CHECK(std::equal(got.begin(), got.end(), expected.begin()));  // no wrong token before the error
    CHECK_EQ(s.n_past(), when == 0 ? 0 : int(prompt.size() + got.size()));
    faults.last->fail_with = 0;
    CHECK(greedy(s, prompt, 12) == expected);
  }
  // Interrupted and short reads are nobody's business.
  faults.last->interrupt = 50;
  faults.last->halve = true;
  CHECK(greedy(s, prompt, 12) == expected);
}

TEST_CASE("a disk that is removed is told as that, at the start and in the middle, and what answers again works") {
  const Streamed model;
  const auto prompt = some_tokens(20, 1000);
  const size_t budget = model.budget();
  const std::string file = sr::PackedModel::weight_file(model.tiny.path());
  for (int error : {EIO, ENODEV, ENXIO, ESTALE}) {
    std::string text;
    const std::string expected =
        "cannot read " + file + ": " + std::strerror(error) + " (the disk that it lies on fails, or was removed)";
    // 0: the first read of all; more: after so many, among the weights.
    for (int64_t after : {0, 1, 4}) {
      std::shared_ptr<FaultSource> last;
      sr::wrap_sources([&](std::shared_ptr<sr::ByteSource> inner) {
        last = std::make_shared<FaultSource>(std::move(inner));
        last->on_read = [s = last.get(), after, error](uint64_t, size_t) {
          if (s->reads > after) s->fail_with = error;
        };
        return last;
      });
      CHECK(code_of([&] { sr::Model m(with_budget(model.tiny.path(), budget)); }, &text) == ErrorCode::runtime);
      CHECK_EQ(text, expected);
      sr::wrap_sources(nullptr);
    }
    Faults faults;
    sr::Model opened(with_budget(model.tiny.path(), budget));
    sr::Session s(opened, 256);
    const std::vector<int32_t> tokens = greedy(s, prompt, 6);
    sr::SamplerOptions greedily;
    greedily.temperature = 0;
    sr::Sampler sampler(greedily);
    s.truncate(0);
    s.eval(prompt.data(), int(prompt.size()));
    faults.last->fail_with = error;
    CHECK(code_of([&] { s.step(&sampler); }, &text) == ErrorCode::runtime);
    CHECK_EQ(text.find(expected), size_t(0));
    faults.last->fail_with = 0;
    CHECK(greedy(s, prompt, 6) == tokens);
  }
  const std::string full = model.tiny.path() + "/config.json/nothing";  // an error that is not the disk's
  std::string text;
  CHECK(code_of([&] { sr::open_direct(full); }, &text) == ErrorCode::model);
  CHECK(text.find(full) != std::string::npos && text.find("removed") == std::string::npos);
}

TEST_CASE("a file that is truncated or written to ends the generation, one that is replaced does not") {
  const Streamed model;
  const size_t budget = model.budget();
  const auto prompt = some_tokens(20, 1000);
  const std::string file = sr::PackedModel::weight_file(model.tiny.path());
  sr::Model opened(with_budget(model.tiny.path(), budget));
  sr::Session s(opened, 256);
  const auto expected = greedy(s, prompt, 6);
  std::ifstream in(file, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  // Replaced, as convert --force does it: the open file stays what it was.
  { std::ofstream(file + ".new", std::ios::binary) << std::string(bytes.size(), 'x'); }
  CHECK(std::rename((file + ".new").c_str(), file.c_str()) == 0);
  CHECK(greedy(s, prompt, 6) == expected);
  { std::ofstream(file, std::ios::binary) << bytes; }

  sr::Model second(with_budget(model.tiny.path(), model.budget()));
  CHECK(second.memory().streamed > 0);
  sr::Session t(second, 256);
  CHECK(greedy(t, prompt, 6) == expected);
  CHECK(truncate(file.c_str(), off_t(bytes.size() / 2)) == 0);
  std::string text;
  CHECK(code_of([&] { greedy(t, prompt, 6); }, &text) == ErrorCode::runtime);
  CHECK(text.find("has become shorter") != std::string::npos);
  { std::ofstream(file, std::ios::binary) << std::string(bytes.size(), 'y'); }
  CHECK(code_of([&] { greedy(t, prompt, 6); }, &text) == ErrorCode::runtime);
  CHECK(text.find("has been written to") != std::string::npos || text.find("not a number") != std::string::npos);
}

TEST_CASE("a stalled disk can be cancelled, and goes on where it was") {
  const Streamed model;
  const size_t budget = model.budget();
  const auto prompt = some_tokens(20, 1000);
  Faults faults;
  sr::Model opened(with_budget(model.tiny.path(), budget));
  sr::Session s(opened, 256);
  const auto expected = greedy(s, prompt, 6);
  for (int round = 0; round < 3; round++) {
    faults.last->stall();
    std::atomic<bool> ended{false};
    ErrorCode code = ErrorCode::isa;
    std::thread generation([&] {
      code = code_of([&] { greedy(s, prompt, 6); });
      ended = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    CHECK(!ended);
    const auto t0 = std::chrono::steady_clock::now();
    s.cancel();
    generation.join();
    CHECK(std::chrono::steady_clock::now() - t0 < std::chrono::seconds(5));
    CHECK(code == ErrorCode::cancelled);
    faults.last->go_on();
    CHECK(greedy(s, prompt, 6) == expected);
  }
}

TEST_CASE("opening fails cleanly: no permission, an error while reading, stopped by whoever waits") {
  const Streamed model;
  const size_t budget = model.budget();
  std::string text;
  {
    Faults faults;
    sr::ModelOptions options = with_budget(model.tiny.path(), budget);
    options.progress = [&](size_t, size_t) {
      faults.last->fail_with = EIO;
      return false;
    };
    sr::wrap_sources([&](std::shared_ptr<sr::ByteSource> inner) {
      faults.last = std::make_shared<FaultSource>(std::move(inner));
      faults.last->on_read = [&](uint64_t, size_t bytes) {
        if (bytes > 16 * sr::kReadAlign) faults.last->fail_with = EIO;  // not the header, but the weights
      };
      return faults.last;
    });
    CHECK(code_of([&] { sr::Model m(options); }, &text) == ErrorCode::runtime);
    CHECK(text.find("cannot read") == 0);
    options.progress = [](size_t, size_t) { return true; };
    sr::wrap_sources([&](std::shared_ptr<sr::ByteSource> inner) {
      faults.last = std::make_shared<FaultSource>(std::move(inner));
      faults.last->on_read = [&](uint64_t, size_t bytes) {
        if (bytes > 16 * sr::kReadAlign) std::this_thread::sleep_for(std::chrono::milliseconds(60));
      };
      return faults.last;
    });
    CHECK(code_of([&] { sr::Model m(options); }) == ErrorCode::cancelled);
  }
  const std::string file = sr::PackedModel::weight_file(model.tiny.path());
  CHECK(chmod(file.c_str(), 0) == 0);
  if (std::ifstream(file).good()) return;  // the superuser may read everything
  CHECK(code_of([&] { sr::Model m(with_budget(model.tiny.path(), budget)); }, &text) == ErrorCode::model);
  CHECK(text.find("Permission denied") != std::string::npos);
}
