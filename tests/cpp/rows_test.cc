// Rows of neurons: packing, and every instruction set against generic, generic against double precision.
#include "check.h"

#include <limits>
#include <numeric>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels/pack/rows.h"
#include "random_panels.h"
#include "sparse_run/error.h"

using namespace sr;
using namespace sr_test;

namespace {

const Layout kLayouts[] = {
    {WeightKind::q4, 32, false}, {WeightKind::q4, 32, true}, {WeightKind::q4, 16, false}, {WeightKind::q4, 16, true},
    {WeightKind::q5, 32, false}, {WeightKind::q5, 32, true}, {WeightKind::q5, 16, false}, {WeightKind::q5, 16, true},
    {WeightKind::q6, 32, false}, {WeightKind::q6, 32, true}, {WeightKind::q6, 16, false}, {WeightKind::q6, 16, true},
    {WeightKind::q8, 32, false}, {WeightKind::q8, 32, true}, {WeightKind::q8, 16, false}, {WeightKind::q8, 16, true}};
const WeightKind kFloats[] = {WeightKind::f32, WeightKind::f16, WeightKind::bf16};

// Bytes whose end is the end of what may be read.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (bytes + page - 1) / page * page;
    size_ = body + page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + body, page, PROT_NONE)) throw std::bad_alloc();
    data = base_ + body - bytes;
#else
    heap_.resize(bytes + 64);
    data = heap_.data() + (64 - reinterpret_cast<uintptr_t>(heap_.data()) % 64) % 64;
#endif
  }
  ~Guarded() {
#if defined(__unix__) || defined(__APPLE__)
    munmap(base_, size_);
#endif
  }
  Guarded(const Guarded&) = delete;
  uint8_t* data;

 private:
  uint8_t* base_ = nullptr;
  size_t size_ = 0;
  std::vector<uint8_t> heap_;
};

NeuronMatrix shape_of(WeightKind kind, int group, bool min, int neurons, int cols, bool gated) {
  NeuronMatrix m;
  m.kind = kind;
  m.group = group;
  m.has_min = min;
  m.neurons = neurons;
  m.cols = cols;
  m.gated = gated;
  return m;
}

struct RandomNeurons {
  NeuronMatrix view;
  Guarded bytes;
  std::vector<float> weights;  // [rows, cols], rows in the order of the records
  int rows;

  RandomNeurons(NeuronMatrix shape, std::mt19937& rng, bool extreme = false)
      : view(shape), bytes(shape.total_bytes()), rows(shape.neurons * (shape.gated ? 2 : 1)) {
    std::memset(bytes.data, 0xAA, view.total_bytes());
    weights.resize(size_t(rows) * view.cols);
    if (is_quantised(view.kind)) {
      const int top = (1 << code_bits(view.kind)) - 1, groups = (view.cols + view.group - 1) / view.group;
      std::vector<uint8_t> codes(weights.size());
      std::vector<uint16_t> scales(size_t(rows) * groups), mins(scales.size());
      for (auto& c : codes) c = uint8_t(extreme ? (rng() % 8 ? 1 : 0) * top : rng() % (top + 1));
      for (auto& s : scales) s = f32_to_f16(0.001f + 0.01f * float(rng() % 1000) / 1000.0f);
      for (auto& m : mins) m = f32_to_f16(-0.1f + 0.1f * float(rng() % 1000) / 1000.0f);
      pack_neurons(view, codes.data(), scales.data(), view.has_min ? mins.data() : nullptr, bytes.data);
      for (size_t i = 0; i < weights.size(); ++i) {
        const size_t g = i / view.cols * groups + i % view.cols / view.group;
        const float s = f16_to_f32(scales[g]), u = float(codes[i]);
        weights[i] = view.has_min ? std::fma(s, u, f16_to_f32(mins[g])) : s * (u - float(code_bias(view.kind)));
      }
    } else {
      for (auto& v : weights) v = (float(rng() % 2001) - 1000.0f) / 10000.0f;
      pack_neurons_float(view, weights.data(), bytes.data);
      for (auto& v : weights) {
        if (view.kind == WeightKind::f16) v = f16_to_f32(f32_to_f16(v));
        if (view.kind == WeightKind::bf16) v = bf16_to_f32(f32_to_bf16(v));
      }
    }
    view.data = bytes.data;
  }
  const float* row(int neuron, bool up) const {
    return weights.data() + size_t(view.gated ? 2 * neuron + (up ? 1 : 0) : neuron) * view.cols;
  }
};

