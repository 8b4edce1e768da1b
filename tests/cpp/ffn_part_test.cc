// FFNs cut in two: the parts' rows are the whole's, and down of the parts is down of the whole where the other part's
// inputs are 0, bit for bit; the rest's own forward pass against the whole model's layer.
#include "check.h"

#include <algorithm>

#include "format/packed_model.h"
#include "model/ffn_rest.h"
#include "tiny_variants.h"

using namespace sr;
using namespace sr_test;

namespace {

constexpr int kUnits = 5;

std::vector<float> random_row(int n, std::mt19937& rng) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = float(int(rng() % 2001) - 1000) / 500.0f;
  return x;
}

InputBuffer input_of(const std::vector<float>& x, bool quantised) {
  InputBuffer in;
  in.reset(1, int(x.size()), "a test", true);
  std::copy(x.begin(), x.end(), in.row(0));
  if (quantised) {
    in.quantise(0);
    in.order(0);
  }
  return in;
}

// gate and up, or up, of all neurons, in the order of the panels' rows.
std::vector<float> fed(const LayerWeights& w, const std::vector<float>& x) {
  InputBuffer in = input_of(x, w.ffn_in_quantised());
  if (!w.ffn_rows) {
    std::vector<float> y(size_t(w.ffn_in.padded_rows()));
    gemv(w.ffn_in, in.input(), 0, w.ffn_in.tiles(), y.data());
    return y;
  }
  const int n = w.ffn_rows.m.neurons;
  std::vector<float> gate(static_cast<size_t>(n)), up(static_cast<size_t>(n)), y;
  rows(w.ffn_rows, in, nullptr, 0, n, w.ffn_rows.m.gated ? gate.data() : nullptr, up.data());
  for (int i = 0; i < n; i += kTileRows) {
    if (w.ffn_rows.m.gated) y.insert(y.end(), gate.begin() + i, gate.begin() + i + kTileRows);
    y.insert(y.end(), up.begin() + i, up.begin() + i + kTileRows);
  }
  return y;
}

std::vector<float> down_of(const Linear& w, const std::vector<float>& z) {
  InputBuffer in = input_of(z, w.quantised);
  std::vector<float> y(size_t(w.padded_rows()));
  gemv(w, in.input(), 0, w.tiles(), y.data());
  y.resize(96);
  return y;
}

TinySpec wide(TinySpec spec, const std::string& kind = "") {
  spec.n_ff = kUnits * kTileRows;
  if (!kind.empty()) spec.kind = kind;
  return spec;
}

void check_parts(const TinySpec& spec, std::mt19937& rng) {
  const TinyModel tiny(spec);
  const PackedModel packed(tiny.path());
  const DecoderConfig c = read_decoder_config(packed);
  const DecoderWeights weights = load_weights(packed, c, 1);
  const std::vector<float> x = random_row(c.n_embd, rng), z = random_row(c.n_ff, rng);
  for (const LayerWeights& w : weights.layers) {
    const std::vector<float> all = fed(w, x);
    const size_t width = all.size() / kUnits;
    for (const std::vector<int>& units : {std::vector<int>{0, 1, 2, 3, 4}, {0, 1}, {1, 3, 4}, {4}}) {
      const FfnPart part(w, units, true);
      CHECK_EQ(part.neurons(), int(units.size()) * kTileRows);
      const std::vector<float> some = fed(part.weights(), x);
      std::vector<float> wanted, masked(z.size(), 0.0f);
      for (int u : units) {
        wanted.insert(wanted.end(), all.begin() + ptrdiff_t(size_t(u) * width),
                      all.begin() + ptrdiff_t(size_t(u + 1) * width));
        std::copy_n(z.begin() + u * kTileRows, kTileRows, masked.begin() + u * kTileRows);
      }
      CHECK(same_bits(some, wanted));
      CHECK(same_bits(down_of(part.weights().ffn_down, pick_neurons(units, z.data())), down_of(w.ffn_down, masked)));
      if (w.ffn_down.bias) CHECK(!FfnPart(w, units, false).weights().ffn_down.bias);
    }
  }
}

}  // namespace

TEST_CASE("parts of FFNs: every kind of weights, both layouts, every variant") {
  std::mt19937 rng(1);
  for (const char* kind : {"q4", "q5", "q6", "q8", "f16", "bf16", "f32"})
    for (bool neurons : {false, true})
      for (int group : {32, 16}) {
        TinySpec spec = wide(TinySpec(), kind);
        spec.neurons = neurons;
        spec.group = group;
        spec.n_layers = 1;
        check_parts(spec, rng);
      }
  for (const Named& v : variants()) check_parts(wide(v.spec), rng);
}

