// One function pointer per operation and instruction set. Kernels are pure: pointers and sizes in, results out;
// no allocation, no threads, no exceptions, no state. generic/ is the reference that the tests hold the others to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_run/tensor.h"

namespace sr {

enum class Activation : uint8_t { silu, gelu_tanh, gelu, relu, relu2 };

// Columns of a vector that a sparse matrix-vector product visits, made once per vector (cpp/sparse).
// Per slab s: cols[32 s .. 32 s + count[s]) are the active columns (0..31) in ascending order.
struct ActiveColumns {
  const uint8_t* cols = nullptr;   // [slabs * 32]
  const uint8_t* count = nullptr;  // [slabs]
  const uint32_t* place = nullptr;  // [slabs * 32] of each entry of cols, where the matrix has PanelMatrix::runs
};

constexpr int kChunkKeys = 256;  // keys that one call of attend sees at most; results are merged chunk by chunk
constexpr int kKeyBlock = 16;    // keys are stored transposed in blocks of 16

// Row i of q sees keys [first[i], last[i]) of the chunk, 0 <= first, last <= n_keys <= kChunkKeys.
// Scores are softcap(scale * q.k); the output is not normalised: out[i] = sum_j exp(s_ij - row_max[i]) v_j and
// row_sum[i] = sum_j exp(s_ij - row_max[i]). A row that sees nothing gets row_max = -inf, row_sum = 0, out = 0.
struct AttendArgs {
  const float* q;       // [n_q, q_stride], already rotated
  int n_q;              // 1..kMaxQueries
  size_t q_stride;      // floats between rows of q
  int head_dim;         // a multiple of 8
  const uint16_t* k;    // fp16 [n_keys / 16, head_dim, 16]: key j, dimension d at
                        // (j / 16 * head_dim + d) * 16 + j % 16; memory up to the end of the last
                        // block of 16 must be readable and finite
  const uint16_t* v;    // fp16 [n_keys, head_dim]
  int n_keys;
  const int* first;     // [n_q]
  const int* last;      // [n_q]
  float scale;
  float softcap;        // 0 = none
  float* out;           // [n_q, out_stride]
  size_t out_stride;
  float* row_max;       // [n_q]
  float* row_sum;       // [n_q]
  void* scratch;        // kAttendScratchBytes, 64-byte aligned, one per thread
};
constexpr int kMaxQueries = 32;
constexpr size_t kAttendScratchBytes = size_t(kMaxQueries) * kChunkKeys * sizeof(float);

struct KernelTable {
  const char* name;

  // q, scale, sum as QuantVector, for one vector of n inputs (padded with zeros to a multiple of 32).
  void (*quantise)(const float* x, int n, int8_t* q, float* scale, int32_t* sum);

  // Keeps input j of a quantised vector iff |x[j]| > threshold[j * stride], stride 0 or 1: sets the other q to 0, makes
  // sum those of what is left, and writes the active columns (ActiveColumns layout; n padded to a multiple of 32). A
  // kept input whose q is 0 contributes nothing and is not listed. Returns the number of columns listed.
  int (*select)(const float* x, const float* threshold, int stride, int n, int8_t* q, int32_t* sum, uint8_t* cols,
                uint8_t* count);

  // y[r] for the rows of tiles [tile_begin, tile_end) of w; y is indexed by row and has padded_rows() entries, for each
  // of the stretches that w names (PanelMatrix::stretches).
  // Integer sums are exact; per slab, y = fma(float(sum) * scale, x_scale, y) and, with minima,
  // y = fma(min', x_scale * float(x_sum), y), min' = fma(scale, bias, min): the same bits on every ISA.
  void (*gemv_q)(const PanelMatrix& w, const QuantVector& x, int tile_begin, int tile_end, float* y);
  // The same on the active columns only: bit-equal to gemv_q on the vector with the other columns set to 0.
  // x.sum holds the sums over the active columns.
  void (*gemv_q_cols)(const PanelMatrix& w, const QuantVector& x, const ActiveColumns& active, int tile_begin,
                      int tile_end, float* y);
  void (*gemv_f)(const PanelMatrix& w, const float* x, int tile_begin, int tile_end, float* y);

