// The AVX2 table.
#include "kernels/avx2/kernels.h"

namespace sr {

const KernelTable& avx2_table() {
  static const KernelTable table = {
      "avx2",       avx2::quantise, avx2::select,   avx2::gemv_q,     avx2::gemv_q_cols, avx2::gemv_f,
      avx2::gemm_q, avx2::gemm_f,   avx2::rms_norm, avx2::layer_norm, avx2::activate,    avx2::attend,
      avx2::to_f16, avx2::read_sum, avx2::rows_q,   avx2::rows_f,     avx2::rows_gemm_q, avx2::rows_gemm_f};
  return table;
}

}  // namespace sr
