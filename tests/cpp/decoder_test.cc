// The forward pass on tiny random models: the same bits for any number of threads, for prompts in blocks and token by
// token, after truncation, after cancelling, and from two threads at once.
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "check.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"
#include "tiny_runs.h"
#include "tiny_variants.h"

using sr::Error;
using sr::ErrorCode;
using sr::Model;
using sr::Session;
using sr_test::in_blocks;
using sr_test::open_model;
using sr_test::same_bits;
using sr_test::some_tokens;
using sr_test::stepwise;
using sr_test::TinyModel;
using sr_test::TinySpec;
using sr_test::variants;

namespace {

std::vector<float> logits_of(const Session& s) { return std::vector<float>(s.logits(), s.logits() + s.n_vocab()); }

}  // namespace

TEST_CASE("decoder: the same bits for any number of threads, in prefill and in decode") {
  for (const sr_test::Named& v : variants()) {
    const TinyModel tiny(v.spec);
    const auto ids = some_tokens(37, v.spec.n_vocab);
    std::vector<float> prefill, decode;
    for (int threads : {1, 2, 3, 5}) {
      const Model model = open_model(tiny, threads);
      Session a(model, 64), b(model, 64);
      const auto p = in_blocks(a, ids), d = stepwise(b, ids);
      if (threads == 1) {
        prefill = p;
        decode = d;
      }
      if (!same_bits(p, prefill)) sr_test::fail(v.name.c_str(), threads, "prefill differs from one thread");
      if (!same_bits(d, decode)) sr_test::fail(v.name.c_str(), threads, "decode differs from one thread");
    }
    if (!same_bits(prefill, decode)) sr_test::fail(v.name.c_str(), 0, "prefill and decode differ");
    for (float x : prefill) CHECK(std::isfinite(x));
  }
}

TEST_CASE("decoder: long contexts, many blocks and chunks: prefill, decode, any cut of the prompt, same bits") {
  TinySpec spec;
  spec.more = "\"window\": [0, 300], ";
  const TinyModel tiny(spec);
  const auto ids = some_tokens(1300, spec.n_vocab);
  const Model model = open_model(tiny, 2), alone = open_model(tiny, 1);
  Session a(model, 1300), b(alone, 1300), c(model, 2000), d(model, 1300);
  a.eval(ids.data(), 1300);
  const auto want = logits_of(a);
  for (int32_t id : ids) b.eval(&id, 1);
  CHECK(same_bits(logits_of(b), want));
  std::mt19937 rng(9);
  for (int at = 0; at < 1300;) {
    const int n = std::min(1300 - at, int(rng() % 400) + 1);
    c.eval(ids.data() + at, n);
    at += n;
  }
  CHECK(same_bits(logits_of(c), want));
  const auto every = in_blocks(d, ids);
  CHECK(same_bits(std::vector<float>(every.end() - spec.n_vocab, every.end()), want));
  CHECK(same_bits(logits_of(d), want));
}

TEST_CASE("decoder: what follows depends on every earlier token, as far as the window reaches") {
  TinySpec spec;
  spec.kind = "f32";
  for (const bool windowed : {false, true}) {
    spec.more = windowed ? "\"window\": [10, 10], " : "";
    const TinyModel tiny(spec);
    const Model model = open_model(tiny, 2);
    auto ids = some_tokens(60, spec.n_vocab);
    Session a(model, 64);
    const auto before = in_blocks(a, ids);
    ids[5] = (ids[5] + 1) % spec.n_vocab;
    Session b(model, 64);
    const auto after = in_blocks(b, ids);
    const size_t width = size_t(spec.n_vocab);
    const auto row_equal = [&](size_t i) { return !std::memcmp(&before[i * width], &after[i * width], width * 4); };
    for (size_t i = 0; i < 5; i++) CHECK(row_equal(i));
    CHECK(!row_equal(5));
    CHECK(!row_equal(6));
    // Two layers of windows of 10 carry a change at most 18 positions further.
    CHECK_EQ(row_equal(23), false);
    for (size_t i = 24; i < 60; i++) CHECK_EQ(row_equal(i), windowed);
  }
}

