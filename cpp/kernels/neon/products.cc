// NEON matrix products: simd/ with this variant's primitives; i8mm has its own prefill.
#include "kernels/neon/kernels.h"
#include "kernels/neon/vec.h"
#include "kernels/simd/gemm.h"
#include "kernels/simd/gemv.h"
#if SR_NEON_LEVEL >= 2
#include "kernels/neon/gemm_i8mm.h"
#endif

namespace sr {
namespace SR_NEON {

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
#if SR_NEON_LEVEL >= 2
  simd::dispatch_layout<I8mmLayout, Vec>(w, x, n, tile_begin, tile_end, y, ldy, scratch);
#else
  simd::gemm_q<Vec>(w, x, n, tile_begin, tile_end, y, ldy, scratch);
#endif
}
void gemm_f(const PanelMatrix& w, const float* x, size_t ldx, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void* scratch) {
  simd::gemm_f<Vec>(w, x, ldx, n, tile_begin, tile_end, y, ldy, scratch);
}

}  // namespace SR_NEON
}  // namespace sr
