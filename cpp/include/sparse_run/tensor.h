// Views of stored weights and of activations, as kernels see them. The stored layout is models/format.md.
#pragma once

#include <cstddef>
#include <cstdint>

// Small functions of headers that are compiled for several instruction sets must not leave a shared (weak) symbol
// behind: the linker could keep the copy with the newer instructions. nvcc makes them for the device as well.
#if defined(__CUDACC__)
#define SR_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define SR_INLINE __forceinline
#define SR_NOINLINE __declspec(noinline)
#else
#define SR_INLINE inline __attribute__((always_inline))
#define SR_NOINLINE __attribute__((noinline))
#endif

namespace sr {

constexpr int kMostStretches = 4;  // of a matrix's columns (PanelMatrix::stretches)

enum class WeightKind : uint8_t { q4, q5, q6, q8, f32, f16, bf16 };

constexpr int kTileRows = 64;   // outputs in a tile
constexpr int kSlabCols = 32;   // inputs in a slab; also the block of activation quantisation

SR_INLINE int code_bits(WeightKind k) {
  switch (k) {
    case WeightKind::q4: return 4;
    case WeightKind::q5: return 5;
    case WeightKind::q6: return 6;
    case WeightKind::q8: return 8;
    default: return 0;
  }
}
SR_INLINE bool is_quantised(WeightKind k) { return k <= WeightKind::q8; }
SR_INLINE int code_bias(WeightKind k) { return 1 << (code_bits(k) - 1); }

// One stored matrix [rows, cols] in panels.
struct PanelMatrix {
  const uint8_t* data = nullptr;
  WeightKind kind = WeightKind::f32;
  bool has_min = false;
  int group = 32;       // columns per scale: 32 or 16
  int rows = 0;         // true outputs
  int cols = 0;         // true inputs
  int panel_rows = 64;  // rows of every panel but perhaps the last; a multiple of 64
  // 0: scales and minima are halves. Else they are int8, in units that are halves for each row and so many slabs.
  int unit_slabs = 0;
  // Where single columns are held apart, for products on active columns: then `data` has the slabs' heads alone, and
  // the run of a column in the panel of first row r begins run_bytes(r) after runs + ActiveColumns::place. Null
  // elsewhere.
  const uint8_t* runs = nullptr;
  // Products of quantised weights are made stretch by stretch of the columns, each sum beginning anew, and added in
  // this order. gemv makes the sums alone, of stretches [stretch_begin, stretch_end), `sums_apart` floats from one to
  // the next; so threads can share columns and read them in whole runs, with bits that do not depend on who did what.
  int stretches = 1;
  int stretch_begin = 0, stretch_end = 1;
  size_t sums_apart = 0;
  int stretch_borders[kMostStretches + 1] = {};  // first slab of each, and the end; of one stretch not looked at

  // First slab of stretch k, which may be empty.
  SR_INLINE int stretch_slab(int k) const { return stretches > 1 ? stretch_borders[k] : k ? slabs() : 0; }
  SR_INLINE void set_stretches(int n) {
    stretches = stretch_end = n;
    for (int k = 0; k <= n; ++k) stretch_borders[k] = slabs() * k / n;
  }
  SR_INLINE PanelMatrix some_stretches(int begin, int end, size_t apart) const {
    PanelMatrix out = *this;
    out.stretch_begin = begin;
    out.stretch_end = end;
    out.sums_apart = apart;
    return out;
  }
  SR_INLINE int padded_rows() const { return (rows + kTileRows - 1) / kTileRows * kTileRows; }
  SR_INLINE int padded_cols() const { return (cols + kSlabCols - 1) / kSlabCols * kSlabCols; }
  SR_INLINE int tiles() const { return padded_rows() / kTileRows; }
  SR_INLINE int slabs() const { return padded_cols() / kSlabCols; }

