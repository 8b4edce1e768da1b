// Kernels of every instruction set against generic, and generic against double precision.
#include "check.h"

#include <limits>
#include <set>

#include "random_panels.h"

using namespace sr;
using namespace sr_test;

namespace {

struct Shape {
  int rows, cols, panel_rows;
};
const Shape kShapes[] = {{64, 32, 64}, {100, 96, 128}, {192, 64, 128}, {576, 576, 320}, {1000, 352, 448}, {64, 40, 64}};
const Layout kLayouts[] = {
    {WeightKind::q4, 32, false}, {WeightKind::q4, 32, true}, {WeightKind::q4, 16, false}, {WeightKind::q4, 16, true},
    {WeightKind::q5, 32, false}, {WeightKind::q5, 32, true}, {WeightKind::q5, 16, true},  {WeightKind::q6, 16, false},
    {WeightKind::q6, 32, true},  {WeightKind::q6, 16, true}, {WeightKind::q8, 32, false}, {WeightKind::q8, 32, true},
    {WeightKind::q8, 16, false}, {WeightKind::q4, 32, true, true}, {WeightKind::q4, 16, true, true},
    {WeightKind::q4, 16, false, true}, {WeightKind::q5, 32, true, true}, {WeightKind::q6, 16, false, true},
    {WeightKind::q8, 32, false, true}};

template <class Fn>
void each_layout_and_shape(Fn fn) {
  std::mt19937 rng(7);
  for (const Layout& l : kLayouts)
    for (const Shape& s : kShapes)
      for (bool extreme : {false, true}) {
        RandomMatrix w(l.kind, s.rows, s.cols, l.group, l.min, s.panel_rows, rng, extreme, l.units);
        CHECK_EQ(w.pack_errors, 0);
        fn(w, rng, extreme);
      }
}

// Inputs that quantise to +-127 everywhere when extreme: the largest integer sums there are.
std::vector<float> inputs(size_t n, std::mt19937& rng, bool extreme) {
  std::vector<float> x = random_vector(n, rng);
  if (extreme) {
    const bool one_sign = rng() % 2;
    for (auto& v : x) v = one_sign || rng() % 2 ? 1.0f : -1.0f;
  }
  return x;
}

}  // namespace

TEST_CASE("half conversions: every half survives the round trip, rounding is to nearest even") {
  for (int h = 0; h < 65536; ++h) {
    const float f = f16_to_f32(uint16_t(h));
    if (f == f) CHECK_EQ(int(f32_to_f16(f)), h);
  }
  CHECK_EQ(int(f32_to_f16(65519.0f)), 0x7bff);
  CHECK_EQ(int(f32_to_f16(65520.0f)), 0x7c00);
  CHECK_EQ(int(f32_to_f16(1.0f + 1.0f / 2048)), 0x3c00);
  CHECK_EQ(int(f32_to_f16(1.0f + 3.0f / 2048)), 0x3c02);
  CHECK_EQ(int(f32_to_f16(3e-8f)), 1);
}

TEST_CASE("quantise: every ISA gives the bits of generic; error is at most half a step; NaN is not lost") {
  std::mt19937 rng(3);
  for (const KernelTable* k : runnable())
    for (int n : {32, 64, 40, 31, 577}) {
      std::vector<float> x = random_vector(n, rng, 3.0f);
      x[n / 2] = 100;
      if (n > 40) std::fill(x.begin(), x.begin() + 32, 0.0f);
      const Quantised a(generic(), x, n), b(*k, x, n);
      CHECK(a.q == b.q && a.sum == b.sum && same_bits(a.scale, b.scale));
      for (int i = 0; i < n; ++i) CHECK_NEAR(b.q[i] * b.scale[i / 32], x[i], b.scale[i / 32] * 0.501f);
      for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        x[n - 1] = bad;
        const Quantised c(*k, x, n);
        CHECK(c.scale[(n - 1) / 32] != c.scale[(n - 1) / 32]);
      }
    }
}

