// Rates of the matrix kernels on random panels larger than the caches: GB/s of stored bytes and 10^9 multiply-adds/s,
// beside the machine's own read rate in the same run. Usage: kernels_bench [threads] [case ...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu_info.h"
#include "base/thread_pool.h"
#include "kernels/f16.h"
#include "kernels/pack/pack.h"
#include "kernels/table.h"

using namespace sr;

namespace {

double seconds(const std::function<void()>& fn) {
  const auto t = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

struct Bank {  // enough copies of one matrix that nothing stays in a cache
  PanelMatrix m;
  AlignedBuffer<uint8_t> bytes;
  int copies;

  Bank(WeightKind kind, int group, bool min, int rows, int cols, int panel_rows, size_t total) {
    m.kind = kind;
    m.group = group;
    m.has_min = min;
    m.rows = rows;
    m.cols = cols;
    m.panel_rows = panel_rows;
    const size_t one = (m.total_bytes() + 4095) / 4096 * 4096;
    copies = int(std::max<size_t>(1, total / one));
    bytes.reset(one * copies, "bank");
    prefer_huge_pages(bytes.data(), one * copies);  // as loaded weights
    std::mt19937_64 rng(1);
    for (size_t i = 0; i + 8 <= one * copies; i += 8) {
      // Any bytes are valid codes; as halves they must be finite.
      const uint64_t v = rng() & 0xbfffbfffbfffbfffull;
      std::copy_n(reinterpret_cast<const uint8_t*>(&v), 8, bytes.data() + i);
    }
  }
  PanelMatrix copy(int i) const {
    PanelMatrix c = m;
    c.data = bytes.data() + (m.total_bytes() + 4095) / 4096 * 4096 * i;
    return c;
  }
};

struct Vectors {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  Vectors(int n, int cols) : q(size_t(n) * cols), scale(size_t(n) * cols / 32), sum(size_t(n) * cols / 16) {
    std::mt19937 rng(2);
    std::vector<float> x(cols);
    for (int v = 0; v < n; ++v) {
      for (auto& f : x) f = float(rng() % 2001) / 1000.0f - 1.0f;
      kernels().quantise(x.data(), cols, q.data() + size_t(v) * cols, scale.data() + size_t(v) * cols / 32,
                         sum.data() + size_t(v) * cols / 16);
    }
  }
  QuantVector view() const { return {q.data(), scale.data(), sum.data()}; }
};

struct Case {
  const char* name;
  WeightKind kind;
  int group;
  bool min;
  int rows, cols, panel_rows;
};
const Case kCases[] = {
    {"q4 qkv 1B", WeightKind::q4, 32, false, 3072, 2048, 1536},
    {"q4 gate_up 1B", WeightKind::q4, 32, false, 16384, 2048, 2048},
    {"q4 down 1B", WeightKind::q4, 32, false, 2048, 8192, 1024},
    {"q4 gate_up 7B", WeightKind::q4, 32, false, 22016, 4096, 2752},
    {"q4_1 qkv 135M", WeightKind::q4, 32, true, 960, 576, 960},
    {"q4_1 gate_up 135M", WeightKind::q4, 32, true, 3072, 576, 1536},
    {"q4_1 down 135M", WeightKind::q4, 32, true, 576, 1536, 576},
    {"q5_1 gate_up 1B", WeightKind::q5, 32, true, 16384, 2048, 2048},
    {"q6 gate_up 1B", WeightKind::q6, 16, false, 16384, 2048, 2048},
    {"q8 head 135M", WeightKind::q8, 32, false, 49152, 576, 2048},
    {"q8 gate_up 1B", WeightKind::q8, 32, false, 16384, 2048, 2048},
};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : default_threads();
  const KernelTable& k = kernels();
  ThreadPool pool(threads);
  std::printf("%s, %d threads; medians of 9\n", k.name, threads);
  AlignedBuffer<uint8_t> big(size_t(512) << 20, "stream");
  prefer_huge_pages(big.data(), size_t(512) << 20);
  for (size_t i = 0; i < size_t(512) << 20; i += 8) big.data()[i] = uint8_t(i);
  auto stream = [&] {
    const size_t share = (size_t(512) << 20) / threads;
    const double t = seconds([&] {
      pool.run([&](int tid) {
        volatile uint64_t sink = k.read_sum(big.data() + tid * share, share);
        (void)sink;
      });
    });
    return 0.536870912 / t;
  };
  for (const Case& c : kCases) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; ++i) wanted = wanted || std::string(c.name).find(argv[i]) != std::string::npos;
    if (!wanted) continue;
    Bank bank(c.kind, c.group, c.min, c.rows, c.cols, c.panel_rows, size_t(400) << 20);
    const Vectors one(1, c.cols), many(256, c.cols);
    AlignedBuffer<float> y(size_t(256) * bank.m.padded_rows(), "y");
    const double gb = double(bank.m.total_bytes()) * bank.copies / 1e9;
    std::vector<double> dense, reads, gemm;
    std::vector<AlignedBuffer<uint8_t>> scratch;
    for (int t = 0; t < threads; ++t) scratch.emplace_back(gemm_scratch_bytes(bank.m), "scratch");
    for (int rep = 0; rep < 9; ++rep) {
      reads.push_back(stream());
      dense.push_back(gb / seconds([&] {
        pool.run([&](int tid) {
          const int tiles = bank.m.tiles();
          for (int i = 0; i < bank.copies; ++i)
            k.gemv_q(bank.copy(i), one.view(), tiles * tid / threads, tiles * (tid + 1) / threads, y.data());
        });
      }));
      if (rep < 3)
        gemm.push_back(256.0 * c.rows * c.cols / 1e9 / seconds([&] {
          pool.run([&](int tid) {
            const int tiles = bank.m.tiles();
            k.gemm_q(bank.copy(0), many.view(), 256, tiles * tid / threads, tiles * (tid + 1) / threads, y.data(),
                     bank.m.padded_rows(), scratch[tid].data());
          });
        }));
    }
    std::printf("%-20s gemv %6.1f GB/s = %3.0f%% of stream %5.1f | gemm(256) %6.1f GMAC/s\n", c.name, median(dense),
                100 * median(dense) / median(reads), median(reads), median(gemm));
    std::fflush(stdout);
  }
}
