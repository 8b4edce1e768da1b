// Every pass reads other memory than the one before it; who goes first alternates.
#include "kernels/measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>

#include "kernels/panels.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kParts = 4;

template <class Fn>
double seconds(ThreadPool& pool, Fn fn) {
  const auto start = std::chrono::steady_clock::now();
  pool.run(fn);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// One load from every line of runs list[begin, end), those `ahead` positions further on being asked for meanwhile.
uint64_t touch(const uint8_t* base, size_t run, const std::vector<uint32_t>& list, size_t begin, size_t end,
               size_t ahead) {
  uint64_t sum = 0;
  for (size_t k = begin; k < end; k++) {
    const uint8_t* p = base + size_t(list[k]) * run;
    const uint8_t* later = ahead && k + ahead < end ? base + size_t(list[k + ahead]) * run : nullptr;
    for (size_t i = 0; i < run; i += 64) {
      if (later) __builtin_prefetch(later + i, 0, 2);
      uint64_t v;
      std::memcpy(&v, p + i, 8);
      sum += v;
    }
  }
  return sum;
}

// A thread owns whole panels where that is nearly even, as in the decoder.
int border(const PanelMatrix& m, int tid, int threads) {
  const int tiles = m.tiles(), per = m.panel_rows / kTileRows;
  if (tid == 0 || tid == threads) return tid ? tiles : 0;
  const int even = int(int64_t(tiles) * tid / threads), panel = (even + per / 2) / per * per;
  return panel <= tiles && std::abs(panel - even) <= std::max(1, tiles / threads / 8) ? panel : even;
}

// How many matrices of so many bytes a part of the bank holds.
int copies_in(const WeightBank& bank, size_t one) {
  if (one > bank.part_bytes()) {
    throw Error(ErrorCode::usage, "the matrix does not fit into a quarter of the memory measured");
  }
  return int(bank.part_bytes() / one);
}

}  // namespace

WeightBank::WeightBank(size_t bytes)
    : bytes_(bytes, "the memory that is measured"), part_(bytes / kParts / 4096 * 4096) {
  prefer_huge_pages(bytes_.data(), bytes_.size());
  uint64_t state = 0x9E3779B97F4A7C15ull;
  for (size_t i = 0; i + 8 <= bytes; i += 8) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    const uint64_t v = state & 0xbfffbfffbfffbfffull;
    std::memcpy(bytes_.data() + i, &v, 8);
  }
}

const uint8_t* WeightBank::next() { return bytes_.data() + part_ * size_t(turn_++ % kParts); }

double gather_gb_per_s(ThreadPool& pool, WeightBank& bank, size_t run, double density) {
  if (run < 64 || run > bank.part_bytes()) throw Error(ErrorCode::usage, "a run must have from 64 bytes to a part's");
  std::vector<uint32_t> list;
  std::mt19937 rng(7);
  const size_t runs = bank.part_bytes() / run;
  for (size_t i = 0; i < runs; i++)
    if (double(rng()) < density * 4294967296.0) list.push_back(uint32_t(i));
  if (list.empty()) list.push_back(0);
  double best = 0;
  for (const size_t ahead_bytes : {0, 4096, 8192, 16384}) {
    const size_t ahead = ahead_bytes ? std::max<size_t>(1, ahead_bytes / run) : 0;
    const uint8_t* data = bank.next();
    std::atomic<uint64_t> sink{0};
    const double t = seconds(pool, [&](int tid) {
      const size_t n = size_t(pool.size()), begin = list.size() * size_t(tid) / n,
                   end = list.size() * size_t(tid + 1) / n;
      sink += touch(data, run, list, begin, end, ahead);
    });
    best = std::max(best, double(list.size()) * double(run) / 1e9 / t);
  }
  return best;
}