TEST_CASE("select: every ISA gives generic's mask, list and sums; what is kept is what exceeds the threshold") {
  std::mt19937 rng(4);
  for (const KernelTable* k : runnable())
    for (int n : {32, 64, 40, 1, 577})
      for (int density : {0, 30, 100, 101}) {
        const int stride = density < 101;  // 101: one threshold for all, and no more than one readable
        const std::vector<float> x = random_vector(n, rng);
        std::vector<float> t(stride ? n : 1);
        for (auto& v : t) v = density == 0 ? 100.0f : density == 100 ? 0.0f : 0.6f;
        Quantised a(generic(), x, n), b = a;
        const Quantised before = a;
        std::vector<uint8_t> ca(a.slabs * 32, 7), cb(a.slabs * 32, 9), na(a.slabs), nb(a.slabs);
        const int got = generic().select(x.data(), t.data(), stride, n, a.q.data(), a.sum.data(), ca.data(), na.data());
        CHECK_EQ(k->select(x.data(), t.data(), stride, n, b.q.data(), b.sum.data(), cb.data(), nb.data()), got);
        CHECK(a.q == b.q && a.sum == b.sum && na == nb);
        int listed = 0;
        for (int s = 0; s < a.slabs; ++s) {
          std::set<int> columns;
          for (int i = 0; i < na[s]; ++i) {
            CHECK_EQ(int(ca[s * 32 + i]), int(cb[s * 32 + i]));
            columns.insert(ca[s * 32 + i]);
          }
          listed += int(columns.size());
          for (int c = 0; c < 32; ++c) {
            const int j = s * 32 + c;
            const bool keep = j < n && std::fabs(x[j]) > t[size_t(j * stride)];
            CHECK_EQ(int(a.q[j]), keep ? int(before.q[j]) : 0);
            CHECK_EQ(columns.count(c) == 1, a.q[j] != 0);
          }
        }
        CHECK_EQ(listed, got);
        if (density == 100) CHECK(a.q == before.q && a.sum == before.sum);
        if (density == 0) CHECK_EQ(got, 0);
      }
}

TEST_CASE("gemv_q generic: equals double precision on the quantised vector, every layout") {
  each_layout_and_shape([](const RandomMatrix& w, std::mt19937& rng, bool extreme) {
    const PanelMatrix& m = w.view;
    const Quantised x(generic(), inputs(m.cols, rng, extreme), m.cols);
    std::vector<float> y(m.padded_rows(), 1e9f);
    generic().gemv_q(m, x.view(), 0, m.tiles(), y.data());
    for (int r = 0; r < m.rows; ++r) {
      double want = 0, size = 0;
      for (int c = 0; c < m.cols; ++c) {
        const double p = double(w.weights[size_t(r) * m.cols + c]) * x.q[c] * x.scale[c / 32];
        want += p;
        size += std::fabs(p);
      }
      CHECK_NEAR(y[r], want, 1e-5 * size + 1e-6);
    }
    for (int r = m.rows; r < m.padded_rows(); ++r) CHECK_EQ(y[r], 0.0f);
  });
}

TEST_CASE("gemv_q and gemm_q: every ISA gives the bits of generic, whole and in ranges of tiles") {
  each_layout_and_shape([](const RandomMatrix& w, std::mt19937& rng, bool extreme) {
    const PanelMatrix& m = w.view;
    const int n = 15;
    const Quantised x(generic(), inputs(size_t(n) * m.cols, rng, extreme), m.cols, n);
    const size_t ldy = m.padded_rows() + 64;
    std::vector<float> want(n * ldy, 0.5f);
    for (int v = 0; v < n; ++v)
      generic().gemv_q(m, {x.q.data() + size_t(v) * x.slabs * 32, x.scale.data() + size_t(v) * x.slabs,
                           x.sum.data() + size_t(v) * x.slabs * 2},
                       0, m.tiles(), want.data() + v * ldy);
    AlignedBuffer<uint8_t> scratch(gemm_scratch_bytes(m), "test scratch");
    for (const KernelTable* k : runnable()) {
      std::vector<float> y(n * ldy, 0.5f);
      const int cut = m.tiles() / 3;
      for (int v = 0; v < n; ++v) {
        const QuantVector one{x.q.data() + size_t(v) * x.slabs * 32, x.scale.data() + size_t(v) * x.slabs,
                              x.sum.data() + size_t(v) * x.slabs * 2};
        k->gemv_q(m, one, 0, cut, y.data() + v * ldy);
        k->gemv_q(m, one, cut, m.tiles(), y.data() + v * ldy);
      }
      CHECK(same_bits(y, want));
      std::fill(y.begin(), y.end(), 0.5f);
      k->gemm_q(m, x.view(), n, cut, m.tiles(), y.data(), ldy, scratch.data());
      k->gemm_q(m, x.view(), n, 0, cut, y.data(), ldy, scratch.data());
      CHECK(same_bits(y, want));
    }
  });
}

