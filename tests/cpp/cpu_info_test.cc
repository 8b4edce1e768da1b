// Processor facts are consistent with each other.
#include "base/cpu_info.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"

namespace {

// A folder as Linux describes processors, with `value` of each CPU in cpuN/<file>; a value of 0 is left out.
std::string fake_cpus(const std::string& file, const std::vector<int>& values) {
  char folder[] = "/tmp/sparse-run-cpus-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  for (size_t i = 0; i < values.size(); i++) {
    const std::string cpu = folder + std::string("/cpu") + std::to_string(i);
    mkdir(cpu.c_str(), 0700);
    mkdir((cpu + "/cpufreq").c_str(), 0700);
    if (values[i] == 0) continue;
    std::FILE* f = std::fopen((cpu + file).c_str(), "w");
    std::fprintf(f, "%d\n", values[i]);
    std::fclose(f);
  }
  return folder;
}

void remove_cpus(const std::string& folder, int count) {
  for (int i = 0; i < count; i++) {
    const std::string cpu = folder + "/cpu" + std::to_string(i);
    unlink((cpu + "/cpu_capacity").c_str());
    unlink((cpu + "/cpufreq/cpuinfo_max_freq").c_str());
    rmdir((cpu + "/cpufreq").c_str());
    rmdir(cpu.c_str());
  }
  rmdir(folder.c_str());
}

std::vector<int> fast_of(const std::string& file, const std::vector<int>& values, const std::vector<int>& cpus) {
  const std::string folder = fake_cpus(file, values);
  const std::vector<int> out = sr::fast_cpus(cpus, folder);
  remove_cpus(folder, int(values.size()));
  return out;
}

}  // namespace

TEST_CASE("cpu_info: counts are positive and ordered") {
  const sr::CpuInfo& info = sr::cpu_info();
  CHECK(info.physical_cores >= 1);
  CHECK(info.allowed_cores >= 1);
  CHECK(info.allowed_cores <= info.physical_cores);
  CHECK(sr::default_threads() >= 1);
  CHECK(sr::default_threads() <= info.allowed_cores);
  CHECK(!info.brand.empty());
}

TEST_CASE("cpu_supports_isa: generic always, better sets imply lesser ones, unknown names never") {
  CHECK(sr::cpu_supports_isa("generic"));
  CHECK(!sr::cpu_supports_isa("avx1024"));
  CHECK(!sr::cpu_supports_isa(""));
  if (sr::cpu_supports_isa("avx512")) CHECK(sr::cpu_supports_isa("avx2"));
  if (sr::cpu_supports_isa("neon_i8mm")) CHECK(sr::cpu_supports_isa("neon_dotprod"));
  if (sr::cpu_supports_isa("neon_dotprod")) CHECK(sr::cpu_supports_isa("neon"));
#if defined(__aarch64__)
  CHECK(sr::cpu_supports_isa("neon"));
#endif
}

TEST_CASE("fast_cpus: the big cores by capacity, by frequency where that is missing, all where nothing is known") {
  using Cpus = std::vector<int>;
  const std::string capacity = "/cpu_capacity", frequency = "/cpufreq/cpuinfo_max_freq";
  // A phone: four small, three big, one prime core; the big ones are near enough to the prime one.
  CHECK(fast_of(capacity, {282, 282, 282, 282, 800, 800, 800, 1024}, {0, 1, 2, 3, 4, 5, 6, 7}) == (Cpus{4, 5, 6, 7}));
  // Of those that the process may use.
  CHECK(fast_of(capacity, {282, 282, 1024, 1024}, {0, 1}) == (Cpus{0, 1}));
  CHECK(fast_of(capacity, {282, 282, 1024, 1024}, {1, 2}) == (Cpus{2}));
  CHECK(fast_of(frequency, {1800000, 1800000, 3000000, 3000000}, {0, 1, 2, 3}) == (Cpus{2, 3}));
  CHECK(fast_of(frequency, {5000000, 4800000, 5100000}, {0, 1, 2}) == (Cpus{0, 1, 2}));
  CHECK(fast_of(capacity, {0, 0, 0}, {0, 1, 2}) == (Cpus{0, 1, 2}));
  CHECK(fast_of(capacity, {282, 0, 1024}, {0, 1, 2}) == (Cpus{0, 1, 2}));  // told of some only: not to be used
}
