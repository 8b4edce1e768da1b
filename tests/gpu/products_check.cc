// Matrix products of the device against the generic CPU kernels, on random data: on a GPU, or emulated in CI.
#include "check.h"

#include <algorithm>
#include <limits>

#include "kernels/rows.h"
#include "on_device.h"

#ifdef SR_CUDA_EMULATED
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace sr;
using namespace sr_test;

namespace {

const Layout kLayouts[] = {{WeightKind::q4, 32, false}, {WeightKind::q4, 32, true},  {WeightKind::q4, 16, false},
                           {WeightKind::q4, 16, true},  {WeightKind::q5, 32, true},  {WeightKind::q6, 16, false},
                           {WeightKind::q6, 32, true},  {WeightKind::q8, 32, false}, {WeightKind::q8, 16, true},
                           {WeightKind::f32, 32, false}, {WeightKind::f16, 32, false}, {WeightKind::bf16, 32, false},
                           {WeightKind::q4, 32, true, true}, {WeightKind::q4, 16, false, true},
                           {WeightKind::q5, 32, true, true}, {WeightKind::q6, 16, false, true},
                           {WeightKind::q8, 32, false, true}};

std::vector<float> run_gemv(cudaStream_t s, const cuda::Matrix& w, const DeviceInput& x, int splits) {
  const cuda::GemvPlan plan = {splits};
  cuda::DeviceBuffer<float> partial(std::max<size_t>(1, cuda::gemv_partial_floats(w, plan)), "a test");
  const auto tickets = on_device(std::vector<int>(size_t(w.groups), 0));
  cuda::DeviceBuffer<float> y(size_t(w.y_rows), "a test");
  const auto step = step_at(0);
  for (int twice = 0; twice < 2; twice++)  // tickets must be as they were
    cuda::gemv(s, w, x.vectors.view(), x.mask, plan, {partial.data(), tickets.data()}, step.data(), y.data());
  cuda::check(cudaStreamSynchronize(s), "gemv");
  for (int t : from_device(tickets.data(), tickets.size())) CHECK_EQ(t, 0);
  return from_device(y.data(), y.size());
}

// The generic product of quantised (or float) x.
std::vector<float> want_gemv(const PanelMatrix& m, const std::vector<float>& x, const std::vector<float>& threshold) {
  std::vector<float> y(size_t(m.padded_rows()));
  if (!is_quantised(m.kind)) {
    generic().gemv_f(m, x.data(), 0, m.tiles(), y.data());
    return y;
  }
  Quantised q(generic(), x, m.cols);
  std::vector<uint8_t> cols(q.q.size()), count(size_t(q.slabs));
  if (!threshold.empty())
    generic().select(x.data(), threshold.data(), 1, m.cols, q.q.data(), q.sum.data(), cols.data(), count.data());
  generic().gemv_q(m, q.view(), 0, m.tiles(), y.data());
  return y;
}

// Sums in another order: within a few ulps of the largest sum of magnitudes.
void check_close(const RandomMatrix& w, const std::vector<float>& x, const std::vector<float>& got, size_t at,
                 const std::vector<float>& want) {
  for (int r = 0; r < w.view.rows; r++) {
    double size = 0;
    for (int c = 0; c < w.view.cols; c++)
      size += std::fabs(double(w.weights[size_t(r) * w.view.cols + c]) * x[size_t(c)]);
    CHECK_NEAR(got[at + size_t(r)], want[size_t(r)], 2e-6 * size + 1e-7);
  }
}

// Rows, columns, rows of a panel; the last has a narrow last panel in the middle of what a block takes.
const int kShapes[][3] = {{64, 32, 64}, {200, 96, 128}, {321, 544, 128}, {576, 1056, 320}, {448, 544, 384}};

}  // namespace

TEST_CASE("gemv: equals generic for every kind of weight, however it is cut") {
  cuda::Stream s;
  std::mt19937 rng = fresh(1);
  for (const Layout& l : kLayouts)
    for (const auto& shape : kShapes) {
      const int panel = is_quantised(l.kind) ? shape[2] : 64;
      RandomMatrix w(l.kind, shape[0], shape[1], l.group, l.min, panel, rng, shape[0] == 200, l.units);
      const auto add = random_vector(size_t(shape[0]), rng);
      const cuda::DeviceMatrix device({w.view}, add.data(), "a test");
      const auto x = random_vector(size_t(shape[1]), rng);
      auto want = want_gemv(w.view, x, {});
      for (int r = 0; r < shape[0]; r++) want[size_t(r)] += add[size_t(r)];
      std::vector<float> first;
      in_every_order([&] {
        const DeviceInput in(s, x, 1, shape[1]);
        for (int splits : {1, 3}) {
          const auto got = run_gemv(s, device.view(), in, splits);
          check_close(w, x, got, 0, want);
          if (splits == 1 && first.empty()) first = got;
          if (splits == 1) CHECK(first == got);  // the same bits in any order of execution
        }
      });
    }
}

