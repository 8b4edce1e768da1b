// The device's operations on vectors against the generic CPU kernels and plain sums, on random data: on a GPU, or
// emulated in CI.
#include "check.h"

#include <algorithm>
#include <limits>

#include "model/rope.h"
#include "on_device.h"

using namespace sr;
using namespace sr_test;

namespace {

constexpr double kClose = 4e-6;  // of numbers around 1: sums in another order, the device's own exp and tanh

}  // namespace

TEST_CASE("what a product multiplies: quantised, masked, counted and listed as generic does it") {
  cuda::Stream s;
  std::mt19937 rng = fresh(11);
  for (int width : {32, 75, 1100}) {
    auto x = random_vector(size_t(width), rng);
    for (int i = 40; i < std::min(width, 64); i++) x[size_t(i)] = 0;  // half a block of zeros
    std::vector<float> threshold(size_t(width), 0.0f);
    for (auto& t : threshold) t = 0.01f * float(rng() % 150);
    Quantised want(generic(), x, width);
    std::vector<uint8_t> cols(want.q.size()), count(size_t(want.slabs));
    const Quantised dense = want;
    const int kept = generic().select(x.data(), threshold.data(), 1, width, want.q.data(), want.sum.data(), cols.data(),
                                      count.data());
    in_every_order([&] {
      for (bool masked : {false, true}) {
        const DeviceInput in(s, x, 1, width, masked ? threshold : std::vector<float>());
        const cuda::Vectors& v = in.vectors.view();
        const Quantised& q = masked ? want : dense;
        CHECK(from_device(v.q, q.q.size()) == q.q);
        CHECK(from_device(v.scale, q.scale.size()) == q.scale);
        CHECK(from_device(v.sum, q.sum.size()) == q.sum);
        if (!masked) continue;
        CHECK_EQ(from_device(in.kept.data(), 1)[0], kept);
        const auto listed = from_device(v.listed, q.q.size());
        const auto at = from_device(v.cols, q.q.size()), n = from_device(v.count, 2 * size_t(q.slabs));
        for (int slab = 0; slab < q.slabs; slab++) {
          int i = 0;
          for (int half = 0; half < 2; half++) {
            const int here = n[size_t(2 * slab + half)], base = 32 * slab + 16 * half;
            for (int k = 0; k < (here + 3) / 4 * 4; k++) {
              const int column = at[size_t(base + k)], value = listed[size_t(base + k)];
              CHECK(column / 16 == half);
              if (k < here) CHECK_EQ(column, int(cols[size_t(32 * slab + i)]));
              CHECK_EQ(value, k < here ? int(q.q[size_t(32 * slab + column)]) : 0);
              i += k < here;
            }
          }
          CHECK_EQ(i, int(count[size_t(slab)]));
        }
      }
    });
  }
}

TEST_CASE("stream: branches with norms of their own are added, and the norm of the sum is made") {
  cuda::Stream s;
  std::mt19937 rng = fresh(12);
  for (int width : {96, 2500})
    for (bool layer : {false, true}) {
      const size_t n = size_t(width), rows = 3;
      const auto x = random_vector(rows * n, rng), y0 = random_vector(rows * n, rng), y1 = random_vector(rows * n, rng);
      const auto weight = random_vector(n, rng), bias = random_vector(n, rng), post = random_vector(n, rng);
      const auto norm = [&](const float* from, const std::vector<float>& w, const float* b, float* out) {
        if (layer) generic().layer_norm(from, w.data(), b, width, 1e-5f, out);
        else generic().rms_norm(from, w.data(), width, 1e-5f, out);
        for (int i = 0; !layer && b && i < width; i++) out[i] += b[i];
      };
      in_every_order([&] {
        const auto dx = on_device(x), d0 = on_device(y0), d1 = on_device(y1);
        const auto dw = on_device(weight), db = on_device(bias), dp = on_device(post);
        const cuda::DeviceVectors out(int(rows), width, "a test");
        const auto step = step_at(0);
        const cuda::NormType type = layer ? cuda::NormType::layer : cuda::NormType::rms;
        cuda::PrepareArgs a = {};
        a.x = dx.data();
        a.ldx = n;
        a.width = width;
        a.branch[0] = {d0.data(), n, {type, dp.data(), nullptr, 1e-5f}};
        a.branch[1] = {d1.data(), n, {cuda::NormType::none, nullptr, nullptr, 0}};
        a.residual_scale = 0.5f;
        a.norm = {type, dw.data(), db.data(), 1e-5f};
        a.out = out.view();
        a.quantise = 1;
        a.step = step.data();
        cuda::prepare(s, a, int(rows));
        s.wait("prepare");
        const auto sum = from_device(dx.data(), rows * n);
        const auto got = from_device(out.view().x, rows * size_t(out.view().padded));
        std::vector<float> scratch(n), stream(n), want(n);
        for (size_t r = 0; r < rows; r++) {
          norm(y0.data() + r * n, post, nullptr, scratch.data());
          for (size_t i = 0; i < n; i++) {
            stream[i] = x[r * n + i] + 0.5f * scratch[i];
            stream[i] += 0.5f * y1[r * n + i];
            CHECK_NEAR(sum[r * n + i], stream[i], kClose * 4);
          }
          norm(stream.data(), weight, bias.data(), want.data());
          for (size_t i = 0; i < n; i++) CHECK_NEAR(got[r * size_t(out.view().padded) + i], want[i], kClose * 8);
        }
      });
    }
}

