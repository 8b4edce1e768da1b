// Random stored matrices and vectors for kernel tests, with their plain fp32 weights as the truth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/f16.h"
#include "kernels/pack/pack.h"
#include "kernels/table.h"

namespace sr_test {

// The kernels that this processor can run, `generic` last.
inline std::vector<const sr::KernelTable*> runnable() {
  std::vector<const sr::KernelTable*> out;
  int n = 0;
  const sr::IsaEntry* entries = sr::isa_entries(&n);
  for (int i = 0; i < n; ++i)
    if (entries[i].supported) out.push_back(entries[i].table);
  return out;
}
inline const sr::KernelTable& generic() { return *runnable().back(); }

// How a quantised matrix is stored.
struct Layout {
  sr::WeightKind kind;
  int group;
  bool min;
  bool units = false;  // scales are products
};

struct RandomMatrix {
  sr::PanelMatrix view;
  std::vector<uint8_t> bytes;
  std::vector<float> weights;  // [rows, cols]

  RandomMatrix(sr::WeightKind kind, int rows, int cols, int group, bool has_min, int panel_rows, std::mt19937& rng,
               bool extreme = false, bool units = false) {
    view.kind = kind;
    view.unit_slabs = units ? sr::kUnitSlabs : 0;
    view.has_min = has_min;
    view.group = group;
    view.rows = rows;
    view.cols = cols;
    view.panel_rows = panel_rows;
    bytes.assign(view.total_bytes() + 64, 0xAA);
    weights.resize(size_t(rows) * cols);
    uint8_t* out = aligned();
    const int groups = (cols + group - 1) / group;
    for (int r = 0; r < rows; r += panel_rows) {
      const int n = std::min(panel_rows, rows - r);
      if (sr::is_quantised(kind)) {
        const int top = (1 << sr::code_bits(kind)) - 1;
        std::vector<uint8_t> codes(size_t(n) * cols);
        std::vector<uint16_t> scales(size_t(n) * groups), mins(size_t(n) * groups);
        for (auto& c : codes) c = uint8_t(extreme ? (rng() % 2) * top : rng() % (top + 1));
        for (auto& s : scales) s = sr::f32_to_f16(0.001f + 0.01f * float(rng() % 1000) / 1000.0f);
        for (auto& m : mins) m = sr::f32_to_f16(-0.1f + 0.1f * float(rng() % 1000) / 1000.0f);
        const int blocks = (cols + 255) / 256;
        std::vector<int8_t> scale_codes(scales.size()), min_codes(mins.size());
        std::vector<uint16_t> of_scales(size_t(n) * blocks), of_mins(size_t(n) * blocks);
        if (units) {
          for (auto& c : scale_codes) c = int8_t(extreme ? (rng() % 2 ? 127 : -128) : int(rng() % 256) - 128);
          for (auto& c : min_codes) c = int8_t(int(rng() % 256) - 128);
          for (auto* all : {&of_scales, &of_mins})
            for (auto& u : *all) u = sr::f32_to_f16(0.0001f * (1.0f + float(rng() % 1000) / 1000.0f));
          of_scales[0] = 1;  // the smallest half
          sr::pack_panel(kind, codes.data(),
                         {scale_codes.data(), has_min ? min_codes.data() : nullptr, of_scales.data(), of_mins.data()},
                         n, cols, group, out);
        } else {
          sr::pack_panel(kind, codes.data(), scales.data(), has_min ? mins.data() : nullptr, n, cols, group, out);
        }
        sr::unpack_panel(kind, out, n, cols, group, has_min, weights.data() + size_t(r) * cols, view.unit_slabs);
        // The packer's own truth: the unpacked weight is what the codes say.
        for (int i = 0; i < n * cols; i += 7) {
          const int row = i / cols, g = i % cols / group;
          const size_t at = size_t(row) * groups + g, block = size_t(row) * blocks + i % cols / 256;
          float s = sr::f16_to_f32(scales[at]), low = sr::f16_to_f32(mins[at]);
          if (units) {
            s = float(scale_codes[at]) * sr::f16_to_f32(of_scales[block]);
            low = float(min_codes[at]) * sr::f16_to_f32(of_mins[block]);
          }
          const float u = float(codes[i]);
          const float want = has_min ? std::fma(s, u, low)
                                     : s * (u - float(sr::code_bias(kind)));
          if (want != weights[size_t(r) * cols + i]) pack_errors++;
        }
      } else {
        std::vector<float> values(size_t(n) * cols);
        for (auto& v : values) v = (float(rng() % 2001) - 1000.0f) / 10000.0f;
        sr::pack_panel_float(kind, values.data(), n, cols, out);
        sr::unpack_panel(kind, out, n, cols, group, false, weights.data() + size_t(r) * cols);
      }
      out += view.panel_bytes(std::min(panel_rows, view.padded_rows() - r));
    }
    view.data = aligned();
  }
  RandomMatrix(const RandomMatrix&) = delete;

  int pack_errors = 0;

 private:
  uint8_t* aligned() {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) & ~uintptr_t(63));
  }
};

// A matrix whose columns lie apart from the scales, in any order.
struct ColumnsApart {
  sr::PanelMatrix view;
  std::vector<uint8_t> heads, runs;
  std::vector<uint32_t> place;  // [padded columns]

  ColumnsApart(const sr::PanelMatrix& m, std::mt19937& rng) : view(m), place(size_t(m.padded_cols())) {
    const size_t column = m.run_bytes(m.padded_rows());
    for (size_t c = 0; c < place.size(); ++c) place[c] = uint32_t(c * column);
    std::shuffle(place.begin(), place.end(), rng);
    runs.assign(place.size() * column + 64, 0x55);
    const uint8_t* panel = m.data;
    for (int r = 0; r < m.padded_rows(); r += m.panel_rows) {
      const int R = std::min(m.panel_rows, m.padded_rows() - r);
      heads.insert(heads.end(), panel, panel + m.units_bytes(R));
      panel += m.units_bytes(R);
      for (int s = 0; s < m.slabs(); ++s, panel += m.slab_bytes(R)) {
        heads.insert(heads.end(), panel, panel + m.slab_head_bytes(R));
        for (int c = 0; c < sr::kSlabCols; ++c) {
          std::copy_n(panel + m.slab_head_bytes(R) + size_t(c) * m.run_bytes(R), m.run_bytes(R),
                      runs.data() + place[size_t(s * sr::kSlabCols + c)] + m.run_bytes(r));
        }
      }
    }
    view.data = heads.data();
    view.runs = runs.data();
  }
};

struct Quantised {
  std::vector<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  int slabs;

  Quantised(const sr::KernelTable& k, const std::vector<float>& x, int n, int vectors = 1) {
    slabs = (n + 31) / 32;
    q.resize(size_t(vectors) * slabs * 32);
    scale.resize(size_t(vectors) * slabs);
    sum.resize(size_t(vectors) * slabs * 2);
    for (int v = 0; v < vectors; ++v)
      k.quantise(x.data() + size_t(v) * n, n, q.data() + size_t(v) * slabs * 32, scale.data() + size_t(v) * slabs,
                 sum.data() + size_t(v) * slabs * 2);
  }
  sr::QuantVector view() const { return {q.data(), scale.data(), sum.data()}; }
};

inline std::vector<float> random_vector(size_t n, std::mt19937& rng, float spread = 1.0f) {
  std::normal_distribution<float> d(0, spread);
  std::vector<float> x(n);
  for (auto& v : x) v = d(rng);
  return x;
}

}  // namespace sr_test
