// Rows of neurons times one vector, for any Vec: all of them, or those of a list.
//
// A row's codes lie so that lane l of a vector register holds inputs of slab l (models/format.md): the integer products
// of 16 slabs add up lane by lane, without a horizontal sum, and scales, vector scales and sums are plain vector loads.
// The only horizontal step is the tree at the end of a row, taken for four rows together.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/rows.h"
#include "kernels/table.h"

namespace sr {
namespace simd {

// Bytes of rows asked for ahead of the arithmetic; measured by tests/bench/rows_bench.cc.
constexpr size_t kRowsAheadBytes = 24 * 1024;

// The 16 lanes of a row as registers: kParts of them. Lanes that a narrower last stripe lacks are not touched.
template <class V>
struct Lanes {
  static constexpr int kWidth = V::kLanes, kCount = kRowLanes / V::kLanes;
  typename V::F f[kCount];
  void clear() {
    for (int h = 0; h < kCount; ++h) f[h] = V::zero();
  }
};

template <class V, int BITS>
struct RowPlanes {
  static constexpr int kLow = BITS == 8 ? 32 : 16;                  // bytes of a lane in the first plane
  static constexpr int kHigh = BITS == 5 ? 4 : BITS == 6 ? 8 : 0;  // and in the second
};

// Calls Fn<V, BITS, MIN, GROUP>::run for the layout of w.
template <template <class, int, bool, int> class Fn, class V, class... Args>
inline void dispatch_rows(const NeuronMatrix& w, Args&&... args) {
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

// What one register of lanes of a stripe needs of the vector, the same for all rows.
template <class V, int BITS, bool MIN, int GROUP>
struct StripeInput {
  static constexpr int kParts = kSlabCols / GROUP;
  typename V::F scale, sum[kParts];  // sum: scale * float(sum of inputs), for the minima
  typename V::I start[kParts];       // -bias * sum of inputs

  StripeInput(const float* scales, const int32_t* sums) {
    scale = V::load(scales);
    typename V::I s[2] = {V::load_int(sums), V::load_int(sums + kRowLanes)};
    if (kParts == 1) s[0] = V::add_int(s[0], s[1]);
    for (int p = 0; p < kParts; ++p) {
      start[p] = V::template minus_bias<BITS>(s[p]);
      if (MIN) sum[p] = V::mul(scale, V::int_to_float(s[p]));
    }
  }
};

// lane += the share of one scale group: an exact integer sum times its scale and the vector's, and the minimum's share.
// n < kLanes: the other lanes keep what they had.
template <class V, int BITS, bool MIN>
SR_INLINE typename V::F add_group(typename V::F lane, typename V::F sum, typename V::F scale, typename V::F min,
                                  typename V::F x_scale, typename V::F x_sum) {
  lane = V::fma(V::mul(sum, scale), x_scale, lane);
  if (MIN) lane = V::fma(V::fma(scale, V::set1(float(1 << (BITS - 1))), min), x_sum, lane);
  return lane;
}

// R rows: one stripe of all of them added to their lanes.
template <class V, int BITS, bool MIN, int GROUP, int R, bool TAIL>
SR_INLINE void add_stripe(const RowPlan& plan, const uint8_t* const* row, const RowVector& x, int s, Lanes<V>* acc) {
  using P = RowPlanes<V, BITS>;
  constexpr int L = V::kLanes, kParts = kSlabCols / GROUP;
  const int lanes = TAIL ? plan.tail : kRowLanes;
  const int8_t* q = x.q + size_t(s) * kStripeCols;
  for (int h = 0; h < Lanes<V>::kCount; ++h) {
    const int n = TAIL ? std::min(L, lanes - h * L) : L;
    if (TAIL && n <= 0) break;
    const StripeInput<V, BITS, MIN, GROUP> in(x.scale + s * kRowLanes + h * L, x.sum + s * 2 * kRowLanes + h * L);
    for (int r = 0; r < R; ++r) {
      const uint8_t* low = row[r] + size_t(s) * kRowLanes * P::kLow + h * L * 4;
      const uint8_t* high = row[r] + plan.high + size_t(s) * kRowLanes * P::kHigh + h * L * 4;
      typename V::template RowSum<BITS> sum[kParts];
      for (int p = 0; p < kParts; ++p) sum[p].init();
      V::template row_chunks<BITS, TAIL>(low, high, 4 * lanes, n, q + h * L * 4, sum[0], sum[kParts - 1]);
      const uint16_t* scale = reinterpret_cast<const uint16_t*>(row[r] + plan.scale) + s * kRowLanes * kParts + h * L;
      const uint16_t* min = reinterpret_cast<const uint16_t*>(row[r] + plan.min) + s * kRowLanes * kParts + h * L;
      typename V::F lane = acc[r].f[h];
      for (int p = 0; p < kParts; ++p) {
        const auto sc = V::template load_scales<TAIL>(scale + p * lanes, n);
        auto mn = V::zero();
        if (MIN) mn = V::template load_scales<TAIL>(min + p * lanes, n);
        lane = add_group<V, BITS, MIN>(lane, sum[p].to_float(in.start[p]), sc, mn, in.scale, in.sum[p]);
      }
      acc[r].f[h] = TAIL ? V::first_lanes(lane, acc[r].f[h], n) : lane;
    }
  }
}

// y[r] = the fixed tree over the 16 lanes of row r.
template <class V, int R>
SR_INLINE void reduce_rows(const Lanes<V>* acc, float* y) {
  if (R == 4) return V::reduce_lanes4(acc[0].f, acc[1].f, acc[2].f, acc[3].f, y);
  for (int r = 0; r < R; ++r) y[r] = V::reduce_lanes(acc[r].f);
}

// Which rows of a record are wanted, and how to ask for them in time.
struct RowWalk {
  const NeuronMatrix& w;
  const int32_t* ids;
  int end;
  size_t offset[2];  // bytes from the record's start; the second only where both rows are wanted
  int rows;          // 1 or 2
  int ahead;         // positions
  int lines;         // 64-byte lines that a row touches at most

  SR_INLINE RowWalk(const NeuronMatrix& m, const int32_t* list, int last, bool gate, bool up)
      : w(m), ids(list), end(last), offset{gate ? 0 : m.up_offset(), m.up_offset()}, rows(gate && up ? 2 : 1) {
    const size_t bytes = m.row_bytes();
    ahead = int(std::max<size_t>(1, kRowsAheadBytes / (bytes * rows)));
    lines = int((bytes + std::max(offset[0] % 64, offset[rows - 1] % 64) + 63) / 64);
  }
  SR_INLINE const uint8_t* record(int k) const { return record_of(w, ids, k); }
  SR_INLINE void fetch(int k) const {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < lines; ++i) __builtin_prefetch(record(k) + offset[r] + 64 * i, 0, 2);
  }
};

// Rows of positions [begin, walk.end), PER of each record, four at a time; dots.template of<R>(row, next, y) does R of
// them while it fetches the rows `next`.
template <int PER, class Dots>
SR_INLINE void walk_rows(const RowWalk& walk, int begin, float* first, float* second, const Dots& dots) {
  for (int k = begin; k < std::min(walk.end, begin + walk.ahead); ++k) walk.fetch(k);
  int k = begin;
  auto some = [&](auto count) {
    constexpr int N = decltype(count)::value;
    const uint8_t *row[N * PER], *next[N * PER];
    for (int i = 0; i < N; ++i) {
      const uint8_t* now = walk.record(k + i);
      const uint8_t* later =
          k + i + walk.ahead < walk.end ? walk.record(k + i + walk.ahead) : now;  // now: costs nothing
      for (int r = 0; r < PER; ++r) {
        row[i * PER + r] = now + walk.offset[r];
        next[i * PER + r] = later + walk.offset[r];
      }
    }
    float y[N * PER];
    dots.template of<N * PER>(row, next, y);
    for (int i = 0; i < N; ++i) {
      first[k + i] = y[i * PER];
      if (PER == 2) second[k + i] = y[i * PER + 1];
    }
  };
  for (; k + 4 / PER <= walk.end; k += 4 / PER) some(std::integral_constant<int, 4 / PER>());
  for (; k < walk.end; ++k) some(std::integral_constant<int, 1>());
}
template <class Dots>
SR_INLINE void walk_rows(const RowWalk& walk, int begin, float* gate, float* up, const Dots& dots) {
  if (gate && up) walk_rows<2>(walk, begin, gate, up, dots);
  else walk_rows<1>(walk, begin, gate ? gate : up, nullptr, dots);
}

template <class V, int BITS, bool MIN, int GROUP>
struct DotRows {
  const RowPlan& plan;
  const RowVector& x;
  int lines;

