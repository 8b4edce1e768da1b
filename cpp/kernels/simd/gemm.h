// Matrix-matrix products on the stored panels (prefill), for any Vec.
//
// A tile's codes are unpacked once into bytes (all columns, MR rows together, four columns interleaved) with fp32
// scales and minima; then blocks of NT vectors run over them with integer dot products. Per group of columns the
// operations on each output are those of gemv in the same order, so the results are the same bits.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/panels.h"
#include "kernels/simd/gemv.h"
#include "kernels/table.h"

namespace sr {
namespace simd {

// Scratch of one tile: codes [64 / MR][cols / c][MR][c] u8, c = 4 kGemmQuads, then scale and min [groups][64] fp32.
template <class V>
struct TileScratch {
  static constexpr int MR = V::kGemmRows;
  uint8_t* codes;
  float* scale;
  float* min;

  TileScratch(const PanelMatrix& w, void* memory) {
    codes = static_cast<uint8_t*>(memory);
    scale = reinterpret_cast<float*>(codes + size_t(kTileRows) * w.padded_cols());
    min = scale + size_t(w.slabs()) * (kSlabCols / w.group) * kTileRows;
  }
};

// Scales and minima of one slab of a tile, the latter moved to signed codes.
template <class V, int BITS, bool MIN, int GROUP, bool UNITS>
void unpack_scales(const uint8_t* slab, const uint16_t* units, const TilePlace& at, float* scale, float* min) {
  constexpr int kParts = kSlabCols / GROUP, kBytes = UNITS ? 1 : 2;
  for (int p = 0; p < kParts; ++p)
    for (int k = 0; k < kTileRows; k += V::kLanes) {
      const auto plane = [&](int i) {
        return Scales{slab + (size_t(i) * at.R + at.row) * kBytes, UNITS ? units + size_t(i / kParts) * at.R : nullptr};
      };
      const auto sc = load_scales<V, UNITS>(plane(p), k);
      V::store(scale + p * kTileRows + k, sc);
      if (MIN)
        V::store(min + p * kTileRows + k,
                 V::fma(sc, V::set1(float(1 << (BITS - 1))), load_scales<V, UNITS>(plane(kParts + p), k)));
    }
}

template <class V, int BITS, bool MIN, int GROUP>
void unpack_tile(const PanelMatrix& w, const TilePlace& at, const TileScratch<V>& out) {
  using P = Panel<V, BITS>;
  constexpr int kParts = kSlabCols / GROUP;
  const size_t run_bytes = w.run_bytes(at.R);
  const int quads = w.padded_cols() / 4;
  for (int s = 0; s < w.slabs(); ++s) {
    const uint8_t* slab = at.panel + size_t(s) * w.slab_bytes(at.R);
    float *scale = out.scale + size_t(s) * kParts * kTileRows, *min = out.min + size_t(s) * kParts * kTileRows;
    if (at.units) {
      const auto* units = reinterpret_cast<const uint16_t*>(at.units + w.unit_offset(s, at.R)) + at.row;
      unpack_scales<V, BITS, MIN, GROUP, true>(slab, units, at, scale, min);
    } else {
      unpack_scales<V, BITS, MIN, GROUP, false>(slab, nullptr, at, scale, min);
    }
    const uint8_t* low = slab + w.slab_head_bytes(at.R) + size_t(at.row / kTileRows) * P::kLow;
    const uint8_t* high = slab + w.slab_head_bytes(at.R) + at.R / 2 + size_t(at.row / kTileRows) * P::kHigh;
    const size_t step = V::kGemmQuads * 4 * run_bytes;
    for (int q = 0; q < kSlabCols / 4; q += V::kGemmQuads, low += step, high += step)
      V::template interleave_tile<BITS>(low, high, run_bytes, out.codes + size_t(s * 8 + q) * V::kGemmRows * 4,
                                        size_t(quads) * V::kGemmRows * 4);
  }
}

// NT vectors x MR rows over all columns, stretch by stretch.
template <class V, int BITS, bool MIN, int GROUP, int NT>
void gemm_block(const PanelMatrix& w, const QuantVector& x, int first, const uint8_t* codes, const float* scale,
                const float* min, float* y, size_t ldy) {
  constexpr int L = V::kLanes, NV = V::kGemmRows / L, kQuads = GROUP / 4, kParts = kSlabCols / GROUP;
  const int slabs = w.slabs();
  const size_t padded = w.padded_cols();
  const int8_t* q[NT];
  const float* xs[NT];
  const int32_t* sums[NT];
  for (int t = 0; t < NT; ++t) {
    q[t] = x.q + size_t(first + t) * padded;
    xs[t] = x.scale + size_t(first + t) * slabs;
    sums[t] = x.sum + 2 * size_t(first + t) * slabs;
  }
  typename V::F out[NT][NV];
  for (int stretch = 0, s = 0; stretch < w.stretches; ++stretch) {
    const int end = w.stretch_slab(stretch + 1);
    for (int t = 0; t < NT; ++t)
      for (int v = 0; v < NV; ++v) out[t][v] = V::zero();
    for (; s < end; ++s) {
      for (int p = 0; p < kParts; ++p) {
        typename V::template GemmAcc<BITS> acc[NT][NV];
        int32_t sum[NT];
        for (int t = 0; t < NT; ++t) {
          sum[t] = kParts == 1 ? sums[t][2 * s] + sums[t][2 * s + 1] : sums[t][2 * s + p];
          for (int v = 0; v < NV; ++v) acc[t][v].init(sum[t]);
        }
        // Not unrolled: GCC then puts all products before all additions and spills them.
#pragma GCC unroll 1
        for (int i = 0; i < kQuads; ++i) {
          typename V::I u[NV];
          for (int v = 0; v < NV; ++v) u[v] = V::load_codes(codes + v * L * 4);
          codes += V::kGemmRows * 4;
          for (int t = 0; t < NT; ++t) {
            const auto xq = V::load4(q[t] + s * kSlabCols + p * GROUP + 4 * i);
            for (int v = 0; v < NV; ++v) acc[t][v].add(u[v], xq);
          }
        }
        const size_t at = size_t(s * kParts + p) * kTileRows;
        for (int v = 0; v < NV; ++v) {
          const auto sc = V::load(scale + at + v * L);
          for (int t = 0; t < NT; ++t)
            out[t][v] = V::fma(V::mul(acc[t][v].to_float(), sc), V::set1(xs[t][s]), out[t][v]);
          if (MIN) {
            const auto mn = V::load(min + at + v * L);
            for (int t = 0; t < NT; ++t) out[t][v] = V::fma(mn, V::set1(xs[t][s] * float(sum[t])), out[t][v]);
          }
        }
      }
    }
    for (int t = 0; t < NT; ++t)
      for (int v = 0; v < NV; ++v) {
        float* to = y + (first + t) * ldy + v * L;
        V::store(to, stretch ? V::add(V::load(to), out[t][v]) : out[t][v]);
      }
  }
}

template <class V, int BITS, bool MIN, int GROUP>
struct GemmLayout {
  template <int NT>
  static void rest(const PanelMatrix& w, const QuantVector& x, int first, int n, const uint8_t* codes,
                   const float* scale, const float* min, float* y, size_t ldy) {
    if (n == NT) return gemm_block<V, BITS, MIN, GROUP, NT>(w, x, first, codes, scale, min, y, ldy);
    if constexpr (NT > 1) rest<NT - 1>(w, x, first, n, codes, scale, min, y, ldy);
  }
  static void run(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
                  void* memory) {
    constexpr int NT = V::kGemmVectors, MR = V::kGemmRows;
    const TileScratch<V> scratch(w, memory);
    for (int tile = tile_begin; tile < tile_end; ++tile) {
      unpack_tile<V, BITS, MIN, GROUP>(w, place_tile(w, tile), scratch);
      for (int first = 0; first < n; first += NT)
        for (int r = 0; r < kTileRows; r += MR)
          rest<NT>(w, x, first, std::min(NT, n - first), scratch.codes + size_t(r) * w.padded_cols(), scratch.scale + r,
                   scratch.min + r, y + size_t(tile) * kTileRows + r, ldy);
    }
  }
};

template <class V>
void gemm_q(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void* scratch) {
  dispatch_layout<GemmLayout, V>(w, x, n, tile_begin, tile_end, y, ldy, scratch);
}

// Float weights: NT vectors x MR rows with the sums in registers; 16-bit tiles are widened once into scratch.
template <class V, int NT>
void gemm_float_block(const float* tile, const float* x, size_t ldx, int cols, float* y, size_t ldy) {
  constexpr int L = V::kLanes, NV = V::kGemmRows / L;
  typename V::F acc[NT][NV];
  // Unrolled here and below: see gemv_float_tile.
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[t][v] = V::zero();
  for (int c = 0; c < cols; ++c) {
    typename V::F wv[NV];
    for (int v = 0; v < NV; ++v) wv[v] = V::load(tile + size_t(c) * kTileRows + v * L);
    for (int t = 0; t < NT; ++t) {
      const auto xc = V::set1(x[t * ldx + c]);
      for (int v = 0; v < NV; ++v) acc[t][v] = V::fma(wv[v], xc, acc[t][v]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) V::store(y + t * ldy + v * L, acc[t][v]);
}

template <class V, int NT>
void gemm_float_rest(const float* tile, const float* x, size_t ldx, int n, int cols, float* y, size_t ldy) {
  if (n == NT) return gemm_float_block<V, NT>(tile, x, ldx, cols, y, ldy);
  if constexpr (NT > 1) gemm_float_rest<V, NT - 1>(tile, x, ldx, n, cols, y, ldy);
}

template <class V>
void gemm_f(const PanelMatrix& w, const float* x, size_t ldx, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void* scratch) {
  constexpr int NT = V::kGemmVectors, MR = V::kGemmRows, L = V::kLanes;
  const size_t item = w.kind == WeightKind::f32 ? 4 : 2, count = size_t(w.cols) * kTileRows;
  for (int t = tile_begin; t < tile_end; ++t) {
    const TilePlace at = place_tile(w, t);
    const uint8_t* bytes = at.panel + size_t(at.row) * w.cols * item;
    const float* tile = reinterpret_cast<const float*>(bytes);
    if (item == 2) {
      float* wide = static_cast<float*>(scratch);
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(bytes);
      for (size_t i = 0; i < count; i += L)
        V::store(wide + i, w.kind == WeightKind::f16 ? V::load_f16(halves + i) : V::load_bf16(halves + i));
      tile = wide;
    }
    for (int first = 0; first < n; first += NT)
      for (int r = 0; r < kTileRows; r += MR)
        gemm_float_rest<V, NT>(tile + r, x + first * ldx, ldx, std::min(NT, n - first), w.cols,
                               y + first * ldy + size_t(t) * kTileRows + r, ldy);
  }
}

}  // namespace simd
}  // namespace sr