TEST_CASE("embedding: rows of every kind of weight, with scale and learned positions") {
  cuda::Stream s;
  std::mt19937 rng = fresh(13);
  for (WeightKind kind : {WeightKind::q4, WeightKind::q5, WeightKind::q6, WeightKind::q8, WeightKind::f32,
                          WeightKind::f16, WeightKind::bf16})
    for (bool min : {false, true}) {
      if (min && !is_quantised(kind)) continue;
      RandomMatrix w(kind, 150, 70, min ? 16 : 32, min, is_quantised(kind) ? 128 : 64, rng);
      const cuda::DeviceMatrix device({w.view}, nullptr, "a test");
      const std::vector<int> tokens = {149, 0, 77, 128};
      const auto ids = on_device(tokens), zero = on_device(std::vector<int>{5, 6, 7});
      const auto positions = random_vector(10 * 70, rng);
      const auto table = on_device(positions);
      const auto step = step_at(3);
      const cuda::DeviceBuffer<float> x(4 * 70, "a test");
      cuda::EmbedArgs a = {};
      a.table = device.view();
      a.tokens = ids.data();
      a.step = step.data();
      a.position_embd = table.data();
      a.scale = 1.5f;
      a.x = x.data();
      a.zero = zero.data();
      a.n_zero = 3;
      cuda::embed(s, a, 4);
      s.wait("embed");
      const auto got = from_device(x.data(), 4 * 70);
      std::vector<float> row(70);
      for (int t = 0; t < 4; t++) {
        unpack_row(w.view, tokens[size_t(t)], row.data());
        for (int c = 0; c < 70; c++)
          CHECK_EQ(got[size_t(t * 70 + c)], row[size_t(c)] * 1.5f + positions[size_t((3 + t) * 70 + c)]);
      }
      for (int z : from_device(zero.data(), 3)) CHECK_EQ(z, 0);
    }
}

