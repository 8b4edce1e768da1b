// Matrix-vector products on stored panels, dense and on active columns, for any Vec.
//
// One slab (32 columns) at a time; inside it tile after tile (64 rows), all columns of the slab into registers, four
// columns an instruction. The columns of a slab are up to 32 streams that advance by half a line a tile; runs of slabs
// further on are asked for meanwhile, so that DRAM sees one long request queue whatever columns are skipped.
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
  int columns;   // visited; entries of off without those that fill up
};

// All 32 columns of slabs whose runs are run_bytes apart, less the inputs.
SR_INLINE void plan_all(int group, uint32_t run_bytes, SlabPlan* plan) {
  for (int c = 0; c < kSlabCols; ++c) plan->off[c] = c * run_bytes;
  plan->quads[0] = group / 4;
  plan->quads[1] = group == 16 ? 4 : 0;
  plan->columns = kSlabCols;
}

// Of one scale group: columns cols[0..count), count > 0, into off and x4; the quads they make. The last one is filled
// up with an input of 0 on a column that is read anyway. place: where the columns' runs begin instead, or null.
template <class V, int GROUP>
inline int plan_group(const int8_t* q, const uint8_t* cols, int count, const uint32_t* place, uint32_t run_bytes,
                      uint32_t* off, uint32_t* x4) {
  V::template list_columns<GROUP>(q, cols, count, run_bytes, off, x4);
  const int quads = (count + 3) / 4;
  for (int i = 0; place && i < 4 * quads; ++i) off[i] = place[std::min(i, count - 1)];
  return quads;
}

// Columns cols[0..count) (ascending, 32 readable) of a slab whose runs are run_bytes apart.
template <class V, int GROUP>
inline void plan_slab(const int8_t* q, const uint8_t* cols, int count, const uint32_t* place, uint32_t run_bytes,
                      SlabPlan* plan) {
  plan->columns = count;
  plan->quads[0] = plan->quads[1] = 0;
  int first = count;  // of the first group
  if (GROUP == 16) {
    first = 0;
    for (int i = 0; i < 16; ++i) first += (cols[i] < 16) & (i < count);
  }
  if (first) plan->quads[0] = plan_group<V, GROUP>(q, cols, first, place, run_bytes, plan->off, plan->x4);
  if (first == count) return;
  const int at = plan->quads[0];
  plan->quads[1] = plan_group<V, GROUP>(q, cols + first, count - first, place ? place + first : nullptr, run_bytes,
                                        plan->off + 4 * at, plan->x4 + at);
}

template <class V, int BITS>
struct Panel {
  static constexpr int kLow = BITS == 8 ? 64 : 32;                     // bytes of a tile in the first plane of a run
  static constexpr int kHigh = BITS == 5 ? 8 : BITS == 6 ? 16 : 0;  // and in the second
};

// Scales or minima: halves, or int8 in units. The product has at most 19 bits: exact in fp32.
struct Scales {
  const uint8_t* at;
  const uint16_t* units;
};
template <class V, bool UNITS>
inline typename V::F load_scales(const Scales& s, int k) {
  if constexpr (UNITS) return V::mul(V::load_s8(reinterpret_cast<const int8_t*>(s.at) + k), V::load_f16(s.units + k));
  else return V::load_f16(reinterpret_cast<const uint16_t*>(s.at) + k);
}

// y[0..63] = fma(sum * scale, x_scale, y), and the minimum's share.
template <class V, int BITS, bool MIN, bool UNITS>
inline void add_slab(typename V::template Acc<BITS>& acc, const Scales& scale, const Scales& min, float x_scale,
                     float x_sum, float* y) {
  constexpr int N = kTileRows / V::kLanes;
  typename V::F f[N];
  acc.to_float(f);
  const auto xs = V::set1(x_scale), sum = V::set1(x_sum), bias = V::set1(float(1 << (BITS - 1)));
  for (int k = 0; k < N; ++k) {
    const auto s = load_scales<V, UNITS>(scale, k * V::kLanes);
    auto out = V::fma(V::mul(f[k], s), xs, V::load(y + k * V::kLanes));
    if (MIN) out = V::fma(V::fma(s, bias, load_scales<V, UNITS>(min, k * V::kLanes)), sum, out);
    V::store(y + k * V::kLanes, out);
  }
}