// Vectors quantised and put in the rows' order.
struct Ordered {
  Quantised plain;
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  int stripes;

  Ordered(const std::vector<float>& x, int cols, int vectors = 1) : plain(generic(), x, cols, vectors) {
    stripes = (cols + kStripeCols - 1) / kStripeCols;
    q.assign(size_t(vectors) * stripes * kStripeCols, 99);
    scale.assign(size_t(vectors) * stripes * kRowLanes, 9.0f);
    sum.assign(size_t(vectors) * stripes * 2 * kRowLanes, 9);
    for (int v = 0; v < vectors; ++v) {
      const size_t at = size_t(v) * plain.slabs, to = size_t(v) * stripes;
      order_for_rows({plain.q.data() + at * 32, plain.scale.data() + at, plain.sum.data() + at * 2}, cols,
                     q.data() + to * kStripeCols, scale.data() + to * kRowLanes, sum.data() + to * 2 * kRowLanes);
    }
  }
  RowVector view(int v = 0) const {
    const size_t at = size_t(v) * stripes;
    return {q.data() + at * kStripeCols, scale.data() + at * kRowLanes, sum.data() + at * 2 * kRowLanes};
  }
};

// Inputs that quantise to +-127 everywhere when extreme: the largest integer sums there are.
std::vector<float> inputs(size_t n, std::mt19937& rng, bool extreme) {
  std::vector<float> x = random_vector(n, rng);
  if (extreme) {
    const int kind = int(rng() % 3);
    for (auto& v : x) v = kind == 0 ? 1.0f : kind == 1 ? -1.0f : rng() % 2 ? 1.0f : -1.0f;
  }
  return x;
}

constexpr int kWidths[] = {8, 32, 40, 96, 256, 512, 544, 576, 1000, 1024, 1312, 2048};

template <class Fn>
void each_quantised(Fn fn) {
  std::mt19937 rng(11);
  for (const Layout& l : kLayouts)
    for (int cols : kWidths)
      for (bool extreme : {false, true}) {
        const bool gated = rng() % 3 != 0;
        RandomNeurons w(shape_of(l.kind, l.group, l.min, 5 + int(rng() % 60), cols, gated), rng, extreme);
        fn(w, rng, extreme);
      }
}

std::vector<int32_t> random_list(int neurons, int percent, std::mt19937& rng) {
  std::vector<int32_t> ids;
  for (int i = 0; i < neurons; ++i)
    if (int(rng() % 100) < percent) ids.push_back(i);
  if (rng() % 2) std::shuffle(ids.begin(), ids.end(), rng);  // any order is allowed
  return ids;
}

}  // namespace

TEST_CASE("sizes: a 4-bit neuron of width 2048 is two rows of 1152 bytes; blocks of 64 neurons are whole") {
  NeuronMatrix m = shape_of(WeightKind::q4, 32, false, 3, 2048, true);
  CHECK_EQ(m.row_bytes(), size_t(1152));
  CHECK_EQ(m.record_bytes(), size_t(2304));
  CHECK_EQ(m.total_bytes(), size_t(64 * 2304));
  CHECK_EQ(m.offset_of(2), size_t(2 * 1152));
  CHECK_EQ(m.up_offset(), size_t(64 * 1152));
  m.neurons = 65;
  CHECK_EQ(m.total_bytes(), size_t(128 * 2304));
  CHECK_EQ(m.offset_of(64), size_t(64 * 2304));
  m = shape_of(WeightKind::q6, 16, true, 3, 576, true);  // 432 codes, 72 scales, 72 minima
  CHECK_EQ(m.row_bytes(), size_t(576));
  m = shape_of(WeightKind::q4, 32, true, 3, 576, true);  // 288 + 36 + 36 = 360
  CHECK_EQ(m.row_bytes(), size_t(368));
  CHECK_EQ(m.record_bytes(), size_t(768));
  m.gated = false;
  CHECK_EQ(m.record_bytes(), size_t(384));
  CHECK_EQ(m.up_offset(), size_t(0));
  for (WeightKind k : kFloats)
    for (int cols : {1, 8, 33}) CHECK_EQ(shape_of(k, 32, false, 1, cols, true).record_bytes() % 64, size_t(0));
}

