// Features come from cpuid and xgetbv (the OS must save the registers), on Arm from the kernel's hwcaps or sysctl; core
// counts from sched_getaffinity, /sys/devices/system/cpu and the cgroup files, elsewhere from sysctl or
// std::thread::hardware_concurrency.
#include "base/cpu_info.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#define SR_X86 1
#include <cpuid.h>
#elif defined(__aarch64__)
#define SR_ARM64 1
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace sr {
namespace {

#if SR_X86
struct Regs {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Regs cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Regs r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros for a leaf that the CPU lacks
  return r;
}

// Register sets that the operating system saves on a switch; xgetbv only exists where OSXSAVE says so.
uint64_t saved_registers() {
  if (!(cpuid(1).c >> 27 & 1)) return 0;
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return uint64_t(hi) << 32 | lo;
}

std::vector<std::string> read_features() {
  const Regs l1 = cpuid(1), l7 = cpuid(7), l71 = cpuid(7, 1), e1 = cpuid(0x80000001u);
  const uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;
  std::vector<std::string> out;
  auto add = [&](const char* name, bool has) {
    if (has) out.push_back(name);
  };
  add("sse3", l1.c & 1);
  add("ssse3", l1.c >> 9 & 1);
  add("sse4.1", l1.c >> 19 & 1);
  add("sse4.2", l1.c >> 20 & 1);
  add("popcnt", l1.c >> 23 & 1);
  add("avx", ymm && (l1.c >> 28 & 1));
  add("f16c", ymm && (l1.c >> 29 & 1));
  add("fma", ymm && (l1.c >> 12 & 1));
  add("lzcnt", e1.c >> 5 & 1);
  add("bmi1", l7.b >> 3 & 1);
  add("avx2", ymm && (l7.b >> 5 & 1));
  add("bmi2", l7.b >> 8 & 1);
  add("avx512f", zmm && (l7.b >> 16 & 1));
  add("avx512dq", zmm && (l7.b >> 17 & 1));
  add("avx512bw", zmm && (l7.b >> 30 & 1));
  add("avx512vl", zmm && (l7.b >> 31 & 1));
  add("avx512vbmi", zmm && (l7.c >> 1 & 1));
  add("avx512vnni", zmm && (l7.c >> 11 & 1));
  add("avx512bf16", zmm && (l71.a >> 5 & 1));
  add("avxvnni", ymm && (l71.a >> 4 & 1));
  return out;
}

std::string read_brand() {
  if (cpuid(0x80000000u).a < 0x80000004u) return "x86";
  char text[49] = {};
  for (uint32_t i = 0; i < 3; i++) {
    const Regs r = cpuid(0x80000002u + i);
    std::memcpy(text + 16 * i, &r.a, 4);
    std::memcpy(text + 16 * i + 4, &r.b, 4);
    std::memcpy(text + 16 * i + 8, &r.c, 4);
    std::memcpy(text + 16 * i + 12, &r.d, 4);
  }
  std::string brand(text);
  const size_t first = brand.find_first_not_of(' ');
  if (first == std::string::npos) return "x86";
  return brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}
#elif SR_ARM64
struct ArmFeature {
  const char* name;
  int word, bit;        // Linux: AT_HWCAP (0) or AT_HWCAP2 (1); numbers of its ABI, of which older headers lack some
  const char* sysctl;   // macOS
};
constexpr ArmFeature kArmFeatures[] = {
    {"fp16", 0, 10, "hw.optional.arm.FEAT_FP16"},   {"dotprod", 0, 20, "hw.optional.arm.FEAT_DotProd"},
    {"sve", 0, 22, "hw.optional.arm.FEAT_SVE"},     {"sve2", 1, 1, "hw.optional.arm.FEAT_SVE2"},
    {"i8mm", 1, 13, "hw.optional.arm.FEAT_I8MM"},   {"bf16", 1, 14, "hw.optional.arm.FEAT_BF16"},
};

std::vector<std::string> read_features() {
  std::vector<std::string> out = {"neon"};  // part of the base architecture
#if defined(__linux__)
  const unsigned long words[2] = {getauxval(AT_HWCAP), getauxval(26)};  // 26: AT_HWCAP2
#endif
  for (const ArmFeature& f : kArmFeatures) {
#if defined(__linux__)
    if (words[f.word] >> f.bit & 1) out.push_back(f.name);
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    if (sysctlbyname(f.sysctl, &value, &size, nullptr, 0) == 0 && value) out.push_back(f.name);
#else
    (void)f;
#endif
  }
  return out;
}

std::string read_brand() {
#if defined(__APPLE__)
  char text[128] = {};
  size_t size = sizeof text - 1;
  if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0 && text[0]) return text;
#elif defined(__linux__)
  // Boards and phones have a name in the device tree; the processor itself has only numbers.
  std::ifstream board("/proc/device-tree/model");
  std::string text;
  if (std::getline(board, text, '\0') && !text.empty()) return text;
  std::ifstream in("/proc/cpuinfo");
  std::string line, implementer, part;
  while (std::getline(in, line)) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.rfind("CPU implementer", 0) == 0) implementer = line.substr(colon + 2);
    if (line.rfind("CPU part", 0) == 0) part = line.substr(colon + 2);
  }
  if (!part.empty()) return "Arm, implementer " + implementer + ", part " + part;