// Consecutive tiles inside one panel.
struct TileRange {
  const uint8_t* panel;
  int R, row, tiles;
  const uint8_t *runs, *units;
};
SR_INLINE TileRange tiles_at(const PanelMatrix& w, int tile, int tile_end) {
  if (tile >= tile_end) return {nullptr, 0, 0, 0, nullptr, nullptr};
  const TilePlace at = place_tile(w, tile);
  const int tiles = std::min(tile_end - tile, (at.R - at.row) / kTileRows);
  return {at.panel, at.R, at.row, tiles, at.runs, at.units};
}

// Bytes that are asked for ahead of the slab being computed, at least: in flight or in L2. And those asked for before
// the first product. Measured in cpp/kernels/README.md.
constexpr int kAheadBytes = 32 * 1024;
constexpr int kStartBytes = 8 * 1024;

// Walks through what one call reads, in its order, and asks memory for it: per slab the scales (before the first of a
// unit's slabs the units), then the runs of active columns, each as a whole and in address order, so that the memory
// sees long sequential requests. A slab without active columns is not touched.
template <class V, int BITS, bool MIN, int GROUP>
class ReadAhead {
 public:
  using P = Panel<V, BITS>;
  static constexpr int kHeads = kSlabCols / GROUP * (MIN ? 2 : 1);

  ReadAhead(const PanelMatrix& w, const ActiveColumns* active, int tile_begin, int tile_end)
      : w_(w),
        active_(active),
        tile_(tile_begin),
        tile_end_(tile_end),
        first_slab_(w.stretch_slab(w.stretch_begin)),
        slab_end_(w.stretch_slab(w.stretch_end)),
        scale_bytes_(int(w.scale_bytes())) {
    enter();
    ask(kStartBytes);
  }

  // Bytes that the computation of `tiles` tiles of slab s reads.
  int wanted(int s, int tiles) const {
    const int n = columns(s);
    return n == 0 ? 0 : tiles * (n * (P::kLow + P::kHigh) + kHeads * scale_bytes_ * kTileRows);
  }
  // Begins slab s of `tiles` tiles; budget() is then what to ask for while it is computed, so that at its end the next
  // slab has been asked for, and kAheadBytes at least.
  void begin(int s, int tiles) {
    const int now = wanted(s, tiles), next = wanted(s + 1 < slab_end_ ? s + 1 : first_slab_, tiles);
    begun_ += now;
    target_ = begun_ + std::max(next, kAheadBytes);
  }
  int budget() const { return target_ > asked_ ? int(target_ - asked_) : 0; }

  // Asks for `due` bytes or a little more, whole runs; returns what is still due: 0 or less.
  SR_NOINLINE int ask(int due) {
    while (due > 0) {
      if (piece_ == pieces_ && !next_slab()) {
        asked_ = int64_t(1) << 60;  // that was all: no budget from now on
        return 0;
      }
      const int i = piece_++;
      int bytes;
      if (i < 0) {
        // Not counted, as in wanted(): else what is asked for ahead would shrink from unit to unit.
        fetch(at_.units + w_.unit_offset(slab_, at_.R) + (size_t(-1 - i) * at_.R + at_.row) * 2,
              at_.tiles * kTileRows * 2);
        bytes = 0;
      } else if (i < kHeads) {
        bytes = fetch(slab_at_ + (size_t(i) * at_.R + at_.row) * scale_bytes_, at_.tiles * kTileRows * scale_bytes_);
      } else {
        const uint8_t* run;
        if (at_.runs) {
          run = at_.runs + active_->place[slab_ * kSlabCols + i - kHeads];
        } else {
          const size_t c = active_ ? active_->cols[slab_ * kSlabCols + i - kHeads] : i - kHeads;
          run = slab_at_ + head_bytes_ + c * run_bytes_;
        }
        const int first = at_.row / kTileRows;
        bytes = fetch(run + first * P::kLow, at_.tiles * P::kLow);
        if (P::kHigh) bytes += fetch(run + at_.R / 2 + first * P::kHigh, at_.tiles * P::kHigh);
      }
      due -= bytes;
      asked_ += bytes;
    }
    return due;
  }