TEST_CASE("heads: rotated as the CPU rotates them, keys and values in the cache in fp16") {
  cuda::Stream s;
  std::mt19937 rng = fresh(14);
  for (bool interleaved : {false, true}) {
    const int n = 3, n_heads = 4, n_kv = 2, hd = 40, dims = 24, n_ctx = 20, pos = 7;
    const RopeStyle style = interleaved ? RopeStyle::interleaved : RopeStyle::half;
    const Rope rope(style, dims, 10000, nullptr, 1.25f);
    const size_t ld = size_t(n_heads + 2 * n_kv) * hd + 8;
    auto qkv = random_vector(size_t(n) * ld, rng);
    const auto weight = random_vector(size_t(hd), rng);
    std::vector<int> head_at;
    for (int h = 0; h < n_heads + 2 * n_kv; h++) head_at.push_back(h * hd + (h >= n_heads ? 8 : 0));
    const auto dq = on_device(qkv), dw = on_device(weight);
    const auto at = on_device(head_at);
    const auto frequency = on_device(rope.frequency());
    const auto step = step_at(pos);
    const cuda::DeviceBuffer<float> table(size_t(n) * dims, "a test");
    const auto k = on_device(std::vector<uint16_t>(size_t(n_kv) * n_ctx * hd, 0x7e00));
    const auto v = on_device(std::vector<uint16_t>(size_t(n_kv) * n_ctx * hd, 0x7e00));
    cuda::rope_tables(s, frequency.data(), dims / 2, 1.25f, step.data(), n, table.data());
    cuda::HeadsArgs a = {};
    a.cache = {k.data(), v.data(), n_ctx, n_heads, n_kv, hd, 0, 1, 0};
    a.qkv = dq.data();
    a.ld = ld;
    a.head_at = at.data();
    a.q_norm = {cuda::NormType::rms, dw.data(), nullptr, 1e-6f};
    a.rope_half = dims / 2;
    a.interleaved = interleaved;
    a.table = table.data();
    a.step = step.data();
    cuda::heads(s, a, n);
    s.wait("heads");
    const auto got = from_device(dq.data(), qkv.size());
    const auto keys = from_device(k.data(), size_t(n_kv) * n_ctx * hd),
               values = from_device(v.data(), size_t(n_kv) * n_ctx * hd);
    std::vector<float> cs(static_cast<size_t>(dims));
    for (int t = 0; t < n; t++) {
      rope.fill(pos + t, cs.data());
      for (int h = 0; h < n_heads + 2 * n_kv; h++) {
        float* head = qkv.data() + size_t(t) * ld + head_at[size_t(h)];
        if (h < n_heads) generic().rms_norm(head, weight.data(), hd, 1e-6f, head);
        if (h < n_heads + n_kv) rope.apply(cs.data(), head);
        for (int d = 0; d < hd; d++) {
          if (h < n_heads) CHECK_NEAR(got[size_t(t) * ld + size_t(head_at[size_t(h)] + d)], head[d], kClose * 2);
          else {
            const size_t kv = size_t(h - n_heads) % n_kv;
            const auto& cache = h < n_heads + n_kv ? keys : values;
            CHECK_NEAR(f16_to_f32(cache[(kv * n_ctx + size_t(pos + t)) * hd + size_t(d)]), head[d],
                       std::fabs(head[d]) * 6e-4 + 1e-6);
          }
        }
      }
    }
    CHECK_EQ(int(keys[size_t(pos + n) * hd]), 0x7e00);  // nothing beyond
  }
}

TEST_CASE("attention: equals the plain sum for any heads, block of queries, window and number of stretches") {
  cuda::Stream s;
  std::mt19937 rng = fresh(15);
  struct Shape {
    int n, pos, n_heads, n_kv, hd, window, splits;
    float cap;
  };
  for (const Shape& c :
       {Shape{1, 0, 2, 2, 8, 0, 1, 0}, Shape{1, 99, 4, 4, 64, 0, 3, 0}, Shape{1, 200, 6, 2, 80, 0, 5, 0},
        Shape{1, 150, 12, 2, 128, 37, 4, 5}, Shape{20, 45, 6, 2, 32, 0, 2, 0}, Shape{9, 3, 4, 1, 256, 5, 1, 0},
        Shape{1, 40, 35, 1, 16, 0, 9, 0}}) {
    const int n_ctx = c.pos + c.n, hd = c.hd;
    const size_t ld = size_t(c.n_heads * hd);
    const auto q = random_vector(size_t(c.n) * ld, rng);
    std::vector<uint16_t> k, v;
    for (float f : random_vector(size_t(c.n_kv * n_ctx * hd), rng)) k.push_back(f32_to_f16(f));
    for (float f : random_vector(size_t(c.n_kv * n_ctx * hd), rng)) v.push_back(f32_to_f16(f));
    std::vector<int> head_at;
    for (int h = 0; h < c.n_heads; h++) head_at.push_back(h * hd);
    const auto dq = on_device(q);
    const auto dk = on_device(k), dv = on_device(v);
    const auto at = on_device(head_at);
    const auto step = step_at(c.pos);
    const size_t slots = size_t(c.splits * c.n * c.n_heads);
    const float scale = 1 / std::sqrt(float(hd));
    in_every_order([&] {
      const cuda::DeviceBuffer<float> partial(slots * size_t(hd), "a test"), most(slots, "a test"),
          sum(slots, "a test");
      const cuda::DeviceVectors out(c.n, c.n_heads * hd, "a test");
      cuda::AttendArgs_ a = {{dk.data(), dv.data(), n_ctx, c.n_heads, c.n_kv, hd, c.window, scale, c.cap},
                             dq.data(), ld, at.data(), step.data(), c.splits, partial.data(), most.data(), sum.data()};
      cuda::attend(s, a, c.n);
      cuda::MergeArgs m = {partial.data(), most.data(), sum.data(), c.splits,   c.n_heads, hd,
                           out.view(),     1,           {},         step.data()};
      cuda::merge(s, m, c.n);
      s.wait("attention");
      const auto got = from_device(out.view().x, size_t(c.n) * size_t(out.view().padded));
      for (int t = 0; t < c.n; t++)
        for (int h = 0; h < c.n_heads; h++) {
          const int kv = h / (c.n_heads / c.n_kv), last = c.pos + t,
                    first = c.window ? std::max(0, last - c.window + 1) : 0;
          std::vector<double> p, want(static_cast<size_t>(hd));
          double total = 0;
          for (int j = first; j <= last; j++) {
            double dot = 0;
            for (int d = 0; d < hd; d++)
              dot += double(q[size_t(t) * ld + size_t(h * hd + d)]) *
                     f16_to_f32(k[(size_t(kv) * n_ctx + size_t(j)) * hd + size_t(d)]);
            dot *= scale;
            if (c.cap > 0) dot = c.cap * std::tanh(dot / c.cap);
            p.push_back(std::exp(dot));
            total += p.back();
          }
          for (int j = first; j <= last; j++)
            for (int d = 0; d < hd; d++)
              want[size_t(d)] +=
                  p[size_t(j - first)] / total * f16_to_f32(v[(size_t(kv) * n_ctx + size_t(j)) * hd + size_t(d)]);
          for (int d = 0; d < hd; d++)
            CHECK_NEAR(got[size_t(t) * size_t(out.view().padded) + size_t(h * hd + d)], want[size_t(d)], 2e-5);
        }
    });
  }
}

