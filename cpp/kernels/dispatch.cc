// Chooses the kernel table of this process once.
#include <cstdlib>
#include <string>

#include "base/cpu_info.h"
#include "kernels/generic/generic.h"
#include "kernels/table.h"
#include "sparse_run/error.h"

namespace sr {

#ifdef SR_HAVE_AVX512
const KernelTable& avx512_table();
#endif
#ifdef SR_HAVE_AVX2
const KernelTable& avx2_table();
#endif

const IsaEntry* isa_entries(int* count) {
  static const IsaEntry entries[] = {
#ifdef SR_HAVE_AVX512
      {&avx512_table(), cpu_supports_isa("avx512")},
#endif
#ifdef SR_HAVE_AVX2
      {&avx2_table(), cpu_supports_isa("avx2")},
#endif
      {&generic_table(), true},
  };
  *count = int(sizeof entries / sizeof entries[0]);
  return entries;
}

namespace {

const KernelTable& choose() {
  int n = 0;
  const IsaEntry* entries = isa_entries(&n);
  const char* forced = std::getenv("SPARSE_RUN_FORCE_ISA");
  if (!forced || !*forced) {
    for (int i = 0; i < n; ++i)
      if (entries[i].supported) return *entries[i].table;
  }
  std::string known;
  for (int i = 0; i < n; ++i) {
    if (forced && std::string(forced) == entries[i].table->name) {
      if (entries[i].supported) return *entries[i].table;
      throw Error(ErrorCode::isa, std::string("SPARSE_RUN_FORCE_ISA=") + forced +
                                      ": this processor or operating system lacks it; unset the variable or use generic");
    }
    known += std::string(known.empty() ? "" : ", ") + entries[i].table->name;
  }
  throw Error(ErrorCode::isa, std::string("SPARSE_RUN_FORCE_ISA=") + (forced ? forced : "") +
                                  ": not in this build; built: " + known);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

size_t gemm_scratch_bytes(const PanelMatrix& w) {
  if (!is_quantised(w.kind)) return size_t(kTileRows) * w.cols * sizeof(float) + 64;
  // Codes as bytes, and per group two floats for each row.
  return size_t(kTileRows) * w.padded_cols() + size_t(w.slabs()) * (kSlabCols / w.group) * kTileRows * 8 + 64;
}

}  // namespace sr
