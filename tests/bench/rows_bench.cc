// Rates of the neuron rows kernels on records larger than the caches, beside what the memory gives for runs of that
// size: GB/s of the bytes that are wanted, best of several alternating passes. Usage: rows_bench [threads] [case ...]
//
//   panel    the same matrix in panels, dense gemv           dense  all neurons, gate and up
//   gather   one load a line of a random subset of runs as long as both rows of a neuron, the best of several distances
//   list     the kernel on the same subset                   gate   gate rows of all neurons, up rows passed over
//   alone    the rows of a matrix without up rows: what gate costs where it is stored apart
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu_info.h"
#include "base/thread_pool.h"
#include "kernels/table.h"

using namespace sr;

namespace {

constexpr size_t kBankBytes = size_t(1) << 30;  // a tenth of it is still more than the caches hold
constexpr int kPasses = 5, kVectors = 128;
constexpr int kDensities[] = {100, 75, 50, 25, 10};

struct Case {
  const char* name;
  WeightKind kind;
  int group;
  bool min;
  int neurons, cols;
};
const Case kCases[] = {
    {"q4 1B", WeightKind::q4, 32, false, 8192, 2048},   {"q4 7B", WeightKind::q4, 32, false, 11008, 4096},
    {"q4_1 135M", WeightKind::q4, 32, true, 1536, 576}, {"q4_1 1B", WeightKind::q4, 32, true, 8192, 2048},
    {"q5_1 1B", WeightKind::q5, 32, true, 8192, 2048},  {"q6 1B", WeightKind::q6, 16, false, 8192, 2048},
    {"q8 1B", WeightKind::q8, 32, false, 8192, 2048},
};

// Any bytes are valid codes; as halves they must be finite.
void fill(AlignedBuffer<uint8_t>& bytes) {
  std::mt19937_64 rng(1);
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    const uint64_t v = rng() & 0xbfffbfffbfffbfffull;
    std::memcpy(bytes.data() + i, &v, 8);
  }
}

// One load from every line of the runs ids[begin, end), runs `ahead` further on being fetched meanwhile.
uint64_t touch(const uint8_t* base, size_t run, const int32_t* ids, int begin, int end, int ahead) {
  uint64_t sum = 0;
  for (int k = begin; k < end; ++k) {
    const uint8_t* p = base + size_t(ids[k]) * run;
    const uint8_t* later = ahead && k + ahead < end ? base + size_t(ids[k + ahead]) * run : nullptr;
    for (size_t i = 0; i < run; i += 64) {
      if (later) __builtin_prefetch(later + i, 0, 2);
      uint64_t v;
      std::memcpy(&v, p + i, 8);
      sum += v;
    }
  }
  return sum;
}

struct Timer {
  ThreadPool& pool;
  int threads;
  // Seconds of fn(thread) on all threads.
  double operator()(const std::function<void(int)>& fn) const {
    const auto t = std::chrono::steady_clock::now();
    pool.run([&](int tid) { fn(tid); });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
  }
};