TEST_CASE("activations: every kind, gated or not, cut, and with a ReLU on up") {
  cuda::Stream s;
  std::mt19937 rng = fresh(16);
  const int n_ff = 192, n = 2;
  for (Activation act :
       {Activation::silu, Activation::gelu_tanh, Activation::gelu, Activation::relu, Activation::relu2})
    for (bool gated : {true, false}) {
      const size_t ld = size_t(n_ff) * (gated ? 2 : 1);
      const auto in = random_vector(size_t(n) * ld, rng, 2.0f);
      const auto device = on_device(in);
      const auto step = step_at(0);
      const cuda::DeviceVectors out(n, n_ff, "a test");
      cuda::ActivateArgs a = {};
      a.in = device.data();
      a.ld = ld;
      a.gated = gated;
      a.act = act;
      a.cut = 0.3f;
      a.up_relu = gated && act == Activation::relu;
      a.n_ff = n_ff;
      a.out = out.view();
      a.quantise = 1;
      a.step = step.data();
      cuda::activate(s, a, n);
      s.wait("activate");
      const auto got = from_device(out.view().x, size_t(n * n_ff));
      for (int t = 0; t < n; t++)
        for (int i = 0; i < n_ff; i++) {
          const float* at = in.data() + size_t(t) * ld + size_t(gated ? i / 64 * 128 + i % 64 : i);
          float g = *at < 0.3f ? 0.0f : *at, up = gated ? at[64] : 1, want;
          if (a.up_relu) up = std::max(up, 0.0f);
          generic().activate(act, &g, gated ? &up : nullptr, 1, &want);
          CHECK_NEAR(got[size_t(t * n_ff + i)], want, kClose * (1 + std::fabs(want)));
        }
    }
}

TEST_CASE("neurons that survive: activated in place, listed in order, the others 0") {
  cuda::Stream s;
  std::mt19937 rng = fresh(17);
  for (int n : {2500, 17000}) {  // of which a block takes 16384 at a time
    const auto gate = random_vector(size_t(n), rng);
    std::vector<float> threshold(static_cast<size_t>(n));
    for (auto& t : threshold) t = 0.01f * float(rng() % 80);
    const auto thresholds = on_device(threshold);
    const auto step = step_at(5);
    for (bool planned : {false, true})
      in_every_order([&] {
        const auto g = on_device(gate);
        const auto ids = on_device(std::vector<int>(size_t(n), -1)), count = on_device(std::vector<int>{0, 3});
        const cuda::Mask mask = {planned ? thresholds.data() : nullptr, nullptr, 5, count.data() + 1, 0};
        cuda::survivors(s, {g.data(), n, planned ? Activation::silu : Activation::relu, 0.0f, mask, step.data(),
                            ids.data(), count.data()});
        s.wait("survivors");
        const auto got = from_device(g.data(), size_t(n));
        const auto list = from_device(ids.data(), size_t(n)), counted = from_device(count.data(), 2);
        int k = 0;
        for (int i = 0; i < n; i++) {
          float want;
          generic().activate(planned ? Activation::silu : Activation::relu, &gate[size_t(i)], nullptr, 1, &want);
          const bool keep = std::fabs(want) > (planned ? threshold[size_t(i)] : 0.0f);
          CHECK_NEAR(got[size_t(i)], keep ? want : 0.0f, kClose);
          if (keep) CHECK_EQ(list[size_t(k++)], i);
        }
        CHECK_EQ(counted[0], k);
        CHECK_EQ(counted[1], k + 3);
      });
  }
}