  template <int R>
  SR_INLINE void of(const uint8_t* const* row, const uint8_t* const* next, float* y) const {
    // Lines of a full stripe, rounded up: the last stripe fetches what is left.
    constexpr int kStep = (kStripeCols * BITS / 8 + kRowLanes * 2 * (kSlabCols / GROUP) * (MIN ? 2 : 1) + 63) / 64;
    Lanes<V> acc[R];
    for (int r = 0; r < R; ++r) acc[r].clear();
    for (int s = 0; s < plan.full; ++s) {
      if ((s + 1) * kStep <= lines) {
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < kStep; ++i) __builtin_prefetch(next[r] + 64 * (s * kStep + i), 0, 2);
      } else {
        fetch<R>(next, s * kStep);
      }
      add_stripe<V, BITS, MIN, GROUP, R, false>(plan, row, x, s, acc);
    }
    if (plan.tail) {
      fetch<R>(next, plan.full * kStep);
      add_stripe<V, BITS, MIN, GROUP, R, true>(plan, row, x, plan.full, acc);
    }
    reduce_rows<V, R>(acc, y);
  }
  template <int R>
  SR_INLINE void fetch(const uint8_t* const* next, int from) const {
    for (int i = from; i < lines; ++i)
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + 64 * i, 0, 2);
  }
};

template <class V, int BITS, bool MIN, int GROUP>
struct RowsLayout {
  static void run(const NeuronMatrix& w, const RowVector& x, const int32_t* ids, int begin, int end, float* gate,
                  float* up) {
    const RowPlan plan(w);
    const RowWalk walk(w, ids, end, gate != nullptr, up != nullptr);
    walk_rows(walk, begin, gate, up, DotRows<V, BITS, MIN, GROUP>{plan, x, walk.lines});
  }
};

template <class V>
void rows_q(const NeuronMatrix& w, const RowVector& x, const int32_t* ids, int begin, int end, float* gate, float* up) {
  if (gate || up) dispatch_rows<RowsLayout, V>(w, x, ids, begin, end, gate, up);
}

}  // namespace simd
}  // namespace sr