TEST_CASE("pack_neurons: unpacking gives back what codes, scales and minima say; padding is zero") {
  each_quantised([](const RandomNeurons& w, std::mt19937&, bool) {
    std::vector<float> got(w.weights.size());
    unpack_neurons(w.view, got.data());
    CHECK(same_bits(got, w.weights));
    const size_t used = w.view.code_bytes() + w.view.scale_bytes() * (w.view.has_min ? 2 : 1);
    for (int i = 0; i < w.view.neurons; ++i) {
      const uint8_t* up = w.view.data + w.view.offset_of(i) + w.view.up_offset();
      for (size_t b = used; b < w.view.row_stride(); ++b) CHECK_EQ(int(up[b]), 0);
    }
  });
  std::mt19937 rng(1);
  for (WeightKind k : kFloats)
    for (bool gated : {false, true}) {
      RandomNeurons w(shape_of(k, 32, false, 9, 37, gated), rng);
      std::vector<float> got(w.weights.size());
      unpack_neurons(w.view, got.data());
      CHECK(same_bits(got, w.weights));
    }
  uint8_t code = 0;
  CHECK_THROWS(pack_neurons(shape_of(WeightKind::f32, 32, false, 1, 1, false), &code, nullptr, nullptr, &code), Error,
               "");
}

TEST_CASE("order_for_rows: lane l of chunk v holds inputs 32 l + 4 v of the stripe; missing lanes are zero") {
  std::mt19937 rng(2);
  for (int cols : kWidths) {
    const Ordered x(inputs(cols, rng, false), cols);
    for (int c = 0; c < x.stripes * kStripeCols; ++c) {
      const int lane = c % 512 / 32, chunk = c % 32 / 4, slab = c / 32;
      const bool there = slab < x.plain.slabs;
      CHECK_EQ(int(x.q[c / 512 * 512 + (chunk * 16 + lane) * 4 + c % 4]), there ? int(x.plain.q[c]) : 0);
      CHECK_EQ(x.scale[c / 512 * 16 + lane], there ? x.plain.scale[slab] : 0.0f);
      for (int p = 0; p < 2; ++p)
        CHECK_EQ(x.sum[(c / 512 * 2 + p) * 16 + lane], there ? x.plain.sum[2 * slab + p] : 0);
    }
  }
}

TEST_CASE("rows_q generic: equals double precision on the quantised vector, every layout") {
  each_quantised([](const RandomNeurons& w, std::mt19937& rng, bool extreme) {
    const NeuronMatrix& m = w.view;
    const Ordered x(inputs(m.cols, rng, extreme), m.cols);
    std::vector<float> gate(m.neurons), up(m.neurons);
    generic().rows_q(m, x.view(), nullptr, 0, m.neurons, m.gated ? gate.data() : nullptr, up.data());
    for (int i = 0; i < m.neurons; ++i)
      for (bool is_up : {false, true}) {
        if (!is_up && !m.gated) continue;
        double want = 0, size = 0;
        for (int c = 0; c < m.cols; ++c) {
          const double p = double(w.row(i, is_up)[c]) * x.plain.q[c] * x.plain.scale[c / 32];
          want += p;
          size += std::fabs(p);
        }
        CHECK_NEAR(is_up ? up[i] : gate[i], want, 1e-6 * size + 1e-6);
      }
  });
}