TEST_CASE("gemv: parts of different bits follow each other") {
  cuda::Stream s;
  std::mt19937 rng = fresh(2);
  RandomMatrix a(WeightKind::q4, 256, 160, 32, true, 192, rng), b(WeightKind::q6, 64, 160, 16, false, 64, rng),
      c(WeightKind::f16, 96, 160, 32, false, 64, rng);
  const auto add = random_vector(256 + 64 + 96, rng), x = random_vector(160, rng);
  const cuda::DeviceMatrix device({a.view, b.view, c.view}, add.data(), "a test");
  CHECK_EQ(device.view().y_rows, 256 + 64 + 128);
  const DeviceInput in(s, x, 1, 160);
  const auto got = run_gemv(s, device.view(), in, 2);
  size_t at = 0, row = 0;
  for (const RandomMatrix* m : {&a, &b, &c}) {
    auto want = want_gemv(m->view, x, {});
    for (int r = 0; r < m->view.rows; r++) want[size_t(r)] += add[row + size_t(r)];
    check_close(*m, x, got, at, want);
    at += size_t(m->view.padded_rows());
    row += size_t(m->view.rows);
  }
}

TEST_CASE("gemv: leaving columns out gives the bits of the dense product of the masked vector") {
  cuda::Stream s;
  std::mt19937 rng = fresh(3);
  for (const Layout& l : kLayouts) {
    if (!is_quantised(l.kind)) continue;
    for (double density : {1.0, 0.5, 0.07, 0.0}) {
      RandomMatrix w(l.kind, 330, 416, l.group, l.min, 128, rng, false, l.units);
      const cuda::DeviceMatrix device({w.view}, nullptr, "a test");
      const auto x = random_vector(416, rng);
      std::vector<float> sizes;
      for (float v : x) sizes.push_back(std::fabs(v));
      std::sort(sizes.begin(), sizes.end());
      const float cut = density == 0 ? 1e9f : sizes[size_t((1 - density) * (sizes.size() - 1))];
      const std::vector<float> threshold(416, density == 1.0 ? 0.0f : cut);
      const auto want = want_gemv(w.view, x, threshold);
      in_every_order([&] {
        for (int splits : {1, 2}) {
          const auto listed = run_gemv(s, device.view(), DeviceInput(s, x, 1, 416, threshold, 1.0), splits);
          const auto dense = run_gemv(s, device.view(), DeviceInput(s, x, 1, 416, threshold, -1.0), splits);
          CHECK(listed == dense);
          check_close(w, x, listed, 0, want);
        }
      });
    }
  }
}

TEST_CASE("gemv: a damaged input shows in every output") {
  cuda::Stream s;
  std::mt19937 rng = fresh(4);
  RandomMatrix w(WeightKind::q4, 128, 96, 32, false, 128, rng);
  const cuda::DeviceMatrix device({w.view}, nullptr, "a test");
  auto x = random_vector(96, rng);
  x[40] = std::numeric_limits<float>::quiet_NaN();
  for (float v : run_gemv(s, device.view(), DeviceInput(s, x, 1, 96), 1)) CHECK(std::isnan(v));
}

TEST_CASE("gemm: bit-equal to generic for every kind of weight") {
  cuda::Stream s;
  std::mt19937 rng = fresh(5);
  for (const Layout& l : kLayouts)
    for (int n : {1, 5, 70}) {
      const int rows = n == 5 ? 330 : 120, cols = n == 70 ? 64 : l.units ? 320 : 160;
      RandomMatrix w(l.kind, rows, cols, l.group, l.min, is_quantised(l.kind) ? 128 : 64, rng, false, l.units);
      const auto add = random_vector(size_t(rows), rng);
      const cuda::DeviceMatrix device({w.view}, n == 5 ? nullptr : add.data(), "a test");
      const auto x = random_vector(size_t(n) * size_t(cols), rng);
      const size_t ldy = size_t(w.view.padded_rows()) + 4;
      std::vector<float> want(size_t(n) * ldy), scratch(gemm_scratch_bytes(w.view) / 4 + 64);
      if (is_quantised(l.kind)) {
        const Quantised q(generic(), x, cols, n);
        generic().gemm_q(w.view, q.view(), n, 0, w.view.tiles(), want.data(), ldy, scratch.data());
      } else {
        generic().gemm_f(w.view, x.data(), size_t(cols), n, 0, w.view.tiles(), want.data(), ldy, scratch.data());
      }
      const auto run = [&] {
        const DeviceInput in(s, x, n, cols);
        cuda::DeviceBuffer<float> y(size_t(n) * ldy, "a test");
        cuda::gemm(s, device.view(), in.vectors.view(), 0, n, y.data(), ldy);
        cuda::check(cudaStreamSynchronize(s), "gemm");
        const auto got = from_device(y.data(), y.size());
        for (int i = 0; i < n; i++)
          for (int r = 0; r < rows; r++) {
            const float expected = want[size_t(i) * ldy + size_t(r)] + (n == 5 ? 0.0f : add[size_t(r)]);
            CHECK_EQ(got[size_t(i) * ldy + size_t(r)], expected);
          }
      };
      if (n == 5) in_every_order(run);
      else run();
    }
}

