// Matrix products on stored panels, one tile and one slab at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/f16.h"
#include "kernels/generic/generic.h"
#include "kernels/panels.h"

namespace sr {
namespace generic {
namespace {

// One tile x one slab, unpacked: signed codes u - bias, scales, and minima moved to that bias.
struct TileSlab {
  int8_t w[kSlabCols][kTileRows];
  float scale[2][kTileRows];
  float min[2][kTileRows];
};

float half_at(const uint8_t* p, size_t i) {
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return f16_to_f32(h);
}

// active: the columns that are wanted, where they are held apart.
void unpack(const PanelMatrix& m, const TilePlace& at, int slab_index, TileSlab* out,
            const ActiveColumns* active = nullptr) {
  const uint8_t* slab = at.panel + size_t(slab_index) * m.slab_bytes(at.R);
  const int parts = kSlabCols / m.group, bias = code_bias(m.kind);
  const uint8_t* units = m.unit_slabs ? at.units + m.unit_offset(slab_index, at.R) : nullptr;
  // Scale or minimum i of the slab, of the tile's row r; with units the product is exact in fp32.
  const auto scale_at = [&](int i, int r) {
    const size_t place = size_t(i) * at.R + at.row + r;
    if (!units) return half_at(slab, place);
    return float(int8_t(slab[place])) * half_at(units, size_t(i / parts) * at.R + at.row + r);
  };
  for (int p = 0; p < parts; ++p)
    for (int i = 0; i < kTileRows; ++i) {
      out->scale[p][i] = scale_at(p, i);
      out->min[p][i] = m.has_min ? std::fma(out->scale[p][i], float(bias), scale_at(parts + p, i)) : 0.0f;
    }
  const size_t run_bytes = m.run_bytes(at.R);
  const int first = slab_index * kSlabCols, columns = at.runs ? active->count[slab_index] : kSlabCols;
  for (int i = 0; i < columns; ++i) {
    const int c = at.runs ? active->cols[first + i] : i;
    const uint8_t* run = at.runs ? at.runs + active->place[first + i] : slab + m.slab_head_bytes(at.R) + c * run_bytes;
    int8_t* w = out->w[c];
    if (m.kind == WeightKind::q8) {
      for (int i = 0; i < kTileRows; ++i) w[i] = int8_t(run[at.row + i] - 128);
      continue;
    }
    const uint8_t* low = run + at.row / 2;
    int u[kTileRows];
    for (int i = 0; i < 32; ++i) {
      u[i] = low[i] & 15;
      u[i + 32] = low[i] >> 4;
    }
    if (m.kind == WeightKind::q5) {
      const uint8_t* high = run + at.R / 2 + at.row / 8;
      for (int i = 0; i < kTileRows; ++i) u[i] |= (high[i % 8] >> (i / 8) & 1) << 4;
    } else if (m.kind == WeightKind::q6) {
      const uint8_t* high = run + at.R / 2 + at.row / 4;
      for (int i = 0; i < kTileRows; ++i) u[i] |= (high[i % 16] >> (i / 16 * 2) & 3) << 4;
    }
    for (int i = 0; i < kTileRows; ++i) w[i] = int8_t(u[i] - bias);
  }
}

// y[0..63] += the slab's share for one vector; columns in [0, 32) chosen by cols[0..count), or all if cols is null.
void accumulate(const PanelMatrix& m, const TileSlab& t, const int8_t* q, float x_scale, const int32_t* x_sum,
                const uint8_t* cols, int count, float* y) {
  const int parts = kSlabCols / m.group;
  int32_t acc[2][kTileRows] = {};
  for (int i = 0; i < count; ++i) {
    const int c = cols ? cols[i] : i;
    int32_t* a = acc[c / m.group];
    const int32_t x = q[c];
    for (int r = 0; r < kTileRows; ++r) a[r] += x * t.w[c][r];
  }
  for (int p = 0; p < parts; ++p) {
    const float sum = x_scale * float(parts == 1 ? x_sum[0] + x_sum[1] : x_sum[p]);
    for (int r = 0; r < kTileRows; ++r) {
      y[r] = std::fma(float(acc[p][r]) * t.scale[p][r], x_scale, y[r]);
      if (m.has_min) y[r] = std::fma(t.min[p][r], sum, y[r]);
    }
  }
}

// out[0..63]: one stretch of one tile.
void one_stretch(const PanelMatrix& w, const QuantVector& x, const ActiveColumns* active, int tile, int k, float* out) {
  const TilePlace at = place_tile(w, tile);
  TileSlab t;
  std::memset(out, 0, kTileRows * sizeof(float));
  for (int s = w.stretch_slab(k); s < w.stretch_slab(k + 1); ++s) {
    if (active && active->count[s] == 0) continue;
    unpack(w, at, s, &t, active);
    accumulate(w, t, x.q + s * kSlabCols, x.scale[s], x.sum + 2 * s, active ? active->cols + s * kSlabCols : nullptr,
               active ? active->count[s] : kSlabCols, out);
  }
}

float load_float(WeightKind kind, const uint8_t* p, size_t i) {
  if (kind == WeightKind::f32) {
    float f;
    std::memcpy(&f, p + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return kind == WeightKind::f16 ? f16_to_f32(h) : bf16_to_f32(h);
}

}  // namespace

void gemm_q(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void*) {
  constexpr int kTogether = 16;  // vectors for which a tile is unpacked once
  TileSlab t;
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const TilePlace at = place_tile(w, tile);
    for (int first = 0; first < n; first += kTogether) {
      const int last = std::min(n, first + kTogether);
      for (int k = 0; k < w.stretches; ++k) {
        float sums[kTogether][kTileRows] = {};
        for (int s = w.stretch_slab(k); s < w.stretch_slab(k + 1); ++s) {
          unpack(w, at, s, &t);
          for (int v = first; v < last; ++v) {
            const size_t slab = size_t(v) * size_t(w.slabs()) + size_t(s);
            accumulate(w, t, x.q + slab * kSlabCols, x.scale[slab], x.sum + 2 * slab, nullptr, kSlabCols,
                       sums[v - first]);
          }
        }
        for (int v = first; v < last; ++v) {
          float* out = y + v * ldy + size_t(tile) * kTileRows;
          for (int r = 0; r < kTileRows; ++r) out[r] = k ? out[r] + sums[v - first][r] : sums[v - first][r];
        }
      }
    }
  }
}

void gemv_q(const PanelMatrix& w, const QuantVector& x, int tile_begin, int tile_end, float* y) {
  for (int k = w.stretch_begin; k < w.stretch_end; ++k, y += w.sums_apart) {
    for (int t = tile_begin; t < tile_end; ++t) one_stretch(w, x, nullptr, t, k, y + size_t(t) * kTileRows);
  }
}

void gemv_q_cols(const PanelMatrix& w, const QuantVector& x, const ActiveColumns& active, int tile_begin, int tile_end,
                 float* y) {
  for (int k = w.stretch_begin; k < w.stretch_end; ++k, y += w.sums_apart) {
    for (int t = tile_begin; t < tile_end; ++t) one_stretch(w, x, &active, t, k, y + size_t(t) * kTileRows);
  }
}

void gemm_f(const PanelMatrix& w, const float* x, size_t ldx, int n, int tile_begin, int tile_end, float* y, size_t ldy,
            void*) {
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    const TilePlace at = place_tile(w, tile);
    const size_t base = size_t(at.row) * w.cols;
    for (int v = 0; v < n; ++v) {
      float acc[kTileRows] = {};
      for (int c = 0; c < w.cols; ++c)
        for (int r = 0; r < kTileRows; ++r)
          acc[r] = std::fma(load_float(w.kind, at.panel, base + size_t(c) * kTileRows + r), x[v * ldx + c], acc[r]);
      std::memcpy(y + v * ldy + size_t(tile) * kTileRows, acc, sizeof acc);
    }
  }
}

void gemv_f(const PanelMatrix& w, const float* x, int tile_begin, int tile_end, float* y) {
  gemm_f(w, x, 0, 1, tile_begin, tile_end, y, 0, nullptr);
}

}  // namespace generic
}  // namespace sr
