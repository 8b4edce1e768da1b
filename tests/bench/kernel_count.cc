// Instructions that the kernels execute per weight: dense, on some columns, on rows of neurons, and for many vectors at
// once. A child process runs the kernel and this one steps it (ptrace), so any instruction set of this processor can be
// counted. The difference of two matrices, one with twice the columns, leaves out what a call costs once.
//
//   kernel_count                           the table, for every instruction set that this processor has (Linux on
// x86-64)
//   kernel_count ISA CASE COLUMNS          runs one kernel and counts nothing: for counting from outside (count_arm.py)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/table.h"

#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace sr;

namespace {

enum class Form { gemv, columns, gemm, rows, rows_gemm };
struct Case {
  const char* name;
  Form form;
  WeightKind kind;
  bool min;
  int group;
  int active;  // of 32 columns
};
const Case kCases[] = {{"q4", Form::gemv, WeightKind::q4, false, 32, 32},
                       {"q4_min", Form::gemv, WeightKind::q4, true, 32, 32},
                       {"q5", Form::gemv, WeightKind::q5, false, 32, 32},
                       {"q6_group16", Form::gemv, WeightKind::q6, false, 16, 32},
                       {"q8", Form::gemv, WeightKind::q8, false, 32, 32},
                       {"q4_50%", Form::columns, WeightKind::q4, false, 32, 16},
                       {"q4_25%", Form::columns, WeightKind::q4, false, 32, 8},
                       {"q4_9%", Form::columns, WeightKind::q4, false, 32, 3},
                       {"q8_25%", Form::columns, WeightKind::q8, false, 32, 8},
                       {"q4_rows", Form::rows, WeightKind::q4, false, 32, 32},
                       {"q6_rows", Form::rows, WeightKind::q6, false, 16, 32},
                       {"q8_rows", Form::rows, WeightKind::q8, false, 32, 32},
                       {"q4_x24", Form::gemm, WeightKind::q4, false, 32, 32},
                       {"q8_x24", Form::gemm, WeightKind::q8, false, 32, 32},
                       {"q4_rows_x24", Form::rows_gemm, WeightKind::q4, false, 32, 32}};
constexpr int kMany = 24;  // vectors at once

// Stepping takes tens of microseconds an instruction, so matrices are small: rows, and the columns that a second one
// has more.
bool by_rows(const Case& c) { return c.form == Form::rows || c.form == Form::rows_gemm; }
int rows_of(const Case& c) { return by_rows(c) ? 32 : c.form == Form::gemm ? 128 : 512; }
int columns_of(const Case& c) { return by_rows(c) ? kStripeCols : 2 * kSlabCols; }

// Everything a kernel of one case and width needs; run() is the call that is counted.
class Job {
 public:
  Job(const KernelTable& table, const Case& c, int cols) : t_(table), c_(c) {
    const size_t vectors = c.form == Form::gemm || c.form == Form::rows_gemm ? kMany : 1, width = size_t(cols);
    panels_.kind = neurons_.kind = c.kind;
    panels_.has_min = neurons_.has_min = c.min;
    panels_.group = neurons_.group = c.group;
    panels_.rows = panels_.panel_rows = rows_of(c);
    panels_.cols = neurons_.cols = cols;
    neurons_.neurons = rows_of(c) / 2;
    weights_.reset(std::max(panels_.total_bytes(), neurons_.total_bytes()), "weights");
    panels_.data = neurons_.data = weights_.data();
    q_.assign(vectors * width, 1);
    scale_.assign(vectors * width / 16, 1.0f);
    sum_.assign(vectors * width / 8, 16);
    y_.assign(vectors * size_t(rows_of(c)) * 2, 0.0f);
    cols_.assign(width, 0);
    count_.assign(width / kSlabCols, 0);
    for (size_t s = 0; s < count_.size(); ++s)
      for (int j = 0; j < kSlabCols; ++j)
        if (j * c.active / 32 != (j + 1) * c.active / 32) cols_[s * kSlabCols + count_[s]++] = uint8_t(j);
    scratch_.reset(std::max(gemm_scratch_bytes(panels_), rows_scratch_bytes(neurons_)), "scratch");
  }
  void run() {
    const QuantVector x{q_.data(), scale_.data(), sum_.data()};
    const RowVector r{q_.data(), scale_.data(), sum_.data()};
    float *y = y_.data(), *up = y + y_.size() / 2;
    const int tiles = panels_.tiles(), n = neurons_.neurons;
    switch (c_.form) {
      case Form::gemv: t_.gemv_q(panels_, x, 0, tiles, y); break;
      case Form::columns: t_.gemv_q_cols(panels_, x, {cols_.data(), count_.data()}, 0, tiles, y); break;
      case Form::gemm: t_.gemm_q(panels_, x, kMany, 0, tiles, y, size_t(panels_.rows), scratch_.data()); break;
      case Form::rows: t_.rows_q(neurons_, r, nullptr, 0, n, y, up); break;
      case Form::rows_gemm: t_.rows_gemm_q(neurons_, r, kMany, nullptr, 0, n, y, up, size_t(n), scratch_.data()); break;
    }
  }
  static double products(const Case& c) {  // for each column
    return rows_of(c) * (c.form == Form::gemm || c.form == Form::rows_gemm ? kMany : 1) * (c.active / 32.0);
  }

