// Stored weights on their way to the device. 4 and 8 bits and floats are copied as they lie; 5 and 6 bits are expanded
// to a byte per weight, because their bit planes would cost the device more instructions than the bytes cost it time.
#pragma once

#include <memory>
#include <vector>

#include "cuda/memory.h"
#include "kernels/cuda/launch.h"
#include "model/weights.h"

namespace sr {
namespace cuda {

// Device bytes of a stored matrix.
size_t device_bytes(const PanelMatrix& m);
size_t device_bytes(const Linear& m);  // with its bias
size_t device_bytes(const NeuronRows& m);
// Row groups that blocks of gemv take.
int gemv_groups(const Linear& m);
// The panels of a 5- or 6-bit matrix with a byte per weight, u - bias + 128; out: device_bytes(m).
void expand_to_bytes(const PanelMatrix& m, uint8_t* out);

// A matrix in device memory; parts as PanelMatrix, outputs and bias as Linear (model/linear.h) lays them out.
class DeviceMatrix {
 public:
  DeviceMatrix() = default;
  // add: host pointer to [rows] floats, or null. what: names the matrix in an error.
  DeviceMatrix(const std::vector<PanelMatrix>& parts, const float* add, const char* what);
  const Matrix& view() const { return view_; }
  bool empty() const { return view_.n_parts == 0; }

 private:
  Matrix view_ = {};
  std::vector<DeviceBuffer<uint8_t>> data_;
  DeviceBuffer<float> add_;
};

// Neurons stored as records, copied as they lie.
class DeviceNeurons {
 public:
  DeviceNeurons() = default;
  DeviceNeurons(const NeuronMatrix& m, const float* add, const char* what);
  const Neurons& view() const { return view_; }

 private:
  Neurons view_ = {};
  DeviceBuffer<uint8_t> data_;
  DeviceBuffer<float> add_;
};

// v, seen as vectors of fewer inputs.
Vectors narrow(Vectors v, int width);

// Room for n vectors; with lists for one of them.
class DeviceVectors {
 public:
  DeviceVectors() = default;
  DeviceVectors(int n, int width, const char* what);
  static size_t bytes(int n, int width);
  const Vectors& view() const { return view_; }

 private:
  Vectors view_ = {};
  DeviceBuffer<float> x_, scale_;
  DeviceBuffer<int8_t> q_, listed_;
  DeviceBuffer<int> sum_;
  DeviceBuffer<uint8_t> cols_, count_;
};

}  // namespace cuda
}  // namespace sr
