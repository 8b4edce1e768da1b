// AVX-512 matrix products: simd/ with this set's primitives.
#include "kernels/avx512/kernels.h"
#include "kernels/avx512/vec.h"
#include "kernels/simd/gemm.h"
#include "kernels/simd/gemv.h"

namespace sr {
namespace avx512 {

void gemv_q(const PanelMatrix& w, const QuantVector& x, int tile_begin, int tile_end, float* y) {
  simd::gemv_q<Vec>(w, x, nullptr, tile_begin, tile_end, y);
}
void gemv_q_cols(const PanelMatrix& w, const QuantVector& x, const ActiveColumns& active, int tile_begin, int tile_end,
                 float* y) {
  simd::gemv_q<Vec>(w, x, &active, tile_begin, tile_end, y);
}
void gemv_f(const PanelMatrix& w, const float* x, int tile_begin, int tile_end, float* y) {
  simd::gemv_f<Vec>(w, x, tile_begin, tile_end, y);
}
void gemm_q(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void* scratch) {
  simd::gemm_q<Vec>(w, x, n, tile_begin, tile_end, y, ldy, scratch);
}
void gemm_f(const PanelMatrix& w, const float* x, size_t ldx, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void* scratch) {
  simd::gemm_f<Vec>(w, x, ldx, n, tile_begin, tile_end, y, ldy, scratch);
}

}  // namespace avx512
}  // namespace sr
