// What tests of whole models share: a tiny model opened, tokens for it, and its logits in one piece or token by token.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "sparse_run/engine.h"
#include "tiny_model.h"

namespace sr_test {

inline sr::Model open_model(const TinyModel& tiny, int threads) {
  sr::ModelOptions options;
  options.path = tiny.path();
  options.threads = threads;
  return sr::Model(options);
}

inline std::vector<int32_t> some_tokens(int n, int vocab, uint32_t seed = 11) {
  std::mt19937 rng(seed);
  std::vector<int32_t> ids;
  for (int i = 0; i < n; i++) ids.push_back(int32_t(rng() % uint32_t(vocab)));
  return ids;
}

// Logits of every token, all evaluated together.
inline std::vector<float> in_blocks(sr::Session& s, const std::vector<int32_t>& ids) {
  std::vector<float> out(ids.size() * size_t(s.n_vocab()));
  s.eval_all(ids.data(), int(ids.size()), out.data());
  return out;
}

// Logits of every token, one at a time.
inline std::vector<float> stepwise(sr::Session& s, const std::vector<int32_t>& ids) {
  std::vector<float> out;
  for (int32_t id : ids) {
    s.eval(&id, 1);
    out.insert(out.end(), s.logits(), s.logits() + s.n_vocab());
  }
  return out;
}

}  // namespace sr_test