 private:
  static SR_INLINE int fetch(const uint8_t* p, int bytes) {
    for (const uint8_t* line = p - (reinterpret_cast<uintptr_t>(p) & 63); line < p + bytes; line += 64)
      __builtin_prefetch(line, 0, 2);
    return bytes;
  }
  int columns(int s) const { return active_ ? active_->count[s] : kSlabCols; }
  // Pieces from 0 on are the slab's own; those below, its units.
  void open_slab() {
    piece_ = 0;
    pieces_ = columns(slab_) ? kHeads + columns(slab_) : 0;
    if (!at_.units || !pieces_ || slab_ / w_.unit_slabs == unit_) return;
    unit_ = slab_ / w_.unit_slabs;
    piece_ = MIN ? -2 : -1;
  }
  void enter() {
    at_ = tiles_at(w_, tile_, tile_end_);
    piece_ = pieces_ = 0;
    unit_ = -1;
    slab_ = first_slab_;
    if (!at_.panel || slab_ == slab_end_) return;
    slab_bytes_ = w_.slab_bytes(at_.R);
    slab_at_ = at_.panel + size_t(slab_) * slab_bytes_;
    head_bytes_ = w_.slab_head_bytes(at_.R);
    run_bytes_ = w_.run_bytes(at_.R);
    open_slab();
  }
  bool next_slab() {
    while (piece_ == pieces_) {
      if (!at_.panel) return false;
      if (++slab_ < slab_end_) {
        slab_at_ += slab_bytes_;
        open_slab();
      } else {
        tile_ += at_.tiles;
        enter();
      }
    }
    return true;
  }

  const PanelMatrix& w_;
  const ActiveColumns* active_;
  int tile_, tile_end_;
  const int first_slab_, slab_end_, scale_bytes_;
  TileRange at_;
  const uint8_t* slab_at_ = nullptr;
  size_t slab_bytes_ = 0, head_bytes_ = 0, run_bytes_ = 0;
  int slab_ = 0, unit_ = -1, piece_ = 0, pieces_ = 0;
  int64_t begun_ = 0, asked_ = 0, target_ = 0;
};

// The columns of one scale group of a slab, for tiles of one panel.
struct SlabPart {
  Scales scale, min;
  const uint8_t *low, *high;
  const uint32_t *off, *x4;
  int quads;
  int32_t start;
  float x_scale, x_sum;
};

// QUADS = 0: as many as part.quads says. Unrolled for a full group and for one quad only: with two to four unrolled,
// cached matrices gained 5% and others lost 10%.
template <class V, int BITS, bool MIN, int QUADS, class Reader>
SR_NOINLINE int part_tiles(const SlabPart& given, int tiles, int due, int per_tile, Reader& ahead, float* y) {
  using P = Panel<V, BITS>;
  SlabPart part = given;
  const int scale_step = part.scale.units ? kTileRows : 2 * kTileRows;
  uint32_t one[4] = {0, 0, 0, 0}, x_one = 0;  // in registers over the tiles
  if (QUADS == 1) {
    std::memcpy(one, part.off, sizeof one);
    x_one = part.x4[0];
  }
  for (int t = 0; t < tiles; ++t) {
    due += per_tile;
    if (due > 0) due = ahead.ask(due);
    typename V::template Acc<BITS> acc;
    acc.init(part.start);
    if (QUADS == 1) {
      acc.add4(part.low, part.high, one, x_one);
    } else if (QUADS > 1) {
#pragma GCC unroll 8
      for (int i = 0; i < QUADS; ++i) acc.add4(part.low, part.high, part.off + 4 * i, part.x4[i]);
    } else {
      for (int i = 0; i < part.quads; ++i) acc.add4(part.low, part.high, part.off + 4 * i, part.x4[i]);
    }
    if (part.scale.units) {
      add_slab<V, BITS, MIN, true>(acc, part.scale, part.min, part.x_scale, part.x_sum, y);
      part.scale.units += kTileRows;
      part.min.units += kTileRows;
    } else {
      add_slab<V, BITS, MIN, false>(acc, part.scale, part.min, part.x_scale, part.x_sum, y);
    }
    part.low += P::kLow;
    part.high += P::kHigh;
    part.scale.at += scale_step;
    part.min.at += scale_step;
    y += kTileRows;
  }
  return due;
}