TEST_CASE("rows of neurons: bit-equal to generic, all or a list, gate and up or one of them") {
  cuda::Stream s;
  std::mt19937 rng = fresh(6);
  for (const Layout& l : kLayouts)
    for (bool gated : {true, false}) {
      const int neurons = 70, cols = gated ? 2624 : 96;  // five full stripes and a part of one; less than one
      NeuronMatrix m;
      m.kind = l.kind;
      m.group = l.group;
      m.has_min = l.min && is_quantised(l.kind);
      m.neurons = neurons;
      m.cols = cols;
      m.gated = gated;
      // Any bytes are weights; scales are made ordinary numbers.
      std::vector<uint8_t> data(m.total_bytes());
      for (auto& b : data) b = uint8_t(rng());
      const RowPlan plan(m);
      for (int i = 0; i < neurons; i++)
        for (int row = 0; row < (gated ? 2 : 1); row++) {
          uint8_t* at = data.data() + m.offset_of(i) + (row ? m.up_offset() : 0);
          const auto put = [&](size_t offset, size_t count, bool single) {
            for (size_t k = 0; k < count; k++) {
              const float v = 0.01f * float(int(rng() % 200) - 60);
              const uint16_t h = m.kind == WeightKind::bf16 ? f32_to_bf16(v) : f32_to_f16(v);
              if (single) std::memcpy(at + offset + 4 * k, &v, 4);
              else std::memcpy(at + offset + 2 * k, &h, 2);
            }
          };
          if (is_quantised(m.kind)) put(plan.scale, m.scale_bytes() / 2 * (m.has_min ? 2 : 1), false);
          else put(0, size_t(cols), m.kind == WeightKind::f32);
        }
      m.data = data.data();
      const auto x = random_vector(size_t(cols), rng);
      const int stripes = m.stripes();
      std::vector<int8_t> q(size_t(stripes) * kStripeCols);
      std::vector<float> scale(size_t(stripes) * kRowLanes);
      std::vector<int32_t> sum(size_t(stripes) * 2 * kRowLanes);
      const Quantised quantised(generic(), x, cols);
      order_for_rows(quantised.view(), cols, q.data(), scale.data(), sum.data());
      const size_t n_rows = size_t(neurons);
      std::vector<float> gate(n_rows), up(n_rows);
      float* want_gate = gated ? gate.data() : nullptr;
      if (is_quantised(m.kind))
        generic().rows_q(m, {q.data(), scale.data(), sum.data()}, nullptr, 0, neurons, want_gate, up.data());
      else generic().rows_f(m, x.data(), nullptr, 0, neurons, want_gate, up.data());

      const cuda::DeviceNeurons device(m, nullptr, "a test");
      std::vector<int> ids;
      for (int i = 0; i < neurons; i++)
        if (rng() % 3 == 0) ids.push_back(i);
      const auto list = on_device(ids);
      const auto count = on_device(std::vector<int>{int(ids.size())});
      in_every_order([&] {
        const DeviceInput in(s, x, 1, cols);
        for (int which = 0; which < 3; which++) {  // both of all, up of a list, gate of all
          if (which != 1 && !gated) continue;
          const auto blank = std::vector<float>(size_t(neurons), -77.0f);
          const auto got_gate = on_device(blank), got_up = on_device(blank);
          cuda::rows(s, device.view(), in.vectors.view(), which == 1 ? list.data() : nullptr,
                     which == 1 ? count.data() : nullptr, which == 1 ? nullptr : got_gate.data(),
                     which == 2 ? nullptr : got_up.data(), 1);
          cuda::check(cudaStreamSynchronize(s), "rows");
          const auto g = from_device(got_gate.data(), size_t(neurons)), u = from_device(got_up.data(), size_t(neurons));
          for (int i = 0; i < neurons; i++) {
            const bool chosen = which != 1 || std::binary_search(ids.begin(), ids.end(), i);
            CHECK_EQ(g[size_t(i)], which == 1 ? -77.0f : gate[size_t(i)]);
            CHECK_EQ(u[size_t(i)], which == 2 || !chosen ? -77.0f : up[size_t(i)]);
          }
        }
      });
    }
}