  // Planes of scales, or of units: one of each, and where there are minima one more of each.
  SR_INLINE int planes() const { return has_min ? 2 : 1; }
  SR_INLINE size_t scale_bytes() const { return unit_slabs ? 1 : 2; }
  // Bytes of scales and minima at the head of a slab of R rows.
  SR_INLINE size_t slab_head_bytes(int R) const { return size_t(32 / group) * planes() * scale_bytes() * R; }
  // Bytes of the units of unit_slabs slabs, [planes, R], and of all at the head of a panel of R rows.
  SR_INLINE size_t unit_bytes(int R) const { return size_t(planes()) * 2 * R; }
  SR_INLINE size_t units_bytes(int R) const {
    return unit_slabs ? size_t((slabs() + unit_slabs - 1) / unit_slabs) * unit_bytes(R) : 0;
  }
  // Where those of slab s begin.
  SR_INLINE size_t unit_offset(int s, int R) const { return size_t(s / unit_slabs) * unit_bytes(R); }
  // What is read of R rows however few of their columns are wanted.
  SR_INLINE size_t heads_bytes(int R) const { return units_bytes(R) + size_t(slabs()) * slab_head_bytes(R); }
  SR_INLINE size_t run_bytes(int R) const { return size_t(R) * code_bits(kind) / 8; }
  SR_INLINE size_t slab_bytes(int R) const { return slab_head_bytes(R) + (runs ? 0 : kSlabCols * run_bytes(R)); }
  SR_INLINE size_t panel_bytes(int R) const {
    if (is_quantised(kind)) return units_bytes(R) + size_t(slabs()) * slab_bytes(R);
    return size_t(R) * cols * (kind == WeightKind::f32 ? 4 : 2);
  }
  size_t total_bytes() const {
    size_t n = 0;
    for (int r = 0; r < padded_rows(); r += panel_rows) {
      int R = padded_rows() - r < panel_rows ? padded_rows() - r : panel_rows;
      n += panel_bytes(R);
    }
    return n;
  }
};

// Activations quantised to int8 in blocks of 32 inputs: x[j] ~ scale[j / 32] * q[j], |q| <= 127; padded columns are 0.
// For n vectors each array is row-major with the stride given.
struct QuantVector {
  const int8_t* q = nullptr;       // [padded_cols]
  const float* scale = nullptr;    // [slabs]
  const int32_t* sum = nullptr;    // [2 * slabs]: sums of q over each 16 inputs
};

constexpr int kRowLanes = 16;                            // slabs in a stripe: one lane of a vector each
constexpr int kStripeCols = kRowLanes * kSlabCols;       // inputs in a stripe of a row

constexpr int kNeuronBlock = 64;                         // neurons whose rows lie together

// The rows that feed the FFN's neurons, in layout `neurons`: blocks of 64 neurons, in each their gate rows and then
// their up rows (up rows alone where the FFN is not gated), so that either kind is read in long runs and a block is one
// run.
struct NeuronMatrix {
  const uint8_t* data = nullptr;
  WeightKind kind = WeightKind::f32;
  bool has_min = false;
  int group = 32;     // columns per scale: 32 or 16
  int neurons = 0;
  int cols = 0;       // true inputs
  bool gated = true;

  SR_INLINE int slabs() const { return (cols + kSlabCols - 1) / kSlabCols; }
  SR_INLINE int stripes() const { return (slabs() + kRowLanes - 1) / kRowLanes; }
  // Bytes of a row's codes, of its scales (as many again of minima), and of the whole row.
  SR_INLINE size_t code_bytes() const { return size_t(slabs()) * kSlabCols * code_bits(kind) / 8; }
  SR_INLINE size_t scale_bytes() const { return size_t(slabs()) * (kSlabCols / group) * 2; }
  SR_INLINE size_t row_bytes() const {
    const size_t n = is_quantised(kind) ? code_bytes() + scale_bytes() * (has_min ? 2 : 1)
                                        : size_t(cols) * (kind == WeightKind::f32 ? 4 : 2);
    return (n + 15) / 16 * 16;
  }
  SR_INLINE size_t row_stride() const { return (row_bytes() + 63) / 64 * 64; }
  SR_INLINE size_t record_bytes() const { return row_stride() * (gated ? 2 : 1); }  // that a neuron takes
  // From a neuron's gate row to its up row.
  SR_INLINE size_t up_offset() const { return gated ? kNeuronBlock * row_stride() : 0; }
  // Where a neuron's first row begins; the last block is a whole one.
  SR_INLINE size_t offset_of(int neuron) const {
    return size_t(neuron / kNeuronBlock) * kNeuronBlock * record_bytes() + size_t(neuron % kNeuronBlock) * row_stride();
  }
  SR_INLINE size_t total_bytes() const {
    return size_t((neurons + kNeuronBlock - 1) / kNeuronBlock) * kNeuronBlock * record_bytes();
  }
};

// A quantised vector put in the order in which rows are stored (order_for_rows): per stripe, 8 chunks of 16 lanes of 4
// inputs; lane l of chunk v holds inputs 32 l + 4 v .. + 3 of the stripe. Lanes beyond the last slab are zero.
struct RowVector {
  const int8_t* q = nullptr;       // [stripes, 8, 16, 4]
  const float* scale = nullptr;    // [stripes, 16]
  const int32_t* sum = nullptr;    // [stripes, 2, 16]: sums over each slab's first and second 16 inputs
};

}  // namespace sr