ColumnTimes time_columns(ThreadPool& pool, WeightBank& bank, const PanelMatrix& shape, double density) {
  const size_t one = (shape.total_bytes() + 4095) / 4096 * 4096;
  const int copies = copies_in(bank, one), slabs = shape.slabs(), threads = pool.size();
  std::mt19937 rng(3);
  std::vector<int8_t> q(size_t(shape.padded_cols())), masked(q.size());
  std::vector<uint8_t> cols(q.size()), count(size_t(slabs), 0);
  std::vector<float> scale(size_t(slabs), 0.01f), y(size_t(shape.padded_rows()));
  std::vector<int32_t> sum(size_t(slabs) * 2, 0), masked_sum(sum);
  size_t kept = 0, slabs_read = 0;
  for (int j = 0; j < shape.cols; j++) {
    const size_t s = size_t(j / kSlabCols), half = size_t(j / 16);
    q[size_t(j)] = int8_t(int(rng() % 255) - 127);
    sum[half] += q[size_t(j)];
    if (double(rng()) >= density * 4294967296.0) continue;
    masked[size_t(j)] = q[size_t(j)];
    masked_sum[half] += q[size_t(j)];
    cols[s * kSlabCols + count[s]++] = uint8_t(j % kSlabCols);
    kept++;
    slabs_read += count[s] == 1;
  }
  const KernelTable& k = kernels();
  const int stretches = shape.stretches;
  const size_t apart = y.size();
  std::vector<std::vector<float>> sums(size_t(threads), std::vector<float>(stretches > 1 ? stretches * apart : 0));
  const QuantVector all{q.data(), scale.data(), sum.data()}, some{masked.data(), scale.data(), masked_sum.data()};
  const ActiveColumns active{cols.data(), count.data()};
  const auto pass = [&](bool sparse) {
    const uint8_t* data = bank.next();
    return seconds(pool, [&](int tid) {
      PanelMatrix w = shape;
      const auto multiply = [&](int begin, int end, float* to) {
        if (sparse) k.gemv_q_cols(w, some, active, begin, end, to);
        else k.gemv_q(w, all, begin, end, to);
      };
      const int begin = border(shape, tid, threads), end = border(shape, tid + 1, threads);
      const int units = stretches * w.tiles();
      std::vector<float>& own = sums[size_t(tid)];
      for (int i = 0; i < copies; i++) {
        w.data = data + one * size_t(i);
        if (stretches == 1) {
          multiply(begin, end, y.data());
          continue;
        }
        // Every thread adds all sums, in the decoder those of the other threads.
        for_stretches(w.tiles(), int(int64_t(units) * tid / threads), int(int64_t(units) * (tid + 1) / threads),
                      [&](int from, int to, int first, int last) {
                        w = w.some_stretches(from, to, apart);
                        multiply(first, last, own.data() + size_t(from) * apart);
                      });
        for (int s = 1; s < stretches; s++) {
          for (size_t r = 0; r < apart; r++) own[r] += own[size_t(s) * apart + r];
        }
      }
    }) / copies;
  };
  static std::atomic<bool> sparse_first{false};
  const bool first = sparse_first.exchange(!sparse_first.load());
  ColumnTimes out{};
  (first ? out.sparse : out.dense) = pass(first);
  (first ? out.dense : out.sparse) = pass(!first);
  out.dense_bytes = double(shape.total_bytes());
  const double heads = double(shape.heads_bytes(shape.padded_rows()));
  out.sparse_bytes = heads * double(slabs_read) / slabs +
                     (out.dense_bytes - heads) * double(kept) / double(shape.padded_cols());
  return out;
}

RowTimes time_rows(ThreadPool& pool, WeightBank& bank, const NeuronMatrix& shape, double density) {
  const size_t one = (shape.total_bytes() + 4095) / 4096 * 4096;
  const int copies = copies_in(bank, one), slabs = shape.slabs(), threads = pool.size(), n = shape.neurons;
  std::mt19937 rng(3);
  std::vector<int8_t> q(size_t(slabs) * kSlabCols), ordered_q(size_t(shape.stripes()) * kStripeCols);
  std::vector<float> scale(size_t(slabs), 0.01f), ordered_scale(size_t(shape.stripes()) * kRowLanes);
  std::vector<int32_t> sum(size_t(slabs) * 2), ordered_sum(ordered_scale.size() * 2), list;
  for (int j = 0; j < shape.cols; j++) {
    q[size_t(j)] = int8_t(int(rng() % 255) - 127);
    sum[size_t(j / 16)] += q[size_t(j)];
  }
  order_for_rows({q.data(), scale.data(), sum.data()}, shape.cols, ordered_q.data(), ordered_scale.data(),
                 ordered_sum.data());
  for (int i = 0; i < n; i++) {
    if (double(rng()) < density * 4294967296.0) list.push_back(i);
  }
  if (list.empty()) list.push_back(0);
  const RowVector x{ordered_q.data(), ordered_scale.data(), ordered_sum.data()};
  const KernelTable& k = kernels();
  std::vector<float> out(size_t(n) * 2);
  float *gate = shape.gated ? out.data() : nullptr, *up = out.data() + n;
  const int listed = int(list.size());
  const auto pass = [&](int way) {
    const uint8_t* data = bank.next();
    return seconds(pool, [&](int tid) {
      const auto share = [&](int of, int t) { return int(int64_t(of) * t / threads); };
      const int begin = share(n, tid), end = share(n, tid + 1);
      const int first = share(listed, tid), last = share(listed, tid + 1);
      NeuronMatrix w = shape;
      for (int i = 0; i < copies; i++, pool.barrier()) {
        w.data = data + one * size_t(i);
        if (way == 0) k.rows_q(w, x, nullptr, begin, end, gate, up);
        if (way == 1) k.rows_q(w, x, list.data(), first, last, gate, up);
        if (way != 2) continue;
        k.rows_q(w, x, nullptr, begin, end, gate, nullptr);
        k.rows_q(w, x, list.data(), first, last, nullptr, up);
      }
    }) / copies;
  };
  static std::atomic<int> turn{0};
  const int ways = shape.gated ? 3 : 2, from = turn++ % ways;
  double t[3] = {};
  for (int i = 0; i < ways; i++) t[(from + i) % ways] = pass((from + i) % ways);
  return {t[0], t[1], shape.gated ? t[2] : t[0]};
}

}  // namespace sr
