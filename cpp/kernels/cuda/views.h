// Matrices and vectors in device memory, as kernels see them. Plain data, passed by value.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/table.h"

namespace sr {
namespace cuda {

// How a part is stored on the device. 4 bits lie exactly as in the file; 5, 6 and 8 bits are a byte per weight, u -
// bias + 128, in the same panels; floats lie as in the file.
enum class Store : int { q4, q8, f32, f16, bf16 };

constexpr int kMaxParts = 4;

// One stored matrix, or one part of a matrix whose parts have different bits.
struct Part {
  const uint8_t* data;
  Store store;
  int has_min, group, bias;  // bias: of the file's codes (code_bias)
  int unit_slabs;            // as PanelMatrix has them
  int rows, cols, slabs, tiles, panel_rows;
  const float* add;          // [rows], added to the outputs, or null
  int y_begin;               // index of its first output; parts begin at whole tiles
  int first_group;           // of the row groups that blocks of gemv take

  // Bytes of one column's run, and of one slab, of a panel of R rows.
  SR_INLINE size_t run_bytes(int R) const { return store == Store::q4 ? size_t(R) / 2 : size_t(R); }
  SR_INLINE int planes() const { return has_min ? 2 : 1; }
  SR_INLINE int scale_bytes() const { return unit_slabs ? 1 : 2; }
  SR_INLINE size_t head_bytes(int R) const { return size_t(32 / group) * size_t(planes() * scale_bytes()) * size_t(R); }
  SR_INLINE size_t slab_bytes(int R) const { return head_bytes(R) + 32 * run_bytes(R); }
  // Of the units that a panel begins with, and of those of slab s among them.
  SR_INLINE size_t units_bytes(int R) const {
    return unit_slabs ? size_t((slabs + unit_slabs - 1) / unit_slabs) * size_t(planes() * 2) * size_t(R) : 0;
  }
  SR_INLINE size_t unit_offset(int s, int R) const { return size_t(s / unit_slabs) * size_t(planes() * 2) * size_t(R); }
  SR_INLINE size_t panel_bytes(int R) const {
    if (store == Store::q4 || store == Store::q8) return units_bytes(R) + size_t(slabs) * slab_bytes(R);
    return size_t(R) * size_t(cols) * (store == Store::f32 ? 4 : 2);
  }
};

// Rows that one block of gemv computes.
SR_INLINE int group_rows(Store s) { return s == Store::q4 ? 256 : s == Store::q8 ? 128 : 64; }

struct Matrix {
  Part part[kMaxParts];
  int n_parts;
  int groups;       // row groups of all parts
  int rows, cols;   // true size
  int slabs;
  int y_rows;       // floats that an output needs
  bool quantised;   // some part needs the int8 input
  bool floating;    // some part needs the fp32 input
  size_t bytes;     // in device memory
  size_t head_bytes;  // scales and minima among them, which skipping columns does not save
};

// n vectors of `width` inputs: fp32, and int8 in blocks of 32 as kernels/table.h has them; rows are `padded` apart.
// The list holds, for each half slab of 16 inputs, the active columns (0..31 of the slab) and their q, filled up with
// zeros to whole quads; one vector only.
struct Vectors {
  float* x;          // [n, padded]
  int8_t* q;         // [n, padded]
  float* scale;      // [n, slabs]
  int* sum;          // [n, 2 slabs]
  uint8_t* cols;     // [padded], null: no lists
  int8_t* listed;    // [padded]
  uint8_t* count;    // [2 slabs]
  int width, padded, slabs;
};

// A site's mask: input j is kept iff |x[j]| > threshold[j]. No threshold: nothing is masked. The list is used where
// *kept <= limit.
struct Mask {
  const float* threshold;  // [width], from position dense_tokens on
  const float* before;     // the same for the positions before it
  int dense_tokens;
  int* kept;               // receives the columns kept (added); null: not counted, the list is not used
  int limit;

  SR_INLINE const float* at(int pos) const { return pos >= dense_tokens ? threshold : before; }
};

enum class NormType : int { none, rms, layer };
struct NormView {
  NormType type;
  const float* weight;
  const float* bias;  // or null
  float eps;
};

}  // namespace cuda
}  // namespace sr
