// Matrix-vector products on stored panels, dense and on active columns, for any Vec.
//
// One slab (32 columns) at a time; inside it tile after tile (64 rows), all columns of the slab into registers, four
// columns an instruction. The columns of a slab are up to 32 streams that advance by half a line a tile; lines of
// a slab further on are prefetched meanwhile, so that DRAM sees one long request queue whatever columns are skipped.
// The dense product is the product on all columns: the same code, the same sums, the same bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/panels.h"
#include "kernels/table.h"

namespace sr {
namespace simd {

// The columns of one slab that are visited, as offsets into the slab's runs, in quads; per scale group.
struct SlabPlan {
  uint32_t off[2 * kSlabCols];
  uint32_t x4[2 * kSlabCols / 4];
  int quads[2];  // per group; the second group's quads follow the first's
  int columns;   // entries of off
};

// Columns cols[0..count) (ascending; null = all 32) of a slab whose runs are run_bytes apart. A group's last quad is
// filled up with an input of 0 on a column that is read anyway.
static void plan_slab(const int8_t* q, const uint8_t* cols, int count, int group, uint32_t run_bytes, SlabPlan* plan) {
  if (!cols) {
    for (int c = 0; c < kSlabCols; ++c) plan->off[c] = c * run_bytes;
    std::memcpy(plan->x4, q, kSlabCols);
    plan->quads[0] = group / 4;
    plan->quads[1] = group == 16 ? 4 : 0;
    plan->columns = kSlabCols;
    return;
  }
  int n = 0, i = 0;
  for (int part = 0; part < kSlabCols / group; ++part) {
    const int start = n;
    for (; i < count && cols[i] < (part + 1) * group; ++i, ++n) {
      plan->off[n] = cols[i] * run_bytes;
      reinterpret_cast<int8_t*>(plan->x4)[n] = q[cols[i]];
    }
    if (n > start)
      for (; n % 4; ++n) {
        plan->off[n] = plan->off[n - 1];
        reinterpret_cast<int8_t*>(plan->x4)[n] = 0;
      }
    plan->quads[part] = (n - start) / 4;
  }
  if (group == 32) plan->quads[1] = 0;
  plan->columns = n;
}

template <class V, int BITS>
struct Panel {
  static constexpr int kLow = BITS == 8 ? 64 : 32;                     // bytes of a tile in the first plane of a run
  static constexpr int kHigh = BITS == 5 ? 8 : BITS == 6 ? 16 : 0;  // and in the second
};

// y[0..63] = fma(sum * scale, x_scale, y), and the minimum's share.
template <class V, int BITS, bool MIN>
inline void add_slab(typename V::template Acc<BITS>& acc, const uint16_t* scale, const uint16_t* min, float x_scale,
                     float x_sum, float* y) {
  constexpr int N = kTileRows / V::kLanes;
  typename V::F f[N];
  acc.to_float(f);
  const auto xs = V::set1(x_scale), sum = V::set1(x_sum), bias = V::set1(float(1 << (BITS - 1)));
  for (int k = 0; k < N; ++k) {
    const auto s = V::load_f16(scale + k * V::kLanes);
    auto out = V::fma(V::mul(f[k], s), xs, V::load(y + k * V::kLanes));
    if (MIN) out = V::fma(V::fma(s, bias, V::load_f16(min + k * V::kLanes)), sum, out);
    V::store(y + k * V::kLanes, out);
  }
}

template <class V, int BITS, bool MIN, int GROUP, int QUADS>
inline void tile_slab(const uint8_t* low, const uint8_t* high, const uint32_t* off, const uint32_t* x4, int quads,
                      int32_t start, const uint16_t* scale, const uint16_t* min, float x_scale, float x_sum, float* y) {
  typename V::template Acc<BITS> acc;
  acc.init(start);
  if (QUADS > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; ++i) acc.add4(low, high, off + 4 * i, x4[i]);
  } else {
    for (int i = 0; i < quads; ++i) acc.add4(low, high, off + 4 * i, x4[i]);
  }
  add_slab<V, BITS, MIN>(acc, scale, min, x_scale, x_sum, y);
}

// Where prefetching runs ahead of computing: a slab of a stretch, and the columns of it that will be read.
struct Ahead {
  const uint8_t* slab = nullptr;  // null: nothing to fetch
  const uint8_t* cols = nullptr;  // null: all 32
  int count = 0, R = 0, row = 0, tiles = 0;
};

// The t-th of n shares of a slab that is read later: whole runs of some of its active columns, in address order, so that
// the memory sees long sequential requests (line by line across the columns reached 60% of the rate of this order).
template <class V, int BITS, bool MIN, int GROUP>
SR_INLINE void prefetch_share(const PanelMatrix& w, const Ahead& a, int t, int n) {
  using P = Panel<V, BITS>;
  if (!a.slab || a.count == 0) return;
  if (t == 0) {
    const uint8_t* head = a.slab + size_t(a.row) * 2;
    for (int p = 0; p < kSlabCols / GROUP * (MIN ? 2 : 1); ++p, head += size_t(a.R) * 2)
      for (int i = 0; i < a.tiles * 128; i += 64) __builtin_prefetch(head + i, 0, 2);
  }
  const size_t run = w.run_bytes(a.R);
  const uint8_t* low = a.slab + w.slab_head_bytes(a.R) + size_t(a.row / kTileRows) * P::kLow;
  const uint8_t* high = a.slab + w.slab_head_bytes(a.R) + a.R / 2 + size_t(a.row / kTileRows) * P::kHigh;
  const int begin = a.count * t / n, end = a.count * (t + 1) / n;
  for (int c = begin; c < end; ++c) {
    const size_t at = (a.cols ? a.cols[c] : c) * run;
    for (int i = 0; i < a.tiles * P::kLow; i += 64) __builtin_prefetch(low + at + i, 0, 2);
    for (int i = 0; i < a.tiles * P::kHigh; i += 64) __builtin_prefetch(high + at + i, 0, 2);
  }
}

// Bytes that prefetching keeps in flight or in L2 ahead of the arithmetic; measured in cpp/kernels/README.md.
constexpr size_t kPrefetchBytes = 24 * 1024;

// A stretch of tiles inside one panel.
struct Stretch {
  const uint8_t* panel;
  int R, row, tiles;
};
SR_INLINE Stretch stretch_at(const PanelMatrix& w, int tile, int tile_end) {
  if (tile >= tile_end) return {nullptr, 0, 0, 0};
  const TilePlace at = place_tile(w, tile);
  return {at.panel, at.R, at.row, std::min(tile_end - tile, (at.R - at.row) / kTileRows)};
}

template <class V, int BITS, bool MIN, int GROUP>
void gemv_stretch(const PanelMatrix& w, const QuantVector& x, const ActiveColumns* active, const Stretch& at,
                  const Stretch& after, int* fetched, float* y) {
  using P = Panel<V, BITS>;
  constexpr int kParts = kSlabCols / GROUP;
  const int slabs = w.slabs(), tiles = at.tiles, R = at.R;
  const size_t slab_bytes = w.slab_bytes(R), head = w.slab_head_bytes(R), run_bytes = w.run_bytes(R);
  const int distance = int(std::min<size_t>(1 + kPrefetchBytes * R / (slab_bytes * kTileRows * tiles), 16));
  std::memset(y, 0, size_t(tiles) * kTileRows * sizeof(float));
  for (int s = 0; s < slabs; ++s) {
    SlabPlan plan;
    plan_slab(x.q + s * kSlabCols, active ? active->cols + s * kSlabCols : nullptr, active ? active->count[s] : 0, GROUP,
              uint32_t(run_bytes), &plan);
    // One slab further on, two while the lead is still short (the start of a matrix).
    Ahead ahead[2];
    for (int i = 0; i < 2 && *fetched <= s + distance; ++i, ++*fetched) {
      const Stretch& target = *fetched < slabs ? at : after;
      const int f = *fetched < slabs ? *fetched : *fetched - slabs;
      if (!target.panel || f >= slabs) break;
      ahead[i].slab = target.panel + size_t(f) * w.slab_bytes(target.R);
      ahead[i].cols = active ? active->cols + f * kSlabCols : nullptr;
      ahead[i].count = active ? active->count[f] : kSlabCols;
      ahead[i].R = target.R;
      ahead[i].row = target.row;
      ahead[i].tiles = target.tiles;
    }
    const uint8_t* slab = at.panel + size_t(s) * slab_bytes;
    const uint8_t* low = slab + head + size_t(at.row / kTileRows) * P::kLow;
    const uint8_t* high = slab + head + R / 2 + size_t(at.row / kTileRows) * P::kHigh;
    const uint16_t* scale = reinterpret_cast<const uint16_t*>(slab) + at.row;
    for (int t = 0; t < tiles; ++t) {
      prefetch_share<V, BITS, MIN, GROUP>(w, ahead[0], t, tiles);
      if (ahead[1].slab) prefetch_share<V, BITS, MIN, GROUP>(w, ahead[1], t, tiles);
      if (plan.columns == 0) continue;
      const uint8_t* l = low + size_t(t) * P::kLow;
      const uint8_t* h = high + size_t(t) * P::kHigh;
      float* out = y + size_t(t) * kTileRows;
      int first = 0;
      for (int p = 0; p < kParts; ++p) {
        const int quads = plan.quads[p];
        if (quads == 0) continue;
        const int32_t sum = kParts == 1 ? x.sum[2 * s] + x.sum[2 * s + 1] : x.sum[2 * s + p];
        const uint16_t* sc = scale + size_t(p) * R + size_t(t) * kTileRows;
        const uint16_t* mn = scale + size_t(kParts + p) * R + size_t(t) * kTileRows;
        const float xs = x.scale[s], x_sum = xs * float(sum);
        const int32_t start = -(sum << (BITS - 1));
        if (quads == GROUP / 4)
          tile_slab<V, BITS, MIN, GROUP, GROUP / 4>(l, h, plan.off + 4 * first, plan.x4 + first, quads, start, sc, mn, xs,
                                                    x_sum, out);
        else
          tile_slab<V, BITS, MIN, GROUP, 0>(l, h, plan.off + 4 * first, plan.x4 + first, quads, start, sc, mn, xs, x_sum,
                                            out);
        first += quads;
      }
    }
  }
  *fetched = std::max(1, *fetched - slabs);
}

// Calls fn<BITS, MIN, GROUP> for the layout of w.
template <template <class, int, bool, int> class Fn, class V, class... Args>
inline void dispatch_layout(const PanelMatrix& w, Args&&... args) {
  auto with = [&](auto bits) {
    constexpr int B = decltype(bits)::value;
    if (w.group == 32) {
      if (w.has_min) Fn<V, B, true, 32>::run(w, args...);
      else Fn<V, B, false, 32>::run(w, args...);
    } else {
      if (w.has_min) Fn<V, B, true, 16>::run(w, args...);
      else Fn<V, B, false, 16>::run(w, args...);
    }
  };
  switch (w.kind) {
    case WeightKind::q4: with(std::integral_constant<int, 4>()); break;
    case WeightKind::q5: with(std::integral_constant<int, 5>()); break;
    case WeightKind::q6: with(std::integral_constant<int, 6>()); break;
    default: with(std::integral_constant<int, 8>()); break;
  }
}

template <class V, int BITS, bool MIN, int GROUP>
struct GemvLayout {
  static void run(const PanelMatrix& w, const QuantVector& x, const ActiveColumns* active, int tile_begin, int tile_end,
                  float* y) {
    Stretch now = stretch_at(w, tile_begin, tile_end);
    int fetched = 1;  // slabs of `now` already asked for
    for (int tile = tile_begin; tile < tile_end;) {
      const Stretch after = stretch_at(w, tile + now.tiles, tile_end);
      gemv_stretch<V, BITS, MIN, GROUP>(w, x, active, now, after, &fetched, y + size_t(tile) * kTileRows);
      tile += now.tiles;
      now = after;
    }
  }
};

template <class V>
void gemv_q(const PanelMatrix& w, const QuantVector& x, const ActiveColumns* active, int tile_begin, int tile_end,
            float* y) {
  dispatch_layout<GemvLayout, V>(w, x, active, tile_begin, tile_end, y);
}

// Float weights: a tile is a contiguous [cols, 64] block; one pass with the 64 sums in registers.
template <class V, int KIND>
inline typename V::F load_weight(const uint8_t* p, size_t i) {
  if constexpr (KIND == int(WeightKind::f32)) return V::load(reinterpret_cast<const float*>(p) + i);
  if constexpr (KIND == int(WeightKind::f16)) return V::load_f16(reinterpret_cast<const uint16_t*>(p) + i);
  if constexpr (KIND == int(WeightKind::bf16)) return V::load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
}

template <class V, int KIND>
void gemv_float_tile(const uint8_t* tile, const float* x, int cols, float* y) {
  constexpr int N = kTileRows / V::kLanes;
  typename V::F acc[N];
  // Unrolled, or GCC makes a memset of it and then stores the sums in every round of the loop below.
#pragma GCC unroll 64
  for (int k = 0; k < N; ++k) acc[k] = V::zero();
  for (int c = 0; c < cols; ++c) {
    const auto xc = V::set1(x[c]);
    for (int k = 0; k < N; ++k)
      acc[k] = V::fma(load_weight<V, KIND>(tile, size_t(c) * kTileRows + k * V::kLanes), xc, acc[k]);
  }
#pragma GCC unroll 64
  for (int k = 0; k < N; ++k) V::store(y + k * V::kLanes, acc[k]);
}

template <class V>
void gemv_f(const PanelMatrix& w, const float* x, int tile_begin, int tile_end, float* y) {
  const size_t item = w.kind == WeightKind::f32 ? 4 : 2;
  for (int t = tile_begin; t < tile_end; ++t) {
    const TilePlace at = place_tile(w, t);
    const uint8_t* tile = at.panel + size_t(at.row) * w.cols * item;
    float* out = y + size_t(t) * kTileRows;
    if (w.kind == WeightKind::f32) gemv_float_tile<V, int(WeightKind::f32)>(tile, x, w.cols, out);
    else if (w.kind == WeightKind::f16) gemv_float_tile<V, int(WeightKind::f16)>(tile, x, w.cols, out);
    else gemv_float_tile<V, int(WeightKind::bf16)>(tile, x, w.cols, out);
  }
}

}  // namespace simd
}  // namespace sr
