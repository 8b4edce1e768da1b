// Matrices multiplied stretch by stretch of their columns: the same bits whoever makes which stretch.
#include "check.h"
#include "kernels/panels.h"
#include "model/linear.h"
#include "random_panels.h"

using namespace sr;
using namespace sr_test;

namespace {

const Layout kLayouts[] = {{WeightKind::q4, 32, false}, {WeightKind::q4, 16, true}, {WeightKind::q5, 32, true},
                           {WeightKind::q6, 16, false}, {WeightKind::q8, 32, true},
                           {WeightKind::q4, 32, true, true}, {WeightKind::q6, 16, false, true}};

PanelMatrix in_stretches(PanelMatrix m, int stretches) {
  m.set_stretches(stretches);
  return m;
}

// The vector with what lies outside the stretch set to 0.
Quantised only(const Quantised& x, const PanelMatrix& m, int k) {
  Quantised out = x;
  for (int s = 0; s < x.slabs; ++s) {
    if (s >= m.stretch_slab(k) && s < m.stretch_slab(k + 1)) continue;
    std::fill_n(out.q.begin() + s * kSlabCols, kSlabCols, int8_t(0));
    out.sum[size_t(2 * s)] = out.sum[size_t(2 * s + 1)] = 0;
  }
  return out;
}

// As select would leave it: columns kept at random, their list, and the vector without the others.
struct Masked {
  Quantised x;
  std::vector<uint8_t> cols, count;
  Masked(const Quantised& full, int percent, std::mt19937& rng)
      : x(full), cols(full.q.size()), count(size_t(full.slabs)) {
    std::fill(x.sum.begin(), x.sum.end(), 0);
    for (size_t c = 0; c < x.q.size(); ++c) {
      const size_t s = c / kSlabCols;
      if (int(rng() % 100) >= percent) x.q[c] = 0;
      if (x.q[c]) cols[s * kSlabCols + count[s]++] = uint8_t(c % kSlabCols);
      x.sum[c / 16] += x.q[c];
    }
  }
  ActiveColumns active() const { return {cols.data(), count.data()}; }
};

// -0 and 0 are the same answer.
std::vector<float> plain(std::vector<float> v) {
  for (float& x : v) x += 0.0f;
  return v;
}

template <class Fn>
void each_matrix(Fn fn) {
  std::mt19937 rng(17);
  for (const Layout& l : kLayouts) {
    for (int panel_rows : {320, 576}) {
      for (int stretches : {2, 3, 4}) {
        const RandomMatrix w(l.kind, 570, l.units ? 540 : 200, l.group, l.min, panel_rows, rng, false, l.units);
        fn(in_stretches(w.view, stretches), rng);
      }
    }
  }
}

Linear linear_in(const std::vector<const RandomMatrix*>& parts, const float* bias, int threads) {
  std::vector<PanelMatrix> views;
  for (const RandomMatrix* p : parts) views.push_back(p->view);
  Linear w = linear_of(std::move(views), bias);
  set_stretches(&w, column_stretches(w.rows, w.cols));
  set_shares(&w, threads, 1);
  return w;
}

}  // namespace

TEST_CASE("stretches: their number is the shape's; they hold every slab once") {
  CHECK_EQ(column_stretches(2048, 8192), 4);
  CHECK_EQ(column_stretches(2048, 255), 2);
  CHECK_EQ(column_stretches(2048, 224), 1);
  CHECK_EQ(column_stretches(12289, 4096), 1);
  CHECK_EQ(stretches_that_pay(2048, 8192), 4);
  CHECK_EQ(stretches_that_pay(576, 1536), 1);
  PanelMatrix m;
  for (int cols : {32, 96, 576, 11008}) {
    m.cols = cols;
    for (int stretches : {1, 2, 3, 4}) {
      const PanelMatrix s = in_stretches(m, stretches);
      CHECK_EQ(s.stretch_slab(0), 0);
      CHECK_EQ(s.stretch_slab(stretches), m.slabs());
      for (int k = 0; k < stretches; ++k) CHECK(s.stretch_slab(k) <= s.stretch_slab(k + 1));
    }
  }
}

TEST_CASE("stretches: sums are those of the vector without the other columns, dense and sparse, every ISA") {
  each_matrix([](const PanelMatrix& m, std::mt19937& rng) {
    const Quantised x(generic(), random_vector(size_t(m.cols), rng), m.cols);
    const size_t apart = size_t(m.padded_rows()) + 64;
    const int cut = m.tiles() / 2;
    for (int percent : {100, 40, 3}) {
      const Masked masked(x, percent, rng);
      std::vector<float> want(apart * size_t(m.stretches), 0.5f);
      for (int k = 0; k < m.stretches; ++k) {
        const Quantised part = only(masked.x, m, k);
        generic().gemv_q(in_stretches(m, 1), part.view(), 0, m.tiles(), want.data() + size_t(k) * apart);
      }
      for (const KernelTable* table : runnable()) {
        std::vector<float> dense(want.size(), 0.5f), sparse(want.size(), 0.5f), pieces(want.size(), 0.5f);
        const PanelMatrix all = m.some_stretches(0, m.stretches, apart);
        table->gemv_q(all, masked.x.view(), 0, m.tiles(), dense.data());
        table->gemv_q_cols(all, masked.x.view(), masked.active(), cut, m.tiles(), sparse.data());
        table->gemv_q_cols(all, masked.x.view(), masked.active(), 0, cut, sparse.data());
        for (int k = m.stretches - 1; k >= 0; --k) {
          const PanelMatrix one = m.some_stretches(k, k + 1, apart);
          table->gemv_q(one, masked.x.view(), cut, m.tiles(), pieces.data() + size_t(k) * apart);
          table->gemv_q(one, masked.x.view(), 0, cut, pieces.data() + size_t(k) * apart);
        }
        CHECK(same_bits(plain(dense), plain(want)));
        CHECK(same_bits(dense, pieces));
        CHECK(same_bits(plain(sparse), plain(want)));
      }
    }
  });
}