#endif
  return "Arm";
}
#else
std::vector<std::string> read_features() { return {}; }
std::string read_brand() { return "unknown"; }
#endif

int machine_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

#if defined(__linux__)
std::string read_line(const std::string& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

std::string cpu_dir(int cpu) { return "/sys/devices/system/cpu/cpu" + std::to_string(cpu); }

// A core's name: the same text for all its SMT siblings.
std::string core_key(int cpu) {
  std::string siblings = read_line(cpu_dir(cpu) + "/topology/thread_siblings_list");
  if (siblings.empty()) siblings = read_line(cpu_dir(cpu) + "/topology/core_cpus_list");
  return siblings.empty() ? "cpu" + std::to_string(cpu) : siblings;
}

std::vector<int> affinity_cpus() {
  // The mask can be wider than cpu_set_t on big machines: grow until the kernel accepts it.
  for (int bits = 1024; bits <= 1 << 18; bits *= 4) {
    cpu_set_t* set = CPU_ALLOC(bits);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(bits);
    CPU_ZERO_S(bytes, set);
    std::vector<int> cpus;
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    for (int i = 0; ok && i < bits; i++) {
      if (CPU_ISSET_S(i, bytes, set)) cpus.push_back(i);
    }
    CPU_FREE(set);
    if (ok) return cpus;
  }
  return {};
}

// Cores allowed by one cgroup directory's quota, or 0 for no limit.
double quota_of(const std::string& dir) {
  std::istringstream v2(read_line(dir + "/cpu.max"));
  std::string quota;
  double period = 0;
  if (v2 >> quota >> period) return quota == "max" || period <= 0 ? 0 : std::atof(quota.c_str()) / period;
  const double us = std::atof(read_line(dir + "/cpu.cfs_quota_us").c_str());
  period = std::atof(read_line(dir + "/cpu.cfs_period_us").c_str());
  return us > 0 && period > 0 ? us / period : 0;
}

// The smallest quota on the way from this process's cgroup to the root, v1 or v2; 0 for no limit.
double cgroup_cores() {
  double best = 0;
  std::ifstream in("/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {  // "id:controllers:path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::vector<std::string> roots;
    if (controllers.empty()) {
      roots = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      roots = {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/" + controllers};
    } else {
      continue;
    }
    for (const std::string& root : roots) {
      std::string path = line.substr(second + 1);
      for (;;) {  // in a container the path may not exist under the mount: the root is looked at all the same
        while (!path.empty() && path.back() == '/') path.pop_back();
        const double cores = quota_of(root + path);
        if (cores > 0) best = best > 0 ? std::min(best, cores) : cores;
        if (path.empty()) break;
        const size_t slash = path.rfind('/');
        path = slash == std::string::npos ? "" : path.substr(0, slash);
      }
    }
  }
  return best;
}

int count_cores(const std::vector<int>& cpus) {
  std::set<std::string> cores;
  for (int cpu : cpus) cores.insert(core_key(cpu));
  return std::max(1, int(cores.size()));
}

void read_cores(CpuInfo* info, int* threads) {
  std::vector<int> all;
  const long configured = sysconf(_SC_NPROCESSORS_CONF);
  for (int cpu = 0; cpu < configured; cpu++) {
    if (access(cpu_dir(cpu).c_str(), F_OK) == 0) all.push_back(cpu);
  }
  std::vector<int> allowed = affinity_cpus();
  info->physical_cores = all.empty() ? machine_threads() : count_cores(all);
  info->allowed_cores = allowed.empty() ? info->physical_cores : count_cores(allowed);
  int fast = allowed.empty() ? info->allowed_cores : count_cores(fast_cpus(allowed, "/sys/devices/system/cpu"));
  const double quota = cgroup_cores();
  if (quota > 0) {
    const int most = std::max(1, int(std::ceil(quota)));
    info->allowed_cores = std::min(info->allowed_cores, most);
    fast = std::min(fast, most);
  }
  *threads = fast;
}
#else
void read_cores(CpuInfo* info, int* threads) {
  info->physical_cores = info->allowed_cores = *threads = machine_threads();
#if defined(__APPLE__)
  int cores = 0, fast = 0;
  size_t size = sizeof cores;
  if (sysctlbyname("hw.physicalcpu", &cores, &size, nullptr, 0) == 0 && cores > 0)
    info->physical_cores = info->allowed_cores = *threads = cores;
  size = sizeof fast;  // the performance cores of Apple's own processors
  if (sysctlbyname("hw.perflevel0.physicalcpu", &fast, &size, nullptr, 0) == 0 && fast > 0) {
    *threads = std::min(fast, cores);
  }
#endif
}
#endif

struct Everything {
  CpuInfo info;
  int threads = 1;
};

const Everything& everything() {
  static const Everything all = [] {
    Everything e;
    e.info.brand = read_brand();
    e.info.features = read_features();
    read_cores(&e.info, &e.threads);
    return e;
  }();
  return all;
}

bool has_all(std::initializer_list<const char*> names) {
  const std::vector<std::string>& f = cpu_info().features;
  return std::all_of(names.begin(), names.end(),
                     [&](const char* name) { return std::find(f.begin(), f.end(), name) != f.end(); });
}

}  // namespace

std::vector<int> fast_cpus(const std::vector<int>& cpus, const std::string& folder) {
  for (const char* file : {"/cpu_capacity", "/cpufreq/cpuinfo_max_freq"}) {
    std::vector<double> speed;
    for (int cpu : cpus) {
      std::ifstream in(folder + "/cpu" + std::to_string(cpu) + file);
      double value = 0;
      if (in >> value) speed.push_back(value);
    }
    if (speed.empty() || speed.size() != cpus.size()) continue;
    const double top = *std::max_element(speed.begin(), speed.end());
    std::vector<int> out;
    for (size_t i = 0; i < cpus.size(); i++) {
      if (speed[i] >= 0.7 * top) out.push_back(cpus[i]);
    }
    return out;
  }
  return cpus;
}

const CpuInfo& cpu_info() { return everything().info; }

int default_threads() { return everything().threads; }

bool cpu_supports_isa(const std::string& name) {
  if (name == "generic") return true;
  const bool avx2 = has_all({"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"});
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx2 && has_all({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"});
  if (name == "neon") return has_all({"neon"});
  if (name == "neon_dotprod") return has_all({"neon", "dotprod"});
  if (name == "neon_i8mm") return has_all({"neon", "dotprod", "i8mm"});
  return false;
}

}  // namespace sr
