// The table of one Arm variant.
#include "kernels/neon/kernels.h"

#define SR_TEXT2(x) #x
#define SR_TEXT(x) SR_TEXT2(x)
#define SR_JOIN2(a, b) a##b
#define SR_JOIN(a, b) SR_JOIN2(a, b)

namespace sr {

const KernelTable& SR_JOIN(SR_NEON, _table)() {
  namespace k = SR_NEON;
  static const KernelTable table = {SR_TEXT(SR_NEON), k::quantise, k::select,     k::gemv_q,   k::gemv_q_cols,
                                    k::gemv_f,        k::gemm_q,   k::gemm_f,     k::rms_norm, k::layer_norm,
                                    k::activate,      k::attend,   k::to_f16,     k::read_sum,
                                    k::rows_q,        k::rows_f,     k::rows_gemm_q, k::rows_gemm_f};
  return table;
}

}  // namespace sr