 private:
  const KernelTable& t_;
  const Case& c_;
  PanelMatrix panels_;
  NeuronMatrix neurons_;
  AlignedBuffer<uint8_t> weights_, scratch_;
  std::vector<int8_t> q_;
  std::vector<float> scale_, y_;
  std::vector<int32_t> sum_;
  std::vector<uint8_t> cols_, count_;
};

#if defined(__linux__) && defined(__x86_64__)
// Instructions between two stops of a child that runs the job; -1 where the system lets nobody trace.
long count(const KernelTable& table, const Case& c, int cols) {
  Job job(table, c, cols);
  job.run();  // code and data touched, symbols bound
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGUSR1);
    job.run();
    raise(SIGUSR2);
    _exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return -1;
  long steps = 0;
  for (;; ++steps) {
    if (ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr) != 0) return -1;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return -1;
    if (WSTOPSIG(status) == SIGUSR2) break;
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  return steps;
}
#else
long count(const KernelTable&, const Case&, int) { return -1; }
#endif

// generic is there to be read, not to be fast.
bool counted(const IsaEntry& e) { return e.supported && e.table->name != std::string("generic"); }

}  // namespace

int main(int argc, char** argv) {
  int n = 0;
  const IsaEntry* entries = isa_entries(&n);
  if (argc == 4) {
    for (int i = 0; i < n; ++i)
      for (const Case& c : kCases)
        if (entries[i].supported && argv[1] == std::string(entries[i].table->name) && argv[2] == std::string(c.name)) {
          Job(*entries[i].table, c, std::atoi(argv[3])).run();
          return 0;
        }
    std::fprintf(stderr, "kernel_count: no such instruction set here, or no such case\n");
    return 2;
  }
  std::printf("%-14s", "per product");
  for (int i = 0; i < n; ++i)
    if (counted(entries[i])) std::printf("%14s", entries[i].table->name);
  std::printf("\n");
  for (const Case& c : kCases) {
    std::printf("%-14s", c.name);
    for (int i = 0; i < n; ++i) {
      if (!counted(entries[i])) continue;
      const long narrow = count(*entries[i].table, c, columns_of(c));
      const long wide = count(*entries[i].table, c, 2 * columns_of(c));
      if (narrow < 0 || wide < 0) {
        std::fprintf(stderr, "kernel_count: this system does not let a process be stepped\n");
        return 1;
      }
      std::printf("%14.3f", double(wide - narrow) / (columns_of(c) * Job::products(c)));
      std::fflush(stdout);
    }
    std::printf("\n");
  }
}
