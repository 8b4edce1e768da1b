// A matrix of the model, perhaps in parts of different bits, and its products with vectors prepared once for all parts.
#pragma once

#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/panels.h"
#include "kernels/table.h"
#include "sparse/plan.h"

namespace sr {

class PackedModel;

// What a matrix multiplies: n vectors in fp32 and, where any part is quantised, in int8.
struct Input {
  const float* x = nullptr;  // [n, ldx]
  size_t ldx = 0;
  QuantVector q;             // [n, padded columns]
  ActiveColumns active;      // of one vector; null: all columns
};

// Room for n vectors of `width` inputs, fp32 and int8; ldx is the width padded to whole slabs.
class InputBuffer {
 public:
  // rows: with room for the form that the rows of neurons multiply.
  void reset(int n, int width, const char* what, bool rows = false);
  float* row(int i) { return x_.data() + size_t(i) * padded_; }
  // Makes the int8 form of row i, or of the 32-aligned stretch [begin, begin + count) of it.
  void quantise(int i) { quantise(i, 0, width_); }
  void quantise(int i, int begin, int count);
  // After quantise: makes the form of row i that the rows of neurons multiply.
  void order(int i);
  RowVector ordered(int i) const;  // from row i on
  Input input(int row = 0) const;  // from this row on
  // After quantise: keeps what exceeds its threshold, in the 32-aligned stretch [begin, begin + count).
  void select(int i, const Thresholds& threshold, int begin, int count);
  // Columns that select kept in row i, and the row's list of them.
  int kept(int i) const;
  ActiveColumns active(int i) const;
  int width() const { return width_; }
  size_t bytes() const;   // of all rows
  void give_back();       // the memory of all rows, which are zeros then

 private:
  int width_ = 0, padded_ = 0, stripes_ = 0;
  AlignedBuffer<float> x_;
  AlignedBuffer<int8_t> q_;
  AlignedBuffer<float> scale_;
  AlignedBuffer<int32_t> sum_;
  AlignedBuffer<uint8_t> cols_, count_;  // of select
  // Of order; without room for it they are empty.
  AlignedBuffer<int8_t> ordered_q_;
  AlignedBuffer<float> ordered_scale_;
  AlignedBuffer<int32_t> ordered_sum_;
};

// Tiles of a matrix that a memory budget keeps from being all resident.
struct Slice {
  int tile_begin, tile_end;
  int unit;                // of the weight stream; -1: resident
  std::vector<int> share;  // [threads + 1] tiles of each thread
};

// `local` seen as the array whose elements from `begin` on it holds: kernels index outputs by row of the matrix.
inline float* indexed_from(float* local, size_t begin) {
  return reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(local) - begin * sizeof(float));
}

struct Linear {
  std::vector<PanelMatrix> parts;
  std::vector<int> tile_begin;  // [parts + 1] first tile of each part in the whole
  std::vector<int> row_begin;   // [parts + 1] first true row of each part
  int rows = 0, cols = 0;
  const float* bias = nullptr;  // [rows]
  bool quantised = false;       // some part needs the int8 input
  bool floating = false;        // some part needs the fp32 input
  size_t bytes = 0;
  std::vector<int> share;       // [threads + 1] tiles of each thread, balanced by bytes
  // A matrix of few rows is multiplied stretch by stretch of its columns, and the products are added in this order.
  // Threads can then own stretches and read columns in whole runs, where each would read a piece of every run if it
  // owned rows. The shape alone says how many there are, so bits do not depend on the threads.
  int stretches = 1;
  std::vector<int> unit_share;  // [threads + 1] units of each thread; a unit is a tile of a stretch, stretch by stretch
  std::vector<Slice> slices;    // in the order of use; empty where all of it is resident

  bool empty() const { return parts.empty(); }
  int tiles() const { return tile_begin.back(); }
  int padded_rows() const { return tiles() * kTileRows; }  // floats that an output needs
  int partial_rows() const { return stretches * padded_rows(); }  // floats that gemv_partial needs
  // Whether threads share its stretches when one vector is multiplied.
  bool in_partials() const { return stretches > 1 && slices.empty(); }
  // Where the output of row r stands in y: parts are padded to whole tiles.
  int output_index(int row) const;
};

// Reads NAME and NAME.bias. `unit` rows must not be split between two parts (a head, or a tile).
Linear load_linear(const PackedModel& model, const std::string& name, int rows, int cols, int unit);

// The same of parts that are at hand; bias [rows] or null.
Linear linear_of(std::vector<PanelMatrix> parts, const float* bias);
// Sets tile_begin and row_begin from the parts.
void number_parts(Linear* w);

// Share of kept columns above which skipping the others is not expected to pay, where it was not measured: short runs
// of weights are read no faster for gaps between them (cpp/kernels/README.md).
float break_even_by_shape(const Linear& w);

// How many stretches pay for a matrix of this shape: none for small ones, of which dense decoding gained nothing.
int stretches_that_pay(int rows, int cols);

// Lets a quantised matrix be multiplied in n stretches of its columns. Before set_shares.
void set_stretches(Linear* w, int n);

// Sets share for this many threads, in units of `tiles_per_unit` tiles.
void set_shares(Linear* w, int threads, int tiles_per_unit);

// Tiles [tile_begin, tile_end) shared out evenly, whatever they weigh: [threads + 1].
std::vector<int> even_share(int tile_begin, int tile_end, int threads, int tiles_per_unit);

// y[output_index(r)] = W x + bias for the rows of tiles [tile_begin, tile_end).
void gemv(const Linear& w, const Input& x, int tile_begin, int tile_end, float* y);
// The products of single stretches of columns, of units [begin, end) of w.stretches * w.tiles(): y [stretches,
// padded_rows()].
void gemv_partial(const Linear& w, const Input& x, int begin, int end, float* y);
// From what gemv_partial left to what gemv gives, [padded_rows()].
void add_partials(const Linear& w, const float* partial, float* y);
// The same for n vectors, y [n, ldy]; bit-equal to n gemv.
void gemm(const Linear& w, const Input& x, int n, int tile_begin, int tile_end, float* y, size_t ldy, void* scratch);

}  // namespace sr