TEST_CASE("expanding 5 and 6 bits keeps every weight") {
  std::mt19937 rng = fresh(7);
  for (WeightKind kind : {WeightKind::q5, WeightKind::q6})
    for (bool min : {false, true}) {
      RandomMatrix w(kind, 200, 70, 16, min, 128, rng);
      std::vector<uint8_t> bytes(cuda::device_bytes(w.view) + 64, 0xAA);
      cuda::expand_to_bytes(w.view, bytes.data());
      for (size_t i = bytes.size() - 64; i < bytes.size(); i++) CHECK_EQ(int(bytes[i]), 0xAA);
      PanelMatrix m = w.view;
      m.kind = WeightKind::q8;
      m.data = bytes.data();
      if (min) continue;  // whose codes are moved: products above hold them
      std::vector<float> row(70);
      for (int r = 0; r < 200; r++) {
        unpack_row(m, r, row.data());
        for (int c = 0; c < 70; c++) CHECK_EQ(row[size_t(c)], w.weights[size_t(r) * 70 + size_t(c)]);
      }
    }
}

#ifdef SR_CUDA_EMULATED
namespace {

// Whether fn stops the program, in a process of its own.
template <class Fn>
bool stops(Fn fn) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    fn();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

}  // namespace

TEST_CASE("the emulation refuses what a GPU refuses") {
  const cuda::Stream s;
  const std::vector<int> numbers(1000, 3);
  const auto device = on_device(numbers);
  int* const data = device.data();
  const auto read = [=](size_t at) {
    volatile int got = data[at];
    (void)got;
  };
  const auto kernel = [&](size_t at) {
    sr_emu::submit(s, [=] {
      sr_emu::run_grid("a test", dim3(1), dim3(32), 0, [=] {
        sr_emu::after_previous();
        read(at);
      });
    });
    s.wait("a test");
  };
  // Device memory is for kernels, as far as it goes, and for copies.
  CHECK(stops([&] { read(0); }));
  CHECK(!stops([&] { kernel(0); }));
  CHECK(stops([&] { kernel(1024); }));
  cuda::PinnedBuffer<int> pinned;
  pinned.reset(numbers.size(), "a test");
  CHECK_EQ(pinned[0], -1);  // begins as NaN
  const auto copy = [&](void* to, size_t bytes) { return cudaMemcpyAsync(to, data, bytes, cudaMemcpyDeviceToHost, s); };
  CHECK_EQ(int(copy(pinned.data(), device.bytes() + 4)), int(cudaErrorInvalidValue));
  CHECK(stops([&] { copy(std::vector<int>(1000).data(), device.bytes()); }));
  CHECK_EQ(int(copy(pinned.data(), device.bytes())), int(cudaSuccess));
  s.wait("a test");
  CHECK_EQ(pinned[999], 3);
  for (int what = 0; what < 5; what++) {
    CHECK_EQ(int(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal)), int(cudaSuccess));
    void* p = nullptr;
    const cudaError_t got = what == 0   ? cudaMalloc(&p, 16)
                            : what == 1 ? cudaFree(data)
                            : what == 2 ? cudaStreamSynchronize(s)
                            : what == 3 ? cudaMallocHost(&p, 16)
                                        : cudaMemcpy(data, numbers.data(), 4, cudaMemcpyHostToDevice);
    CHECK_EQ(int(got), int(cudaErrorStreamCaptureUnsupported));
    cudaGraph_t graph = nullptr;
    CHECK_EQ(int(cudaStreamEndCapture(s, &graph)), int(cudaErrorStreamCaptureInvalidated));
    CHECK(!graph);
  }
  sr_emu::faults.devices = 2;
  cudaSetDevice(1);
  CHECK_EQ(sr_emu::submit(s, [] {}), int(cudaErrorInvalidResourceHandle));
  const cuda::Event elsewhere;
  CHECK_THROWS(elsewhere.record(s, "a test"), Error, "invalid resource handle");
  cudaSetDevice(0);
  sr_emu::faults.devices = 1;
  cudaGetLastError();
}
#endif