TEST_CASE("session: truncating and going on equals a fresh start") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto first = some_tokens(300, spec.n_vocab, 1), second = some_tokens(120, spec.n_vocab, 2);
  for (int keep : {0, 1, 15, 16, 17, 128, 299}) {
    Session a(model, 1024), b(model, 1024);
    a.eval(first.data(), 300);
    a.truncate(keep);
    CHECK_EQ(a.n_past(), keep);
    CHECK_THROWS(a.logits(), Error, "evaluate tokens first");
    a.eval(second.data(), 120);
    if (keep) b.eval(first.data(), keep);
    b.eval(second.data(), 120);
    CHECK(same_bits(logits_of(a), logits_of(b)));
    auto tokens = std::vector<int32_t>(first.begin(), first.begin() + keep);
    tokens.insert(tokens.end(), second.begin(), second.end());
    CHECK(a.tokens() == tokens);
  }
  Session s(model, 16);
  CHECK_THROWS(s.truncate(1), Error, "cannot keep 1 of 0");
  CHECK_THROWS(s.truncate(-1), Error, "cannot keep -1");
}

TEST_CASE("session: cancelling a prompt keeps whole blocks, and the session goes on as if nothing had been") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(2000, spec.n_vocab);
  Session s(model, 2048);
  std::atomic<bool> started{false};
  std::thread other([&] {
    while (!started) std::this_thread::yield();
    while (s.n_past() < 256) std::this_thread::yield();
    s.cancel();
  });
  ErrorCode code = ErrorCode::runtime;
  started = true;
  try {
    s.eval(ids.data(), 2000);
  } catch (const Error& e) {
    code = e.code();
  }
  other.join();
  CHECK(code == ErrorCode::cancelled);
  const int kept = s.n_past();
  CHECK(kept >= 256 && kept < 2000 && kept % 256 == 0);
  CHECK(s.tokens() == std::vector<int32_t>(ids.begin(), ids.begin() + kept));
  CHECK_THROWS(s.logits(), Error, "evaluate tokens first");
  CHECK_EQ(s.stats().prompt_tokens, kept);
  s.eval(ids.data() + kept, 2000 - kept);
  Session fresh(model, 2048);
  fresh.eval(ids.data(), 2000);
  CHECK(same_bits(logits_of(s), logits_of(fresh)));
}

TEST_CASE("session: cancel before an evaluation stops that one only; a poll that says true stops like cancel") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(10, spec.n_vocab);
  Session s(model, 64);
  s.cancel();
  CHECK_THROWS(s.eval(ids.data(), 10), Error, "cancelled");
  CHECK_EQ(s.n_past(), 0);
  s.eval(ids.data(), 10);
  CHECK_EQ(s.n_past(), 10);
  std::this_thread::sleep_for(std::chrono::milliseconds(40));  // polls are at least 20 ms apart
  s.set_poll([] { return true; });
  CHECK_THROWS(s.eval(ids.data(), 10), Error, "cancelled");
  s.set_poll(nullptr);
  s.eval(ids.data(), 1);
  CHECK_EQ(s.n_past(), 11);
}

TEST_CASE("session: two sessions on one model from two threads do not disturb each other") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto body = [&](uint32_t seed, std::vector<float>* out) {
    const auto ids = some_tokens(200, spec.n_vocab, seed);
    Session s(model, 256);
    s.eval(ids.data(), 150);
    for (int i = 150; i < 200; i++) s.eval(&ids[size_t(i)], 1);
    *out = logits_of(s);
  };
  std::vector<float> alone[2], together[2];
  for (uint32_t i = 0; i < 2; i++) body(i + 1, &alone[i]);
  for (int round = 0; round < 5; round++) {
    std::thread a(body, 1, &together[0]), b(body, 2, &together[1]);
    a.join();
    b.join();
    CHECK(same_bits(alone[0], together[0]));
    CHECK(same_bits(alone[1], together[1]));
  }
}

TEST_CASE("session: outlives its model's handle") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  auto model = std::make_unique<Model>(open_model(tiny, 2));
  Session s(*model, 64);
  model.reset();
  const auto ids = some_tokens(20, spec.n_vocab);
  s.eval(ids.data(), 20);
  CHECK_EQ(s.n_past(), 20);
}