  // n vectors at once: q [n, padded_cols], scale [n, slabs], sum [n, 2 slabs]; y [n, ldy]. Bit-equal to n gemv_q
  // and their sums of stretches added in order.
  // scratch: gemm_scratch_bytes(w) bytes, 64-byte aligned, one per thread.
  void (*gemm_q)(const PanelMatrix& w, const QuantVector& x, int n, int tile_begin, int tile_end, float* y, size_t ldy,
                 void* scratch);
  void (*gemm_f)(const PanelMatrix& w, const float* x, size_t ldx, int n, int tile_begin, int tile_end, float* y,
                 size_t ldy, void* scratch);

  // out[i] = x[i] * weight[i] / rms(x); with layer: (x - mean) / sd * weight + bias. bias may be null.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);

  // z[i] = act(gate[i]) * up[i]; with up == null, z[i] = act(gate[i]).
  void (*activate)(Activation act, const float* gate, const float* up, int n, float* z);

  // A block of queries against a chunk of cached keys and values, softmax in fp32; see AttendArgs. Per-row results do
  // not depend on the other rows of the block.
  void (*attend)(const AttendArgs& args);

  void (*to_f16)(const float* x, int n, uint16_t* out);
  // Sum of a large buffer, read as fast as the machine can (bench's stream rate).
  uint64_t (*read_sum)(const void* data, size_t bytes);

  // Rows of chosen neurons times a vector. Position k in [begin, end) stands for neuron ids[k], or for neuron k where
  // ids is null; gate[k] and up[k] are its results. gate or up may be null: then those rows are neither read nor
  // fetched.
  //
  // The same bits on every ISA: lane l of 16 sums the slabs l, l + 16, l + 32 ... of a row in this order, per scale
  // group lane = fma(float(sum) * scale, x_scale, lane) and, with minima, lane = fma(min', x_scale * float(x_sum),
  // lane), min' = fma(scale, bias, min), `sum` being exact; then lanes l and l + 8 are added, l and l + 4, l and l + 2,
  // l and l + 1. The results of a neuron do not depend on the list it is in.
  void (*rows_q)(const NeuronMatrix& w, const RowVector& x, const int32_t* ids, int begin, int end, float* gate,
                 float* up);
  // Float weights: lane l of 16 sums the columns l, l + 16 ... by fma; then as above. x: [cols].
  void (*rows_f)(const NeuronMatrix& w, const float* x, const int32_t* ids, int begin, int end, float* gate, float* up);

  // n vectors at once, each RowVector array row-major over the vectors; gate[v * ldy + k], up[v * ldy + k]. Bit-equal
  // to n calls of rows_q (rows_f). scratch: rows_scratch_bytes(w) bytes, 64-byte aligned, one per thread.
  void (*rows_gemm_q)(const NeuronMatrix& w, const RowVector& x, int n, const int32_t* ids, int begin, int end,
                      float* gate, float* up, size_t ldy, void* scratch);
  void (*rows_gemm_f)(const NeuronMatrix& w, const float* x, size_t ldx, int n, const int32_t* ids, int begin, int end,
                      float* gate, float* up, size_t ldy, void* scratch);
};

// Asks for the first lines that gemv_q will read of these tiles, at most `lines` of 64 bytes: called before a barrier,
// it keeps the memory busy while threads wait and norms are computed.
void prefetch_start(const PanelMatrix& w, int tile_begin, int tile_end, int lines);

// Scratch bytes that gemm_q and gemm_f need per thread for w.
size_t gemm_scratch_bytes(const PanelMatrix& w);

// Rearranges one quantised vector of `cols` inputs for the rows kernels: q [stripes * 512], scale [stripes * 16], sum
// [stripes * 32] of RowVector, stripes = ceil(cols / 512).
void order_for_rows(const QuantVector& x, int cols, int8_t* q, float* scale, int32_t* sum);

// As above, for the rows of neurons at positions [begin, end).
void prefetch_start(const NeuronMatrix& w, const int32_t* ids, int begin, int end, int lines);

// Scratch bytes that rows_gemm_q and rows_gemm_f need per thread for w.
size_t rows_scratch_bytes(const NeuronMatrix& w);

// The table chosen once for this process: the best instruction set that the build holds and the CPU and OS support,
// or the one named by SPARSE_RUN_FORCE_ISA (throws Error(isa) where that cannot be honoured).
const KernelTable& kernels();

// All tables of this build, best first; supported says whether this CPU and OS can run it.
struct IsaEntry {
  const KernelTable* table;
  bool supported;
};
const IsaEntry* isa_entries(int* count);

}  // namespace sr