TEST_CASE("logits: scaled, capped and checked; the most likely token is the first of the largest") {
  cuda::Stream s;
  std::mt19937 rng = fresh(18);
  const int n = 70000;
  auto logits = random_vector(size_t(n), rng);
  logits[12345] = logits[54321] = 30;
  in_every_order([&] {
    const auto device = on_device(logits);
    const auto bad = on_device(std::vector<int>{0}), token = on_device(std::vector<int>{-1});
    const cuda::DeviceBuffer<float> scratch(512, "a test");
    cuda::finish_logits(s, device.data(), size_t(n), n, 1, 0.5f, 20.0f, bad.data());
    cuda::argmax(s, device.data(), n, scratch.data(), token.data());
    s.wait("logits");
    CHECK_EQ(from_device(token.data(), 1)[0], 12345);
    CHECK_EQ(from_device(bad.data(), 1)[0], 0);
    const auto got = from_device(device.data(), size_t(n));
    for (int i = 0; i < n; i += 97)
      CHECK_NEAR(got[size_t(i)], 20 * std::tanh(logits[size_t(i)] * 0.5f / 20), kClose * 4);
  });
  for (float wrong : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto broken = logits;
    broken[69999] = wrong;
    const auto device = on_device(broken);
    const auto bad = on_device(std::vector<int>{0});
    cuda::finish_logits(s, device.data(), size_t(n), n, 1, 1, 0, bad.data());
    s.wait("logits");
    CHECK(from_device(bad.data(), 1)[0] != 0);
  }
}

TEST_CASE("the likeliest tokens: in order, whole, with the sum of all, and given up where too many are equal") {
  cuda::Stream s;
  std::mt19937 rng = fresh(19);
  for (int n : {1, 197, 300, 2500, 128256}) {
    auto logits = random_vector(size_t(n), rng, 3.0f);
    for (int i = 0; i + 7 < n; i += n / 20 + 1) logits[size_t(i + 7)] = logits[size_t(i)];  // equals, apart
    if (n > 200) logits[5] = 0.0f, logits[6] = -0.0f;
    if (n == 2500)
      for (auto& v : logits) v = std::round(v);  // a few hundred of each
    std::vector<int> ids(static_cast<size_t>(n));
    for (int i = 0; i < n; i++) ids[size_t(i)] = i;
    std::sort(ids.begin(), ids.end(), [&](int a, int b) {
      return logits[size_t(a)] != logits[size_t(b)] ? logits[size_t(a)] > logits[size_t(b)] : a < b;
    });
    double total = 0;
    for (float v : logits) total += std::exp(double(v - logits[size_t(ids[0])]));
    const auto device = on_device(logits);
    const cuda::DeviceBuffer<cuda::TopScratch> scratch(1, "a test");
    const cuda::DeviceBuffer<cuda::Top> top(1, "a test");
    const auto look = [&] {
      cuda::find_top(s, {device.data(), n, scratch.data(), top.data()});
      s.wait("the likeliest");
      const cuda::Top got = from_device(top.data(), 1)[0];
      CHECK_EQ(got.n, std::min(n, cuda::kTop));
      for (int i = 0; i < got.n; i++) {
        CHECK_EQ(got.id[i], ids[size_t(i)]);
        CHECK_EQ(got.logit[i], logits[size_t(ids[size_t(i)])]);
      }
      CHECK_NEAR(got.total, total, 1e-10 * total);
    };
    if (n > 5000) look();  // emulated, all orders of so many take seconds
    else in_every_order(look);
  }
  const auto same = on_device(std::vector<float>(5000, 1.5f));
  const cuda::DeviceBuffer<cuda::TopScratch> scratch(1, "a test");
  const cuda::DeviceBuffer<cuda::Top> top(1, "a test");
  cuda::find_top(s, {same.data(), 5000, scratch.data(), top.data()});
  s.wait("the likeliest");
  CHECK_EQ(from_device(top.data(), 1)[0].n, -1);
}
