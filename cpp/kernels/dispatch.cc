// Chooses the kernel table of this process once.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "base/cpu_info.h"
#include "kernels/generic/generic.h"
#include "kernels/panels.h"
#include "kernels/table.h"
#include "sparse_run/error.h"

namespace sr {

#ifdef SR_HAVE_AVX512
const KernelTable& avx512_table();
#endif
#ifdef SR_HAVE_AVX2
const KernelTable& avx2_table();
#endif
#ifdef SR_HAVE_NEON_I8MM
const KernelTable& neon_i8mm_table();
#endif
#ifdef SR_HAVE_NEON_DOTPROD
const KernelTable& neon_dotprod_table();
#endif
#ifdef SR_HAVE_NEON
const KernelTable& neon_table();
#endif

const IsaEntry* isa_entries(int* count) {
  static const IsaEntry entries[] = {
#ifdef SR_HAVE_AVX512
      {&avx512_table(), cpu_supports_isa("avx512")},
#endif
#ifdef SR_HAVE_AVX2
      {&avx2_table(), cpu_supports_isa("avx2")},
#endif
#ifdef SR_HAVE_NEON_I8MM
      {&neon_i8mm_table(), cpu_supports_isa("neon_i8mm")},
#endif
#ifdef SR_HAVE_NEON_DOTPROD
      {&neon_dotprod_table(), cpu_supports_isa("neon_dotprod")},
#endif
#ifdef SR_HAVE_NEON
      {&neon_table(), cpu_supports_isa("neon")},
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
      throw Error(ErrorCode::isa,
                  std::string("SPARSE_RUN_FORCE_ISA=") + forced +
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

void prefetch_start(const PanelMatrix& w, int tile_begin, int tile_end, int lines) {
  if (tile_begin >= tile_end) return;
  const TilePlace at = place_tile(w, tile_begin);
  const int tiles = std::min(tile_end - tile_begin, (at.R - at.row) / kTileRows);
  if (!is_quantised(w.kind)) {
    const uint8_t* p = at.panel + size_t(at.row) * w.cols * (w.kind == WeightKind::f32 ? 4 : 2);
    for (int i = 0; i < lines; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
    return;
  }
  const size_t item = w.scale_bytes(), head_row = size_t(at.row) * item, run = w.run_bytes(at.R);
  const int head_lines = tiles * kTileRows * int(item) / 64, heads = 32 / w.group * w.planes();
  for (int h = 0; h < heads && lines > 0; ++h)
    for (int i = 0; i < head_lines && lines > 0; ++i, --lines)
      __builtin_prefetch(at.panel + size_t(h) * at.R * item + head_row + 64 * i, 0, 2);
  const uint8_t* runs = at.panel + w.slab_head_bytes(at.R) + size_t(at.row) * (w.kind == WeightKind::q8 ? 8 : 4) / 8;
  const int run_lines = (tiles * kTileRows * (w.kind == WeightKind::q8 ? 8 : 4) / 8 + 63) / 64;
  for (int i = 0; i < run_lines && lines > 0; ++i)
    for (int c = 0; c < kSlabCols && lines > 0; ++c, --lines) __builtin_prefetch(runs + c * run + 64 * i, 0, 2);
}

size_t gemm_scratch_bytes(const PanelMatrix& w) {
  if (!is_quantised(w.kind)) return size_t(kTileRows) * w.cols * sizeof(float) + 64;
  // Codes as bytes, and per group two floats for each row.
  return size_t(kTileRows) * w.padded_cols() + size_t(w.slabs()) * (kSlabCols / w.group) * kTileRows * 8 + 64;
}

}  // namespace sr