TEST_CASE("gemv_q_cols: equals gemv_q on the vector with the other columns zero, any mask, every ISA") {
  each_layout_and_shape([](const RandomMatrix& w, std::mt19937& rng, bool extreme) {
    const PanelMatrix& m = w.view;
    for (int density : {0, 5, 50, 90, 100}) {
      const std::vector<float> x = inputs(m.cols, rng, extreme);
      Quantised full(generic(), x, m.cols), masked = full;
      std::vector<uint8_t> cols(full.slabs * 32), count(full.slabs);
      std::fill(masked.sum.begin(), masked.sum.end(), 0);
      for (int c = 0; c < full.slabs * 32; ++c) {
        if (c < m.cols && int(rng() % 100) < density) {
          cols[c / 32 * 32 + count[c / 32]++] = uint8_t(c % 32);
          masked.sum[c / 16] += full.q[c];
        } else {
          masked.q[c] = 0;
        }
      }
      // The kernel must not look at inactive inputs: they hold their old values in `seen`.
      Quantised seen = full;
      seen.sum = masked.sum;
      std::vector<float> want(m.padded_rows());
      generic().gemv_q(m, masked.view(), 0, m.tiles(), want.data());
      const ColumnsApart apart(m, rng);
      std::vector<uint32_t> place(cols.size());
      for (int s = 0; s < full.slabs; ++s)
        for (int i = 0; i < count[s]; ++i) place[s * 32 + i] = apart.place[s * 32 + cols[s * 32 + i]];
      for (const KernelTable* k : runnable()) {
        std::vector<float> y(m.padded_rows(), 3.0f);
        k->gemv_q_cols(m, seen.view(), {cols.data(), count.data()}, 0, m.tiles(), y.data());
        for (auto& v : y) v += 0.0f;  // -0 and 0 are the same answer
        std::vector<float> w0 = want;
        for (auto& v : w0) v += 0.0f;
        CHECK(same_bits(y, w0));
        // Columns that are held apart: the same.
        std::vector<float> z(m.padded_rows(), 3.0f);
        k->gemv_q_cols(apart.view, seen.view(), {cols.data(), count.data(), place.data()}, 0, m.tiles(), z.data());
        for (auto& v : z) v += 0.0f;
        CHECK(same_bits(z, w0));
      }
    }
  });
}

TEST_CASE("gemv_f and gemm_f: every ISA gives the bits of generic; generic equals double precision") {
  std::mt19937 rng(5);
  for (WeightKind kind : {WeightKind::f32, WeightKind::f16, WeightKind::bf16})
    for (int cols : {8, 33, 172}) {
      const int rows = 200, n = 9;
      RandomMatrix w(kind, rows, cols, 32, false, 64, rng);
      const std::vector<float> x = random_vector(size_t(n) * cols, rng);
      const size_t ldy = w.view.padded_rows();
      std::vector<float> want(n * ldy);
      for (int v = 0; v < n; ++v) {
        generic().gemv_f(w.view, x.data() + v * cols, 0, w.view.tiles(), want.data() + v * ldy);
        for (int r = 0; r < rows; ++r) {
          double sum = 0;
          for (int c = 0; c < cols; ++c) sum += double(w.weights[r * cols + c]) * x[v * cols + c];
          CHECK_NEAR(want[v * ldy + r], sum, 1e-5);
        }
      }
      AlignedBuffer<uint8_t> scratch(gemm_scratch_bytes(w.view), "test scratch");
      for (const KernelTable* k : runnable()) {
        std::vector<float> y(n * ldy, 9.0f), z(n * ldy, 9.0f);
        for (int v = 0; v < n; ++v) k->gemv_f(w.view, x.data() + v * cols, 0, w.view.tiles(), y.data() + v * ldy);
        k->gemm_f(w.view, x.data(), cols, n, 0, w.view.tiles(), z.data(), ldy, scratch.data());
        CHECK(same_bits(y, want));
        CHECK(same_bits(z, want));
      }
    }
}