TEST_CASE("stretches: a block of vectors gives the sums of single ones, added in order, every ISA") {
  each_matrix([](const PanelMatrix& m, std::mt19937& rng) {
    const int n = 19;
    const Quantised x(generic(), random_vector(size_t(n) * size_t(m.cols), rng), m.cols, n);
    const size_t apart = size_t(m.padded_rows()), ldy = apart + 64;
    std::vector<float> want(size_t(n) * ldy, 0.5f), sums(apart * size_t(m.stretches));
    for (size_t v = 0; v < size_t(n); ++v) {
      const size_t slab = v * size_t(x.slabs);
      generic().gemv_q(m.some_stretches(0, m.stretches, apart),
                       {x.q.data() + slab * kSlabCols, x.scale.data() + slab, x.sum.data() + 2 * slab}, 0, m.tiles(),
                       sums.data());
      for (size_t r = 0; r < apart; ++r) {
        float y = sums[r];
        for (int k = 1; k < m.stretches; ++k) y += sums[size_t(k) * apart + r];
        want[v * ldy + r] = y;
      }
    }
    AlignedBuffer<uint8_t> scratch(gemm_scratch_bytes(m), "test scratch");
    for (const KernelTable* table : runnable()) {
      std::vector<float> y(want.size(), 0.5f);
      table->gemm_q(m, x.view(), n, 0, m.tiles(), y.data(), ldy, scratch.data());
      CHECK(same_bits(y, want));
    }
  });
}

TEST_CASE("stretches of a matrix in parts: any number of threads, tiles or stretches, one vector or many, same bits") {
  std::mt19937 rng(23);
  const int cols = 600;
  const RandomMatrix q(WeightKind::q4, 250, cols, 32, true, 192, rng);
  const RandomMatrix k(WeightKind::q6, 128, cols, 16, false, 128, rng);
  const std::vector<float> bias = random_vector(378, rng), values = random_vector(size_t(cols), rng);
  InputBuffer x;
  x.reset(1, cols, "a test");
  std::copy(values.begin(), values.end(), x.row(0));
  x.quantise(0);
  for (const float threshold : {-1.0f, 0.0f, 0.7f}) {
    Input in = x.input();
    if (threshold >= 0) {
      x.select(0, Thresholds{&threshold, 0}, 0, cols);
      in.active = x.active(0);
    }
    std::vector<float> first;
    for (int threads = 1; threads <= 9; ++threads) {
      const Linear w = linear_in({&q, &k}, bias.data(), threads);
      CHECK_EQ(w.stretches, 4);
      CHECK(w.in_partials());
      const int tiles = w.tiles();
      CHECK_EQ(w.unit_share.front(), 0);
      CHECK_EQ(w.unit_share.back(), 4 * tiles);
      std::vector<float> partial(size_t(w.partial_rows()), 9.0f), by_columns(size_t(w.padded_rows()), 9.0f);
      std::vector<float> by_rows(by_columns), block(by_columns);
      AlignedBuffer<uint8_t> scratch(std::max(gemm_scratch_bytes(q.view), gemm_scratch_bytes(k.view)), "a test");
      for (int t = threads - 1; t >= 0; --t) {
        const size_t i = size_t(t);
        CHECK(w.unit_share[i] <= w.unit_share[i + 1]);
        gemv_partial(w, in, w.unit_share[i], w.unit_share[i + 1], partial.data());
        gemv(w, in, w.share[i], w.share[i + 1], by_rows.data());
        if (w.share[i] < w.share[i + 1]) {
          gemm(w, x.input(), 1, w.share[i], w.share[i + 1], block.data(), block.size(), scratch.data());
        }
      }
      add_partials(w, partial.data(), by_columns.data());
      if (threads == 1) first = by_rows;
      CHECK(same_bits(by_rows, first));
      CHECK(same_bits(by_columns, first));
      CHECK(same_bits(plain(block), plain(first)));
    }
    // Threshold 0 keeps all: the bits of dense.
    if (threshold == 0.0f) {
      const Linear w = linear_in({&q, &k}, bias.data(), 2);
      std::vector<float> dense(size_t(w.padded_rows()));
      gemv(w, x.input(), 0, w.tiles(), dense.data());
      CHECK(same_bits(plain(dense), plain(first)));
    }
  }
}
