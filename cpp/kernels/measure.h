// What memory and column skipping can do on this machine: the loops behind `bench --gather`, `bench --breakeven` and
// tests/bench/sparse_bench.cc. Single passes, so that whoever compares can take them in turn.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/table.h"

namespace sr {

// Memory full of valid weights (any bytes are codes; as halves they are finite), handed out part after part, so that
// what one pass has read is not in the caches when the next one begins.
class WeightBank {
 public:
  // Throws Error(budget) where there is no such memory.
  explicit WeightBank(size_t bytes);
  // A quarter of the bank, another one each time.
  const uint8_t* next();
  size_t part_bytes() const { return part_; }

 private:
  AlignedBuffer<uint8_t> bytes_;
  size_t part_;
  int turn_ = 0;
};

// GB/s of wanted bytes when each run of `run` bytes (64..part_bytes) of a part of the bank is wanted with probability
// `density`, read in order with one load a line; the best of several prefetch distances, each one pass.
double gather_gb_per_s(ThreadPool& pool, WeightBank& bank, size_t run, double density);

// One matrix of this shape (its data is not looked at), as often as a part of the bank holds it, times a vector of
// which a random share of the columns is active: seconds for one matrix, dense and skipping, one pass each. Threads
// share its stretches where the shape names several, and each adds all sums.
struct ColumnTimes {
  double dense, sparse;
  double dense_bytes, sparse_bytes;  // of one matrix: all of it; active columns, and scales of slabs that have any
};
ColumnTimes time_columns(ThreadPool& pool, WeightBank& bank, const PanelMatrix& shape, double density);

// Rows of neurons of this shape, as often as a part of the bank holds them, times a vector: seconds for one matrix, one
// pass each. Threads meet after every matrix, as in a layer.
struct RowTimes {
  double dense;   // all gate and up rows in one go
  double listed;  // both rows of a random share of the neurons
  double gated;   // all gate rows, then up rows of that share; without gates as `dense`
};
RowTimes time_rows(ThreadPool& pool, WeightBank& bank, const NeuronMatrix& shape, double density);

}  // namespace sr