// Tiles of one panel; due: bytes that `ahead` was asked for too little (or, below 0, too much) so far.
template <class V, int BITS, bool MIN, int GROUP>
int gemv_tiles(const PanelMatrix& w, const QuantVector& x, const ActiveColumns* active, const TileRange& at, int due,
                 ReadAhead<V, BITS, MIN, GROUP>& ahead, float* y) {
  using P = Panel<V, BITS>;
  constexpr int kParts = kSlabCols / GROUP;
  const int tiles = at.tiles, R = at.R;
  const size_t slab_bytes = w.slab_bytes(R), head = w.slab_head_bytes(R), run_bytes = w.run_bytes(R);
  SlabPlan plan;
  if (!active) plan_all(GROUP, uint32_t(run_bytes), &plan);
  int stretch = w.stretch_begin, end = w.stretch_slab(stretch + 1);
  std::memset(y, 0, size_t(tiles) * kTileRows * sizeof(float));
  for (int s = w.stretch_slab(stretch);; ++s) {
    while (s == end) {
      if (++stretch == w.stretch_end) return due;
      y += w.sums_apart;
      std::memset(y, 0, size_t(tiles) * kTileRows * sizeof(float));
      end = w.stretch_slab(stretch + 1);
    }
    const int at_cols = s * kSlabCols;
    const int8_t* q = x.q + at_cols;
    if (active) {
      plan_slab<V, GROUP>(q, active->cols + at_cols, active->count[s], at.runs ? active->place + at_cols : nullptr,
                          uint32_t(run_bytes), &plan);
    } else {
      std::memcpy(plan.x4, q, kSlabCols);
    }
    if (plan.columns == 0) continue;
    ahead.begin(s, tiles);
    const uint8_t* slab = at.panel + size_t(s) * slab_bytes;
    const uint8_t* runs = at.runs ? at.runs : slab + head;
    const size_t scale_bytes = w.scale_bytes();
    const uint16_t* units =
        at.units ? reinterpret_cast<const uint16_t*>(at.units + w.unit_offset(s, R)) + at.row : nullptr;
    int first = 0;
    for (int p = 0; p < kParts; ++p) {
      const int quads = plan.quads[p];
      if (quads == 0) continue;
      const int32_t sum = kParts == 1 ? x.sum[2 * s] + x.sum[2 * s + 1] : x.sum[2 * s + p];
      SlabPart part;
      part.scale = {slab + (size_t(p) * R + at.row) * scale_bytes, units};
      part.min = {slab + (size_t(kParts + p) * R + at.row) * scale_bytes, units ? units + R : nullptr};
      part.low = runs + size_t(at.row / kTileRows) * P::kLow;
      part.high = runs + R / 2 + size_t(at.row / kTileRows) * P::kHigh;
      part.off = plan.off + 4 * first;
      part.x4 = plan.x4 + first;
      part.quads = quads;
      part.start = -(sum << (BITS - 1));
      part.x_scale = x.scale[s];
      part.x_sum = x.scale[s] * float(sum);
      const int parts_left = kParts == 2 && p == 0 && plan.quads[1] > 0 ? 2 : 1;
      const int per_tile = ahead.budget() / (tiles * parts_left);
      if (quads == GROUP / 4) due = part_tiles<V, BITS, MIN, GROUP / 4>(part, tiles, due, per_tile, ahead, y);
      else if (quads == 1) due = part_tiles<V, BITS, MIN, 1>(part, tiles, due, per_tile, ahead, y);
      else due = part_tiles<V, BITS, MIN, 0>(part, tiles, due, per_tile, ahead, y);
      first += quads;
    }
  }
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
    if (tile_begin >= tile_end) return;
    ReadAhead<V, BITS, MIN, GROUP> ahead(w, active, tile_begin, tile_end);
    int due = 0;
    for (int tile = tile_begin; tile < tile_end;) {
      const TileRange at = tiles_at(w, tile, tile_end);
      due = gemv_tiles<V, BITS, MIN, GROUP>(w, x, active, at, due, ahead, y + size_t(tile) * kTileRows);
      tile += at.tiles;
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
