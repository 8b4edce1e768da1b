// Column-skipping against the memory's own limit: the rate at which random subsets of contiguous runs can be read, for
// the run length of each matrix, and the share of it that gemv_q_cols reaches, beside its own dense time. Dense,
// skipping and limit in turns, on memory that is not cached; medians of the turns' ratios. Panels as the converter
// chooses them. Usage: sparse_bench [threads] [case ...]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/cpu_info.h"
#include "kernels/measure.h"
#include "model/linear.h"

using namespace sr;

namespace {

constexpr double kDensities[] = {1, 0.75, 0.5, 0.25, 0.1};
constexpr int kTurns = 11;

struct Case {
  const char* name;
  int rows, cols, panel_rows;
};
const Case kCases[] = {
    {"q|k|v 135M", 960, 576, 512},   {"gate|up 135M", 3072, 576, 1536}, {"down 135M", 576, 1536, 320},
    {"q|k|v 1B", 3072, 2048, 2816},  {"gate|up 1B", 16384, 2048, 2688}, {"down 1B", 2048, 8192, 1984},
    {"q|k|v 7B", 12288, 4096, 2816}, {"gate|up 7B", 22016, 4096, 2816}, {"down 7B", 4096, 11008, 2816}};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : default_threads();
  ThreadPool pool(threads);
  WeightBank bank(size_t(1) << 30);
  std::printf("%s, %d threads\n%-12s %7s %9s %9s %9s %9s\n", kernels().name, threads, "4-bit matrix", "density", "GB/s",
              "limit", "share", "vs dense");
  for (const Case& c : kCases) {
    bool wanted = argc <= 2;
    for (int i = 2; i < argc; ++i) wanted = wanted || std::string(c.name).find(argv[i]) != std::string::npos;
    if (!wanted) continue;
    PanelMatrix m;
    m.kind = WeightKind::q4;
    m.rows = c.rows;
    m.cols = c.cols;
    m.panel_rows = c.panel_rows;
    // As in the decoder, threads share the columns of all but gate|up.
    if (c.name[0] != 'g') m.set_stretches(stretches_that_pay(c.rows, c.cols));
    const size_t run = m.run_bytes(std::min(m.panel_rows, m.padded_rows())) / 64 * 64;
    for (double d : kDensities) {
      std::vector<double> rate, limit, share, gain;
      for (int i = 0; i < kTurns; ++i) {
        const ColumnTimes t = time_columns(pool, bank, m, d);
        rate.push_back(t.sparse_bytes / t.sparse / 1e9);
        limit.push_back(gather_gb_per_s(pool, bank, run, d));
        share.push_back(rate.back() / limit.back());
        gain.push_back(t.dense / t.sparse);
      }
      std::printf("%-12s %6.0f%% %9.1f %9.1f %8.0f%% %8.2fx\n", c.name, 100 * d, median(rate), median(limit),
                  100 * median(share), median(gain));
      std::fflush(stdout);
    }
  }
}