void run_case(const Case& c, const Timer& time, AlignedBuffer<uint8_t>& bank) {
  const KernelTable& k = kernels();
  const int threads = time.threads;
  NeuronMatrix m;
  m.kind = c.kind;
  m.group = c.group;
  m.has_min = c.min;
  m.neurons = c.neurons;
  m.cols = c.cols;
  NeuronMatrix single = m;  // as many rows, each a record of its own
  single.gated = false;
  PanelMatrix panel;
  panel.kind = c.kind;
  panel.group = c.group;
  panel.has_min = c.min;
  panel.rows = 2 * c.neurons;
  panel.cols = c.cols;
  panel.panel_rows = 2048 < panel.rows ? 2048 : 1024;

  std::mt19937 rng(2);
  std::vector<float> x(size_t(kVectors) * c.cols);
  for (auto& f : x) f = float(rng() % 2001) / 1000.0f - 1.0f;
  const int slabs = c.cols / 32, stripes = m.stripes();
  std::vector<int8_t> q(x.size()), oq(size_t(kVectors) * stripes * kStripeCols);
  std::vector<float> scale(size_t(kVectors) * slabs), oscale(size_t(kVectors) * stripes * kRowLanes);
  std::vector<int32_t> sum(scale.size() * 2), osum(oscale.size() * 2);
  double order = 1e9;
  for (int v = 0; v < kVectors; ++v) {
    k.quantise(x.data() + size_t(v) * c.cols, c.cols, q.data() + size_t(v) * c.cols, scale.data() + size_t(v) * slabs,
               sum.data() + size_t(v) * slabs * 2);
    const auto t = std::chrono::steady_clock::now();
    order_for_rows(
        {q.data() + size_t(v) * c.cols, scale.data() + size_t(v) * slabs, sum.data() + size_t(v) * slabs * 2}, c.cols,
        oq.data() + size_t(v) * stripes * kStripeCols, oscale.data() + size_t(v) * stripes * kRowLanes,
        osum.data() + size_t(v) * stripes * 2 * kRowLanes);
    order = std::min(order, std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count());
  }
  const QuantVector plain{q.data(), scale.data(), sum.data()};
  const RowVector ordered{oq.data(), oscale.data(), osum.data()};

  const size_t bytes = m.total_bytes();
  const int copies = int(std::max<size_t>(1, kBankBytes / std::max(bytes, panel.total_bytes())));
  const size_t stride = (std::max(bytes, panel.total_bytes()) + 4095) / 4096 * 4096;
  AlignedBuffer<float> y(size_t(kVectors) * (panel.padded_rows() + 64), "y");
  float *gate = y.data(), *up = y.data() + c.neurons;
  auto at = [&](NeuronMatrix w, int i) {
    w.data = bank.data() + i * stride;
    return w;
  };
  // Gather and list at every density, dense, panel, gate: one pass each, in turn.
  constexpr int kKinds = sizeof kDensities / sizeof kDensities[0];
  std::vector<std::vector<int32_t>> ids[kKinds];
  double wanted[kKinds] = {};
  for (int d = 0; d < kKinds; ++d) {
    ids[d].resize(copies);
    for (auto& list : ids[d]) {
      for (int i = 0; i < c.neurons; ++i)
        if (int(rng() % 100) < kDensities[d]) list.push_back(i);
      wanted[d] += double(list.size()) * m.record_bytes() / 1e9;
    }
  }
  double gather[kKinds] = {}, list[kKinds] = {}, dense = 0, panels = 0, gates = 0, alone = 0, ups[kKinds] = {};
  auto best = [](double& kept, double now) { kept = std::max(kept, now); };
  for (int pass = 0; pass < kPasses; ++pass) {
    best(panels, panel.total_bytes() * copies / 1e9 / time([&](int tid) {
      PanelMatrix w = panel;
      for (int i = 0; i < copies; ++i) {
        w.data = bank.data() + i * stride;
        k.gemv_q(w, plain, w.tiles() * tid / threads, w.tiles() * (tid + 1) / threads, y.data());
      }
    }));
    auto rows = [&](NeuronMatrix shape, const std::vector<int32_t>* lists, bool g, bool u) {
      return time([&](int tid) {
        for (int i = 0; i < copies; ++i) {
          const NeuronMatrix w = at(shape, i);
          const int n = lists ? int(lists[i].size()) : w.neurons;
          k.rows_q(w, ordered, lists ? lists[i].data() : nullptr, n * tid / threads, n * (tid + 1) / threads,
                   g ? gate : nullptr, u ? up : nullptr);
        }
      });
    };
    best(dense, bytes * copies / 1e9 / rows(m, nullptr, true, true));
    best(gates, double(m.row_bytes()) * m.neurons * copies / 1e9 / rows(m, nullptr, true, false));
    best(alone, single.total_bytes() * copies / 1e9 / rows(single, nullptr, false, true));
    for (int d = 0; d < kKinds; ++d) {
      best(list[d], wanted[d] / rows(m, ids[d].data(), true, true));
      best(ups[d], wanted[d] / 2 / rows(m, ids[d].data(), false, true));
      for (size_t ahead : {0, 8192, 24576})
        best(gather[d], wanted[d] / time([&](int tid) {
          volatile uint64_t sink = 0;
          for (int i = 0; i < copies; ++i) {
            const int n = int(ids[d][i].size());
            sink = sink + touch(bank.data() + i * stride, m.record_bytes(), ids[d][i].data(), n * tid / threads,
                                n * (tid + 1) / threads, int((ahead + m.record_bytes() - 1) / m.record_bytes()));
          }
        }));
    }
  }
  double gemm[2] = {};
  std::vector<AlignedBuffer<uint8_t>> scratch;
  for (int t = 0; t < threads; ++t)
    scratch.emplace_back(std::max(gemm_scratch_bytes(panel), rows_scratch_bytes(m)), "scratch");
  const double macs = double(kVectors) * panel.rows * c.cols / 1e9;
  for (int pass = 0; pass < 3; ++pass) {
    best(gemm[0], macs / time([&](int tid) {
      PanelMatrix w = panel;
      w.data = bank.data();
      k.gemm_q(w, plain, kVectors, w.tiles() * tid / threads, w.tiles() * (tid + 1) / threads, y.data(),
               w.padded_rows(), scratch[tid].data());
    }));
    best(gemm[1], macs / time([&](int tid) {
      k.rows_gemm_q(at(m, 0), ordered, kVectors, nullptr, c.neurons * tid / threads, c.neurons * (tid + 1) / threads,
                    gate, up, 2 * c.neurons, scratch[tid].data());
    }));
  }
  std::printf("%-10s record %5zu B | panel %5.1f | dense %5.1f = %3.0f%% of panel | gate %5.1f, alone %5.1f GB/s | "
              "order %.2f us\n",
              c.name, m.record_bytes(), panels, dense, 100 * dense / panels, gates, alone, order * 1e6);
  for (int d = 0; d < kKinds; ++d)
    std::printf("%12d%% | gather %5.1f | list %5.1f = %3.0f%% | up rows alone %5.1f\n", kDensities[d], gather[d],
                list[d], 100 * list[d] / gather[d], ups[d]);
  std::printf("      gemm(%d) | panel %6.1f | rows %6.1f GMAC/s = %3.0f%%\n", kVectors, gemm[0], gemm[1],
              100 * gemm[1] / gemm[0]);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : default_threads();
  ThreadPool pool(threads);
  std::printf("%s, %d threads; best of %d\n", kernels().name, threads, kPasses);
  AlignedBuffer<uint8_t> bank(kBankBytes + (size_t(64) << 20), "bank");
  fill(bank);
  for (const Case& c : kCases) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; ++i) wanted = wanted || std::string(c.name) == argv[i];
    if (wanted) run_case(c, {pool, threads}, bank);
  }
}