TEST_CASE("rows_q: every ISA gives the bits of generic, for all neurons, ranges and any list; gate or up alone too") {
  each_quantised([](const RandomNeurons& w, std::mt19937& rng, bool extreme) {
    const NeuronMatrix& m = w.view;
    const Ordered x(inputs(m.cols, rng, extreme), m.cols);
    const int n = m.neurons;
    std::vector<float> gate(n), up(n);
    generic().rows_q(m, x.view(), nullptr, 0, n, m.gated ? gate.data() : nullptr, up.data());
    std::vector<int32_t> all(n);
    std::iota(all.begin(), all.end(), 0);
    for (const KernelTable* k : runnable()) {
      for (const int32_t* ids : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(all.data())}) {
        std::vector<float> g(n), u(n);
        const int cut = int(rng() % (n + 1));
        k->rows_q(m, x.view(), ids, cut, n, m.gated ? g.data() : nullptr, u.data());
        k->rows_q(m, x.view(), ids, 0, cut, m.gated ? g.data() : nullptr, u.data());
        CHECK(same_bits(g, gate) && same_bits(u, up));
      }
      for (int percent : {0, 10, 50, 90}) {
        const std::vector<int32_t> ids = random_list(n, percent, rng);
        const int count = int(ids.size()), begin = count / 5, end = count - count / 7;
        std::vector<float> want_g(n, 7.0f), want_u(n, 7.0f);
        for (int i = begin; i < end; ++i) {
          want_g[i] = gate[ids[i]];
          want_u[i] = up[ids[i]];
        }
        std::vector<float> g(n, 7.0f), u(n, 7.0f);
        if (m.gated) {
          k->rows_q(m, x.view(), ids.data(), begin, end, g.data(), u.data());
          CHECK(same_bits(g, want_g) && same_bits(u, want_u));
          std::fill(g.begin(), g.end(), 7.0f);
          k->rows_q(m, x.view(), ids.data(), begin, end, g.data(), nullptr);
          CHECK(same_bits(g, want_g));
        }
        std::fill(u.begin(), u.end(), 7.0f);
        k->rows_q(m, x.view(), ids.data(), begin, end, nullptr, u.data());
        CHECK(same_bits(u, want_u));
        k->rows_q(m, x.view(), ids.data(), begin, end, nullptr, nullptr);
      }
    }
  });
}

TEST_CASE("rows_gemm_q: n vectors give the bits of n calls of rows_q, every ISA") {
  each_quantised([](const RandomNeurons& w, std::mt19937& rng, bool extreme) {
    const NeuronMatrix& m = w.view;
    const int n = 1 + int(rng() % 16), neurons = m.neurons;
    const Ordered x(inputs(size_t(n) * m.cols, rng, extreme), m.cols, n);
    const size_t ldy = neurons + 3;
    const std::vector<int32_t> list = random_list(neurons, 60, rng);
    for (const int32_t* ids : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(list.data())}) {
      const int end = ids ? int(list.size()) : neurons, begin = end / 4;
      std::vector<float> gate(n * ldy, 7.0f), up(n * ldy, 7.0f);
      for (int v = 0; v < n; ++v)
        generic().rows_q(m, x.view(v), ids, begin, end, m.gated ? gate.data() + v * ldy : nullptr, up.data() + v * ldy);
      AlignedBuffer<uint8_t> scratch(rows_scratch_bytes(m), "test scratch");
      for (const KernelTable* k : runnable()) {
        std::vector<float> g(n * ldy, 7.0f), u(n * ldy, 7.0f);
        k->rows_gemm_q(m, x.view(), n, ids, begin, end, m.gated ? g.data() : nullptr, u.data(), ldy, scratch.data());
        CHECK(same_bits(g, gate) && same_bits(u, up));
        if (!m.gated) continue;
        std::fill(g.begin(), g.end(), 7.0f);
        k->rows_gemm_q(m, x.view(), n, ids, begin, end, g.data(), nullptr, ldy, scratch.data());
        CHECK(same_bits(g, gate));
      }
    }
  });
}