TEST_CASE("unpack_row: one row of a matrix of several panels") {
  std::mt19937 rng(6);
  for (bool units : {false, true}) {
    RandomMatrix w(WeightKind::q5, 300, 270, 32, true, 128, rng, false, units);
    std::vector<float> row(270);
    for (int r : {0, 63, 64, 127, 128, 255, 299}) {
      unpack_row(w.view, r, row.data());
      CHECK(!std::memcmp(row.data(), w.weights.data() + size_t(r) * 270, 270 * sizeof(float)));
    }
  }
}

TEST_CASE("norms: every ISA equals double precision") {
  std::mt19937 rng(8);
  for (const KernelTable* k : runnable())
    for (int n : {8, 64, 100, 577, 2048}) {
      const auto x = random_vector(n, rng, 5.0f), w = random_vector(n, rng), b = random_vector(n, rng);
      std::vector<float> y(n);
      double squares = 0, mean = 0, var = 0;
      for (float v : x) squares += double(v) * v, mean += v;
      mean /= n;
      for (float v : x) var += (v - mean) * (v - mean);
      k->rms_norm(x.data(), w.data(), n, 1e-5f, y.data());
      for (int i = 0; i < n; ++i) CHECK_NEAR(y[i], x[i] / std::sqrt(squares / n + 1e-5) * w[i], 1e-5);
      for (const float* bias : {b.data(), static_cast<const float*>(nullptr)}) {
        k->layer_norm(x.data(), w.data(), bias, n, 1e-5f, y.data());
        for (int i = 0; i < n; ++i)
          CHECK_NEAR(y[i], (x[i] - mean) / std::sqrt(var / n + 1e-5) * w[i] + (bias ? bias[i] : 0), 2e-5);
      }
    }
}

TEST_CASE("activations: every ISA equals double precision over the whole range; NaN stays NaN") {
  std::vector<float> g, u;
  for (float v = -120; v <= 120; v += 0.37f) g.push_back(v), u.push_back(1.5f);
  g.push_back(-0.0f), u.push_back(2.0f);
  const int n = int(g.size());
  const double s2 = std::sqrt(0.5), c = std::sqrt(2 / 3.14159265358979323846);
  for (const KernelTable* k : runnable())
    for (int a = 0; a < 5; ++a)
      for (bool gated : {true, false}) {
        std::vector<float> z(n);
        k->activate(Activation(a), g.data(), gated ? u.data() : nullptr, n, z.data());
        for (int i = 0; i < n; ++i) {
          const double x = g[i];
          const double want[] = {x / (1 + std::exp(-x)), 0.5 * x * (1 + std::tanh(c * (x + 0.044715 * x * x * x))),
                                 0.5 * x * (1 + std::erf(x * s2)), x > 0 ? x : 0, x > 0 ? x * x : 0};
          CHECK_NEAR(z[i], want[a] * (gated ? u[i] : 1), 3e-6 * (1 + std::fabs(x)) + 1e-6 * std::fabs(want[a]) * 1.5);
        }
        const float nan = std::numeric_limits<float>::quiet_NaN();
        std::vector<float> bad(40, nan), out(40, 0.0f);
        k->activate(Activation(a), bad.data(), nullptr, 37, out.data());
        for (int i = 0; i < 37; ++i) CHECK(out[i] != out[i]);
        for (int i = 37; i < 40; ++i) CHECK_EQ(out[i], 0.0f);
      }
}

