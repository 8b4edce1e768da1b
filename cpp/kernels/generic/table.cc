// The generic table: plain C++, readable, the oracle of all other instruction sets.
#include "kernels/generic/generic.h"

namespace sr {

const KernelTable& generic_table() {
  static const KernelTable table = {
      "generic",         generic::quantise,    generic::select,     generic::gemv_q,   generic::gemv_q_cols,
      generic::gemv_f,   generic::gemm_q,      generic::gemm_f,     generic::rms_norm, generic::layer_norm,
      generic::activate, generic::attend,      generic::to_f16,     generic::read_sum, generic::rows_q,
      generic::rows_f,   generic::rows_gemm_q, generic::rows_gemm_f};
  return table;
}

}  // namespace sr
