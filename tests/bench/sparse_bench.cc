// Column-skipping against the memory's own limit: the rate at which random subsets of contiguous runs can be read, for
// the run length of each matrix, and the share of it that gemv_q_cols reaches, beside its own dense time. Alternating runs
// in one process; best of many, because the limit is a property of the machine and the neighbours are not.
// Usage: sparse_bench [threads] [case ...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu_info.h"
#include "base/thread_pool.h"
#include "kernels/table.h"

using namespace sr;

namespace {

constexpr int kDensities[] = {100, 75, 50, 25, 10};
constexpr size_t kTotal = size_t(200) << 20;

double seconds(const std::function<void()>& fn) {
  const auto t = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

void fill(uint8_t* p, size_t bytes) {
  std::mt19937_64 rng(1);
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    const uint64_t v = rng() & 0xbfffbfffbfffbfffull;  // as halves, finite
    std::copy_n(reinterpret_cast<const uint8_t*>(&v), 8, p + i);
  }
}

// GB/s of wanted bytes when `density` percent of the runs are read, in order, with the next ones prefetched.
double gather_once(const KernelTable& k, ThreadPool& pool, const uint8_t* data, size_t run, int density) {
  const size_t runs = kTotal / run;
  static std::vector<uint32_t> list;
  list.clear();
  std::mt19937 rng(7);
  for (size_t i = 0; i < runs; ++i)
    if (int(rng() % 100) < density) list.push_back(uint32_t(i));
  const size_t ahead = std::max<size_t>(2, 8192 / run);
  const double t = seconds([&] {
    pool.run([&](int tid) {
      const size_t begin = list.size() * tid / pool.size(), end = list.size() * (tid + 1) / pool.size();
      volatile uint64_t sink = 0;
      for (size_t i = begin; i < end; ++i) {
        if (i + ahead < end)
          for (size_t b = 0; b < run; b += 64) __builtin_prefetch(data + list[i + ahead] * run + b, 0, 2);
        sink = sink + k.read_sum(data + list[i] * run, run);
      }
    });
  });
  return double(list.size()) * run / 1e9 / t;
}

struct Case {
  const char* name;
  int rows, cols, panel_rows;
};
const Case kCases[] = {{"q|k|v 1B", 3072, 2048, 1536},     {"gate|up 1B", 16384, 2048, 2048}, {"down 1B", 2048, 8192, 1024},
                       {"q|k|v 7B", 12288, 4096, 2048},    {"gate|up 7B", 22016, 4096, 1856}, {"down 7B", 4096, 11008, 2048}};

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : default_threads();
  const KernelTable& k = kernels();
  ThreadPool pool(threads);
  AlignedBuffer<uint8_t> bytes(kTotal + (size_t(64) << 20), "bank");
  prefer_huge_pages(bytes.data(), bytes.size());
  fill(bytes.data(), bytes.size());

  std::printf("%s, %d threads. GB/s of wanted bytes, random runs; best of 15\n%-10s", k.name, threads, "run");
  for (int d : kDensities) std::printf("%7d%%", d);
  std::printf("\n");
  for (size_t run : {256, 512, 1024, 2048, 4096}) {
    std::printf("%-10zu", run);
    for (int d : kDensities) {
      double best = 0;
      for (int i = 0; i < 15; ++i) best = std::max(best, gather_once(k, pool, bytes.data(), run, d));
      std::printf("%8.1f", best);
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  std::printf("\n%-12s %7s %9s %9s %9s %9s\n", "4-bit matrix", "density", "GB/s", "limit", "share", "vs dense");
  for (const Case& c : kCases) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; ++i) wanted = wanted || std::string(c.name).find(argv[i]) != std::string::npos;
    if (!wanted) continue;
    PanelMatrix m;
    m.kind = WeightKind::q4;
    m.rows = c.rows;
    m.cols = c.cols;
    m.panel_rows = c.panel_rows;
    const size_t one = (m.total_bytes() + 4095) / 4096 * 4096;
    const int copies = int(std::max<size_t>(1, kTotal / one));
    const int slabs = m.slabs(), tiles = m.tiles();
    std::vector<int8_t> q(size_t(slabs) * 32, 3);
    std::vector<float> scale(slabs, 0.1f), y(size_t(m.padded_rows()));
    std::vector<int32_t> sum(size_t(slabs) * 2);
    std::vector<uint8_t> cols(size_t(slabs) * 32), count(slabs);
    // Each thread owns whole panels, as in the decoder.
    const int per = m.panel_rows / kTileRows, panels = (tiles + per - 1) / per;
    const auto cut = [&](int t) { return t == threads ? tiles : std::min(tiles, panels * t / threads * per); };
    const size_t run = m.run_bytes(std::min(m.panel_rows, m.padded_rows()));
    for (int d : kDensities) {
      std::mt19937 rng(3);
      size_t kept = 0;
      for (int s = 0; s < slabs; ++s) {
        count[s] = 0;
        for (int j = 0; j < 32; ++j)
          if (int(rng() % 100) < d) cols[s * 32 + count[s]++] = uint8_t(j);
        sum[2 * s] = sum[2 * s + 1] = 0;
        kept += count[s];
      }
      const auto go = [&](bool sparse) {
        return seconds([&] {
          pool.run([&](int tid) {
            for (int i = 0; i < copies; ++i) {
              PanelMatrix w = m;
              w.data = bytes.data() + one * i;
              const QuantVector x{q.data(), scale.data(), sum.data()};
              if (sparse) k.gemv_q_cols(w, x, {cols.data(), count.data()}, cut(tid), cut(tid + 1), y.data());
              else k.gemv_q(w, x, cut(tid), cut(tid + 1), y.data());
            }
          });
        });
      };
      double dense = 1e9, sparse = 1e9, limit = 0;
      for (int i = 0; i < 15; ++i) {
        dense = std::min(dense, go(false));
        sparse = std::min(sparse, go(true));
        limit = std::max(limit, gather_once(k, pool, bytes.data(), run / 64 * 64, d));
      }
      const double heads = double(slabs) * m.slab_head_bytes(m.padded_rows());
      const double read = (heads + (double(m.total_bytes()) - heads) * kept / (slabs * 32.0)) * copies / 1e9;
      std::printf("%-12s %6d%% %9.1f %9.1f %8.0f%% %8.2fx\n", c.name, d, read / sparse, limit, 100 * read / sparse / limit,
                  dense / sparse);
      std::fflush(stdout);
    }
  }
}
