// Processor facts are consistent with each other.
#include "base/cpu_info.h"

#include "check.h"

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
}