TEST_CASE("rows_q: a vector that holds NaN or tiny numbers gives the same bits everywhere") {
  std::mt19937 rng(12);
  RandomNeurons w(shape_of(WeightKind::q4, 32, true, 20, 576, true), rng);
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<float> values = random_vector(576, rng);
    if (kind == 0) values[570] = std::numeric_limits<float>::quiet_NaN();
    if (kind == 1)
      for (auto& v : values) v *= 1e-36f;
    if (kind == 2)
      for (auto& v : values) v *= 1e-44f;  // sums underflow to -0 and 0
    const Ordered x(values, 576);
    std::vector<float> gate(20), up(20), g(20), u(20);
    generic().rows_q(w.view, x.view(), nullptr, 0, 20, gate.data(), up.data());
    for (const KernelTable* k : runnable()) {
      k->rows_q(w.view, x.view(), nullptr, 0, 20, g.data(), u.data());
      for (int i = 0; i < 20; ++i) {
        if (kind == 0) CHECK(g[i] != g[i] && u[i] != u[i]);
        else CHECK(!std::memcmp(&g[i], &gate[i], 4) && !std::memcmp(&u[i], &up[i], 4));
      }
    }
  }
}

TEST_CASE("rows_f and rows_gemm_f: every ISA gives the bits of generic; generic equals double precision") {
  std::mt19937 rng(13);
  for (WeightKind kind : kFloats)
    for (int cols : {1, 8, 16, 33, 172, 576})
      for (bool gated : {false, true}) {
        const int neurons = 5 + int(rng() % 60), n = 1 + int(rng() % 14);
        RandomNeurons w(shape_of(kind, 32, false, neurons, cols, gated), rng);
        const std::vector<float> x = random_vector(size_t(n) * cols, rng);
        const size_t ldy = neurons + 2;
        const std::vector<int32_t> list = random_list(neurons, 70, rng);
        AlignedBuffer<uint8_t> scratch(rows_scratch_bytes(w.view), "test scratch");
        for (const int32_t* ids : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(list.data())}) {
          const int end = ids ? int(list.size()) : neurons, begin = ids ? end / 3 : 0;
          std::vector<float> gate(n * ldy, 7.0f), up(n * ldy, 7.0f);
          for (int v = 0; v < n; ++v) {
            generic().rows_f(w.view, x.data() + v * cols, ids, begin, end, gated ? gate.data() + v * ldy : nullptr,
                             up.data() + v * ldy);
            for (int k = begin; k < end; ++k) {
              double sum = 0;
              for (int c = 0; c < cols; ++c) sum += double(w.row(ids ? ids[k] : k, true)[c]) * x[v * cols + c];
              CHECK_NEAR(up[v * ldy + k], sum, 1e-5);
            }
          }
          for (const KernelTable* k : runnable()) {
            std::vector<float> g(n * ldy, 7.0f), u(n * ldy, 7.0f), gg(n * ldy, 7.0f), uu(n * ldy, 7.0f);
            for (int v = 0; v < n; ++v)
              k->rows_f(w.view, x.data() + v * cols, ids, begin, end, gated ? g.data() + v * ldy : nullptr,
                        u.data() + v * ldy);
            k->rows_gemm_f(w.view, x.data(), cols, n, ids, begin, end, gated ? gg.data() : nullptr, uu.data(), ldy,
                           scratch.data());
            CHECK(same_bits(g, gate) && same_bits(u, up) && same_bits(gg, gate) && same_bits(uu, up));
          }
        }
      }
}

TEST_CASE("prefetch_start of records: any list and number of lines") {
  std::mt19937 rng(14);
  RandomNeurons w(shape_of(WeightKind::q4, 32, false, 10, 64, true), rng);
  const int32_t ids[] = {3, 9, 0};
  for (int lines : {0, 1, 3, 1000}) {
    prefetch_start(w.view, ids, 0, 3, lines);
    prefetch_start(w.view, nullptr, 4, 10, lines);
    prefetch_start(w.view, nullptr, 4, 4, lines);
  }
}