TEST_CASE("the rest of FFNs: parts add up to the whole layer, of one row and of many, with any number of threads") {
  std::mt19937 rng(2);
  for (const Named& v : variants()) {
    const TinyModel tiny(wide(v.spec));
    const PackedModel packed(tiny.path());
    const DecoderConfig c = read_decoder_config(packed);
    const DecoderWeights weights = load_weights(packed, c, 1);
    const LayerWeights& w = weights.layers[0];
    const int n = 7, ld = w.ffn_down.padded_rows();
    std::vector<float> x = random_row(n * c.n_embd, rng);
    const std::vector<int> all = {0, 1, 2, 3, 4};
    const auto run = [&](const std::vector<int>& units, bool bias, int threads, int rows) {
      FfnRest rest(c, threads, n);
      rest.add(0, FfnPart(w, units, bias));
      CHECK(rest.has(0) && !rest.has(1) && rest.bytes() > 0);
      std::vector<float> y(size_t(n * ld));
      FfnRest::Masks masks;
      masks.exact = true;
      for (int i = 0; i < n; i += rows) {
        rest.run(0, x.data() + i * c.n_embd, size_t(c.n_embd), rows, masks, y.data() + i * ld, size_t(ld));
      }
      return y;
    };
    const std::vector<float> whole = run(all, true, 1, n);
    CHECK(same_bits(whole, run(all, true, 3, n)));
    CHECK(same_bits(whole, run(all, true, 2, 1)));  // row by row
    if (w.ffn_sub_norm) continue;                   // which needs all neurons
    const std::vector<float> a = run({0, 3}, true, 2, n), b = run({1, 2, 4}, false, 3, n);
    CHECK(same_bits(b, run({1, 2, 4}, false, 2, 1)));
    for (size_t i = 0; i < whole.size(); i++) {
      if (int(i % size_t(ld)) < c.n_embd) CHECK_NEAR(a[i] + b[i], whole[i], 1e-4 * (1 + std::fabs(whole[i])));
    }
  }
}

TEST_CASE("the rest of FFNs: thresholds leave out inputs and neurons, and are counted") {
  std::mt19937 rng(3);
  for (bool neurons : {false, true}) {
    TinySpec spec = wide(TinySpec());
    spec.neurons = neurons;
    const TinyModel tiny(spec);
    const PackedModel packed(tiny.path());
    const DecoderConfig c = read_decoder_config(packed);
    const DecoderWeights weights = load_weights(packed, c, 1);
    FfnRest rest(c, 2, 4);
    rest.add(0, FfnPart(weights.layers[0], {1, 2}, false));
    const std::vector<float> x = random_row(4 * c.n_embd, rng);
    const size_t ld = size_t(weights.layers[0].ffn_down.padded_rows());
    std::vector<float> dense(4 * ld), first(4 * ld), masked(4 * ld), rows(4 * ld);
    const float in = 0.8f, gate = 0.2f, z = 0.1f, none = 0;
    FfnRest::Masks m;
    FfnRest::Kept kept = rest.run(0, x.data(), size_t(c.n_embd), 4, m, dense.data(), ld);
    CHECK_EQ(kept.gate + kept.z, 0);
    if (!neurons) m.in = {&in, 0};
    if (neurons) m.gate = {&gate, 0};
    m.z = {&z, 0};
    m.first = 1;
    kept = rest.run(0, x.data(), size_t(c.n_embd), 4, m, first.data(), ld);
    CHECK(std::equal(dense.begin(), dense.begin() + c.n_embd, first.begin()));  // the row before the first masked one
    CHECK(!std::equal(dense.begin() + ptrdiff_t(ld), dense.end(), first.begin() + ptrdiff_t(ld)));
    CHECK(kept.z > 0 && kept.z < 3 * 128);
    if (neurons) CHECK(kept.gate > 0 && kept.gate < 3 * 128);
    m.first = 0;
    int z_kept = 0, gate_kept = 0;
    for (float break_even : {0.0f, 1.0f}) {  // dense on the masked input, and by lists: the same bits
      m.break_even_in = m.break_even_z = break_even;
      z_kept = gate_kept = 0;
      for (int i = 0; i < 4; i++) {
        kept = rest.run(0, x.data() + i * c.n_embd, size_t(c.n_embd), 1, m, rows.data() + size_t(i) * ld, ld);
        z_kept += kept.z;
        gate_kept += kept.gate;
      }
      kept = rest.run(0, x.data(), size_t(c.n_embd), 4, m, masked.data(), ld);
      CHECK(same_bits(rows, masked));
      CHECK_EQ(kept.z, z_kept);
      CHECK_EQ(kept.gate, gate_kept);
    }
    m.z = {&none, 0};
    rest.run(0, x.data(), size_t(c.n_embd), 4, m, rows.data(), ld);
    CHECK(!same_bits(rows, masked));
  }
}
