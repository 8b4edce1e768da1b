// What this processor and this process may use: instruction sets, cores, the share of them that the cgroup grants.
#pragma once

#include <string>
#include <vector>

namespace sr {

struct CpuInfo {
  std::string brand;
  std::vector<std::string> features;  // lower-case names, in a fixed order
  int physical_cores = 1;             // cores of the machine, SMT siblings counted once
  int allowed_cores = 1;              // of these, cores in the affinity mask, at most the cgroup quota
};

// Read once; affinity and quota are those of the first call.
const CpuInfo& cpu_info();

// Whether processor and operating system can run code of "generic", "avx2", "avx512", "neon", "neon_dotprod" or
// "neon_i8mm".
bool cpu_supports_isa(const std::string& name);

// CPUs of the fastest kind among `cpus` (big.LITTLE, hybrid x86), from files in `folder` as Linux has them in
// /sys/devices/system/cpu: at least 0.7 of the best cpu_capacity or, where no such file is, of the highest maximum
// frequency; all where neither is known. A pool is as slow at every barrier as its slowest member.
std::vector<int> fast_cpus(const std::vector<int>& cpus, const std::string& folder);

// Threads for compute: the physical cores allowed by affinity mask and cgroup quota, the fast ones where cores differ.
int default_threads();

}  // namespace sr