TEST_CASE("attend: every ISA equals double precision; a row does not depend on the other rows") {
  std::mt19937 rng(9);
  AlignedBuffer<uint8_t> scratch(kAttendScratchBytes, "test scratch");
  for (const KernelTable* k : runnable())
    for (int hd : {8, 40, 64, 80, 128, 256})
      for (float cap : {0.0f, 20.0f}) {
        const int keys = 100 + int(rng() % 157), padded = (keys + 15) / 16 * 16, n_q = 1 + int(rng() % kMaxQueries);
        auto kf = random_vector(size_t(padded) * hd, rng), vf = random_vector(size_t(padded) * hd, rng);
        std::vector<uint16_t> kh(size_t(padded) * hd), vh(size_t(padded) * hd);
        for (int j = 0; j < padded; ++j)
          for (int d = 0; d < hd; ++d) {
            const uint16_t h = f32_to_f16(kf[size_t(j) * hd + d]);
            kh[(size_t(j / 16) * hd + d) * 16 + j % 16] = h;
            kf[size_t(j) * hd + d] = f16_to_f32(h);
            vh[size_t(j) * hd + d] = f32_to_f16(vf[size_t(j) * hd + d]);
            vf[size_t(j) * hd + d] = f16_to_f32(vh[size_t(j) * hd + d]);
          }
        const auto q = random_vector(size_t(n_q) * hd, rng, 3.0f);
        std::vector<int> first(n_q), last(n_q);
        for (int i = 0; i < n_q; ++i) {
          first[i] = rng() % 3 ? 0 : int(rng() % keys);
          last[i] = first[i] + int(rng() % (keys - first[i] + 1));
        }
        first[0] = last[0] = 3;  // sees nothing
        const float scale = 1.0f / std::sqrt(float(hd));
        std::vector<float> out(size_t(n_q) * (hd + 3), 7.0f), top(n_q), sum(n_q);
        AttendArgs a{q.data(), n_q, size_t(hd), hd, kh.data(), vh.data(), keys, first.data(), last.data(), scale, cap,
                     out.data(), size_t(hd + 3), top.data(), sum.data(), scratch.data()};
        k->attend(a);
        for (int i = 0; i < n_q; ++i) {
          const float* o = out.data() + size_t(i) * (hd + 3);
          CHECK_EQ(o[hd], 7.0f);
          if (first[i] == last[i]) {
            CHECK_EQ(sum[i], 0.0f);
            CHECK(top[i] < -1e38f);
            for (int d = 0; d < hd; ++d) CHECK_EQ(o[d], 0.0f);
            continue;
          }
          std::vector<double> s(keys), mix(hd);
          double best = -1e300, total = 0;
          for (int j = first[i]; j < last[i]; ++j) {
            for (int d = 0; d < hd; ++d) s[j] += double(q[size_t(i) * hd + d]) * kf[size_t(j) * hd + d];
            s[j] *= scale;
            if (cap > 0) s[j] = cap * std::tanh(s[j] / cap);
            best = std::max(best, s[j]);
          }
          for (int j = first[i]; j < last[i]; ++j) {
            total += std::exp(s[j] - best);
            for (int d = 0; d < hd; ++d) mix[d] += std::exp(s[j] - best) * vf[size_t(j) * hd + d];
          }
          CHECK_NEAR(top[i], best, 2e-5);
          CHECK_NEAR(sum[i], total, 1e-4 * total);
          for (int d = 0; d < hd; ++d) CHECK_NEAR(o[d] / sum[i], mix[d] / total, 1e-4);
          // Alone, the same bits.
          std::vector<float> alone(hd);
          float t1, s1;
          AttendArgs b = a;
          b.q = q.data() + size_t(i) * hd;
          b.n_q = 1;
          b.n_keys = last[i];
          b.first = &first[i];
          b.last = &last[i];
          b.out = alone.data();
          b.row_max = &t1;
          b.row_sum = &s1;
          k->attend(b);
          CHECK(t1 == top[i] && s1 == sum[i] && !std::memcmp(alone.data(), o, hd * sizeof(float)));
        }
      }
}

TEST_CASE("to_f16 and read_sum agree on every ISA") {
  std::mt19937 rng(10);
  const auto x = random_vector(103, rng, 1000.0f);
  std::vector<uint16_t> want(103), got(104, 5);
  generic().to_f16(x.data(), 103, want.data());
  std::vector<uint64_t> words(4096);
  for (auto& v : words) v = rng();
  for (const KernelTable* k : runnable()) {
    k->to_f16(x.data(), 103, got.data());
    CHECK(std::equal(want.begin(), want.end(), got.begin()));
    CHECK_EQ(int(got[103]), 5);
    CHECK_EQ(k->read_sum(words.data(), words.size() * 8), generic().read_sum(words.data(), words.size() * 8));
  }
}
