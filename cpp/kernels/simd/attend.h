// Attention of a block of queries over a chunk of cached keys, for any Vec; contract at AttendArgs.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/simd/vector.h"
#include "kernels/table.h"

namespace sr {
namespace simd {

// Scores of QT queries against one block of 16 keys: a broadcast and a multiply-add per dimension, no horizontal sums,
// because keys are stored transposed.
template <class V, int QT>
inline void score_block(const AttendArgs& a, int row, const uint16_t* k, float* scores) {
  constexpr int NV = kKeyBlock / V::kLanes;
  typename V::F acc[QT][NV];
  for (int i = 0; i < QT; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  const float* q = a.q + row * a.q_stride;
  // Decode meets keys and values for the first time: those of the next and of this block are fetched meanwhile.
  const bool cold = a.n_q <= 8;
  const uint16_t *next = k + size_t(a.head_dim) * kKeyBlock, *values = a.v + (k - a.k);
  for (int d = 0; d < a.head_dim; ++d) {
    if (cold && d % 2 == 0) {
      __builtin_prefetch(next + d * kKeyBlock);
      __builtin_prefetch(values + d * kKeyBlock);
    }
    for (int v = 0; v < NV; ++v) {
      const auto key = V::load_f16(k + d * kKeyBlock + v * V::kLanes);
      for (int i = 0; i < QT; ++i) acc[i][v] = V::fma(V::set1(q[i * a.q_stride + d]), key, acc[i][v]);
    }
  }
  for (int i = 0; i < QT; ++i)
    for (int v = 0; v < NV; ++v) V::store(scores + i * kChunkKeys + v * V::kLanes, V::mul(acc[i][v], V::set1(a.scale)));
}

template <class V, int QT>
inline void score_rows(const AttendArgs& a, int row, int n, int begin, int end, float* p) {
  if (n == QT) {
    for (int b = begin / kKeyBlock; b * kKeyBlock < end; ++b)
      score_block<V, QT>(a, row, a.k + size_t(b) * a.head_dim * kKeyBlock, p + row * kChunkKeys + b * kKeyBlock);
    return;
  }
  if constexpr (QT > 1) score_rows<V, QT - 1>(a, row, n, begin, end, p);
}

// Softmax numerators of one row in place, 0 outside [first, last); keys outside whole blocks of 16 are not written.
template <class V>
inline void softmax_row(const AttendArgs& a, int row, float* p) {
  constexpr int L = V::kLanes;
  const int first = a.first[row], last = a.last[row];
  const int begin = first / kKeyBlock * kKeyBlock, end = (last + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const float none = -std::numeric_limits<float>::infinity();
  if (first >= last) {
    a.row_max[row] = none;
    a.row_sum[row] = 0;
    return;
  }
  if (a.softcap > 0)
    for (int j = begin; j < end; j += L)
      V::store(p + j, V::mul(V::set1(a.softcap), tanh<V>(V::mul(V::load(p + j), V::set1(1.0f / a.softcap)))));
  for (int j = begin; j < first; ++j) p[j] = none;
  for (int j = last; j < end; ++j) p[j] = none;
  auto top = V::set1(none);
  for (int j = begin; j < end; j += L) top = V::max(top, V::load(p + j));
  const float max = V::reduce_max(top);
  auto sum = V::zero();
  for (int j = begin; j < end; j += L) {
    const auto e = exp<V>(V::sub(V::load(p + j), V::set1(max)));
    V::store(p + j, e);
    sum = V::add(sum, e);
  }
  a.row_max[row] = max;
  a.row_sum[row] = V::reduce_add(sum);
}

// QT rows x NV vectors of the output; every row adds its own keys in ascending order.
template <class V, int QT, int NV>
inline void mix_values(const AttendArgs& a, int row, int d, int tail, int begin, int end, const float* p) {
  constexpr int L = V::kLanes;
  typename V::F acc[QT][NV];
  for (int i = 0; i < QT; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V::zero();
  for (int j = begin; j < end; ++j) {
    const uint16_t* value = a.v + size_t(j) * a.head_dim + d;
    for (int v = 0; v < NV; ++v) {
      const auto x = NV == 1 && tail < L ? V::load_f16_part(value, tail) : V::load_f16(value + v * L);
      for (int i = 0; i < QT; ++i) acc[i][v] = V::fma(V::set1(p[(row + i) * kChunkKeys + j]), x, acc[i][v]);
    }
  }
  for (int i = 0; i < QT; ++i)
    for (int v = 0; v < NV; ++v) {
      float* out = a.out + (row + i) * a.out_stride + d + v * L;
      if (NV == 1 && tail < L) V::store_part(out, acc[i][v], tail);
      else V::store(out, acc[i][v]);
    }
}

template <class V, int QT>
inline void mix_rows(const AttendArgs& a, int row, int n, int begin, int end, const float* p) {
  if (n == QT) {
    constexpr int L = V::kLanes, NV = V::kMixVectors;
    int d = 0;
    for (; d + NV * L <= a.head_dim; d += NV * L) mix_values<V, QT, NV>(a, row, d, L, begin, end, p);
    for (; d < a.head_dim; d += L) mix_values<V, QT, 1>(a, row, d, std::min(L, a.head_dim - d), begin, end, p);
    return;
  }
  if constexpr (QT > 1) mix_rows<V, QT - 1>(a, row, n, begin, end, p);
}

template <class V>
void attend(const AttendArgs& a) {
  float* p = static_cast<float*>(a.scratch);
  for (int row = 0; row < a.n_q;) {
    const int n = std::min(V::kScoreQueries, a.n_q - row);
    int begin = kChunkKeys, end = 0;
    for (int i = row; i < row + n; ++i)
      if (a.first[i] < a.last[i]) {
        begin = std::min(begin, a.first[i] / kKeyBlock * kKeyBlock);
        end = std::max(end, a.last[i]);
      }
    if (begin < end) score_rows<V, V::kScoreQueries>(a, row, n, begin, end, p);
    for (int i = row; i < row + n; ++i) {
      softmax_row<V>(a, i, p + i * kChunkKeys);
      // Rows of a block share the key range below: what a row does not see counts 0.
      const int lo = a.first[i] < a.last[i] ? a.first[i] : end, hi = a.first[i] < a.last[i] ? a.last[i] : end;
      for (int j = begin; j < std::min(lo, end); ++j) p[i * kChunkKeys + j] = 0;
      for (int j = std::max(hi, begin); j < end; ++j) p[i * kChunkKeys + j] = 0;
      if (a.first[i] >= a.last[i])
        for (int j = begin; j < end; ++j) p[i * kChunkKeys + j] = 0;
    }
    for (int i = row; i < row + n; i += V::kMixQueries)
      mix_rows<V, V::kMixQueries>(a, i, std::min(V::kMixQueries, row + n - i), begin, std::max(begin, end), p);
    row += n;
  }
}

}  // namespace simd
}  // namespace sr
