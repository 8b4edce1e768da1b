// The AVX-512 table.
#include "kernels/avx512/kernels.h"

namespace sr {

const KernelTable& avx512_table() {
  static const KernelTable table = {
      "avx512",       avx512::quantise, avx512::select,   avx512::gemv_q,     avx512::gemv_q_cols, avx512::gemv_f,
      avx512::gemm_q, avx512::gemm_f,   avx512::rms_norm, avx512::layer_norm, avx512::activate,    avx512::attend,
      avx512::to_f16, avx512::read_sum, avx512::rows_q,   avx512::rows_f,     avx512::rows_gemm_q, avx512::rows_gemm_f};
  return table;
}

}  // namespace sr
