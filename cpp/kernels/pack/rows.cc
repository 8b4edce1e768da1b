// Packs the rows of neurons into records and reads them back; see models/format.md for the layout.
#include "kernels/pack/rows.h"

#include <cmath>
#include <cstring>

#include "kernels/f16.h"
#include "kernels/rows.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

// Calls fn(bytes of a stored row, index of the plain row).
template <class Byte, class Fn>
void each_row(const NeuronMatrix& shape, Byte* records, Fn fn) {
  const int per = shape.gated ? 2 : 1;
  for (int i = 0; i < shape.neurons; ++i)
    for (int r = 0; r < per; ++r)
      fn(records + shape.offset_of(i) + r * shape.up_offset(), size_t(i) * per + r);
}

void put_half(uint8_t* plane, size_t i, uint16_t h) { std::memcpy(plane + 2 * i, &h, 2); }
uint16_t half_at(const uint8_t* plane, size_t i) {
  uint16_t h;
  std::memcpy(&h, plane + 2 * i, 2);
  return h;
}

}  // namespace

void pack_neurons(const NeuronMatrix& shape, const uint8_t* codes, const uint16_t* scales, const uint16_t* mins,
                  uint8_t* out) {
  SR_CHECK(is_quantised(shape.kind) && shape.has_min == (mins != nullptr) && (shape.group == 16 || shape.group == 32));
  std::memset(out, 0, shape.total_bytes());
  const RowPlan plan(shape);
  const int groups = (shape.cols + shape.group - 1) / shape.group;
  each_row(shape, out, [&](uint8_t* row, size_t from) {
    const uint8_t* u = codes + from * shape.cols;
    for (int c = 0; c < shape.cols; ++c) {
      const CodePlace low = low_place(plan, c);
      row[low.at] |= uint8_t(unsigned(shape.kind == WeightKind::q8 ? u[c] : u[c] & 15) << low.shift);
      if (!plan.high_lane) continue;
      const CodePlace high = high_place(plan, c);
      row[high.at] |= uint8_t(unsigned(u[c]) >> 4 << high.shift);
    }
    for (int g = 0; g < groups; ++g) {
      const int slab = g * shape.group / kSlabCols;
      const size_t at = scale_place(plan, slab / kRowLanes, g % plan.parts, slab % kRowLanes);
      put_half(row + plan.scale, at, scales[from * groups + g]);
      if (mins) put_half(row + plan.min, at, mins[from * groups + g]);
    }
  });
}

void pack_neurons_float(const NeuronMatrix& shape, const float* values, uint8_t* out) {
  SR_CHECK(!is_quantised(shape.kind));
  std::memset(out, 0, shape.total_bytes());
  each_row(shape, out, [&](uint8_t* row, size_t from) {
    const float* v = values + from * shape.cols;
    if (shape.kind == WeightKind::f32) {
      std::memcpy(row, v, sizeof(float) * shape.cols);
      return;
    }
    for (int c = 0; c < shape.cols; ++c)
      put_half(row, c, shape.kind == WeightKind::f16 ? f32_to_f16(v[c]) : f32_to_bf16(v[c]));
  });
}

void unpack_neurons(const NeuronMatrix& w, float* out) {
  const RowPlan plan(w);
  each_row(w, w.data, [&](const uint8_t* row, size_t to) {
    float* v = out + to * w.cols;
    if (w.kind == WeightKind::f32) {
      std::memcpy(v, row, sizeof(float) * w.cols);
      return;
    }
    for (int c = 0; c < w.cols; ++c) {
      if (!is_quantised(w.kind)) {
        v[c] = w.kind == WeightKind::f16 ? f16_to_f32(half_at(row, c)) : bf16_to_f32(half_at(row, c));
        continue;
      }
      const int slab = c / kSlabCols;
      const size_t at = scale_place(plan, slab / kRowLanes, c % kSlabCols / w.group, slab % kRowLanes);
      const float scale = f16_to_f32(half_at(row + plan.scale, at));
      const int u = int(row_code(plan, row, c));
      v[c] = w.has_min ? std::fma(scale, float(u), f16_to_f32(half_at(row + plan.min, at)))
                       : scale * float(u - code_bias(w.kind));
    }
  });
}

}  // namespace sr