TEST_CASE("session: limits are told with their numbers and change nothing") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 1);
  Session s(model, 32);
  const auto ids = some_tokens(40, spec.n_vocab);
  CHECK_THROWS(s.eval(ids.data(), 33), Error, "0 cached and 33 new tokens do not fit into the context of 32");
  s.eval(ids.data(), 32);
  const auto before = logits_of(s);
  CHECK_THROWS(s.eval(ids.data(), 1), Error, "32 cached and 1 new");
  CHECK_EQ(s.n_past(), 32);
  CHECK(same_bits(logits_of(s), before));
  sr::SamplerOptions o;
  sr::Sampler sampler(o);
  CHECK_THROWS(s.step(&sampler), Error, "do not fit");
  s.truncate(0);
  const int32_t wrong[] = {0, spec.n_vocab}, negative[] = {-1};
  CHECK_THROWS(s.eval(wrong, 2), Error, "token 197 at index 1 is outside the vocabulary of 197");
  CHECK_THROWS(s.eval(negative, 1), Error, "token -1");
  CHECK_THROWS(s.eval(ids.data(), 0), Error, "no tokens");
  CHECK_EQ(s.n_past(), 0);
  CHECK_THROWS(Session(model, -1), Error, "n_ctx");
  CHECK_EQ(Session(model, 0).n_ctx(), spec.n_ctx);
  CHECK_THROWS(Session(model, 1 << 30), Error, "n_ctx");
}

TEST_CASE("session: learned positions end the context") {
  TinySpec spec;
  spec.positions = true;
  spec.rope_style = "none";
  spec.n_ctx = 50;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 1);
  CHECK_EQ(Session(model, 0).n_ctx(), 50);
  CHECK_THROWS(Session(model, 51), Error, "50 positions");
}

TEST_CASE("session: step samples, appends and counts; greedy decoding repeats") {
  const TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 2);
  const auto ids = some_tokens(10, spec.n_vocab);
  sr::SamplerOptions o;
  o.temperature = 0;
  const auto run = [&] {
    sr::Sampler sampler(o);
    Session s(model, 64);
    s.eval(ids.data(), 10);
    std::vector<int32_t> out;
    for (int i = 0; i < 20; i++) out.push_back(s.step(&sampler));
    CHECK_EQ(s.n_past(), 30);
    CHECK_EQ(s.stats().prompt_tokens, 10);
    CHECK_EQ(s.stats().decode_tokens, 20);
    CHECK(s.stats().decode_seconds > 0);
    const auto tokens = s.tokens();
    CHECK(std::equal(out.begin(), out.end(), tokens.begin() + 10));
    const auto l = logits_of(s);
    CHECK_EQ(s.sample(&sampler), int32_t(std::max_element(l.begin(), l.end()) - l.begin()));
    CHECK_EQ(s.n_past(), 30);
    return out;
  };
  CHECK(run() == run());
}

TEST_CASE("session: weights that are not numbers give an error, and the session stays usable") {
  TinySpec spec;
  spec.kind = "f32";
  const float nan = NAN;
  // One embedding row, which only the token that uses it meets; the head is another matrix.
  spec.tied = false;
  TinyModel broken(spec);
  std::string& table = broken.weights().tensors["token_embd"].data;
  std::memcpy(&table[0], &nan, 4);  // token 0, column 0
  broken.write();
  const Model model = open_model(broken, 2);
  Session s(model, 64);
  const int32_t good[] = {5, 6, 7}, bad[] = {5, 0, 7, 8};
  s.eval(good, 3);
  const auto want = logits_of(s);
  CHECK_THROWS(s.eval(bad, 4), Error, "not a number");
  CHECK_EQ(s.n_past(), 3);
  CHECK_THROWS(s.eval(&bad[1], 1), Error, "not a number");
  s.truncate(2);
  s.eval(&good[2], 1);
  CHECK(same_bits(logits_of(s), want));
  const int32_t more[] = {9, 10, 11};
  s.eval(more, 3);
}

TEST_CASE("session: memory of the cache grows with use, not with the context") {
  TinySpec spec;
  const TinyModel tiny(spec);
  const Model model = open_model(tiny, 1);
  Session s(model, 1 << 20);
  CHECK_EQ(s.kv_bytes(), size_t(0));
  const auto ids = some_tokens(20, spec.n_vocab);
  s.eval(ids.data(), 20);
  // layers, heads, k and v, fp16, head_dim; 20 tokens begin a segment of 128
  CHECK_EQ(s.kv_bytes(), size_t(2 * 2 * 2 * 2) * 16 * 128);
  const auto more = some_tokens(130, spec.n_vocab, 5);
  s.eval(more.data(), 130);
  CHECK_EQ(s.kv_bytes(), size_t(2 * 2 * 2 * 2) * 16 * 256);
  s.truncate(20);
  CHECK_EQ(s.kv_bytes(), size_t(2 * 2 * 2 * 2) * 16 * 128);
  s.truncate(0);
  CHECK_EQ(s.kv_bytes(), size_t(0));
}
