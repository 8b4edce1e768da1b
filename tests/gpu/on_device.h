// What the tests of device code share: buffers that travel, and the emulation's orders where there is no GPU.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "cuda/memory.h"
#include "cuda/upload.h"
#include "random_panels.h"

namespace sr_test {

constexpr int kMultiprocessors = 4;  // what products are cut for: small, and the same on every machine

template <class T>
std::vector<T> from_device(const T* p, size_t n) {
  std::vector<T> out(n);
  sr::cuda::check(cudaMemcpy(out.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost), "results");
  return out;
}
template <class T>
sr::cuda::DeviceBuffer<T> on_device(const std::vector<T>& v) {
  return sr::cuda::to_device(v.data(), v.size(), "a test");
}

inline std::mt19937 fresh(unsigned salt) {
#ifdef SR_CUDA_EMULATED
  return std::mt19937(salt);
#else
  return std::mt19937(std::random_device{}() ^ salt);  // new data in every run on a GPU
#endif
}

// Runs fn once on a GPU; emulated, once for each order of threads and blocks.
template <class Fn>
void in_every_order(Fn fn) {
#ifdef SR_CUDA_EMULATED
  for (auto order : {sr_emu::Order::forward, sr_emu::Order::backward, sr_emu::Order::shuffled}) {
    sr_emu::set_order(order, 7);
    fn();
  }
  sr_emu::reset_order();
#else
  fn();
#endif
}

inline sr::cuda::DeviceBuffer<sr::cuda::Step> step_at(int pos, int token = 0) {
  const sr::cuda::Step step = {pos, token};
  return sr::cuda::to_device(&step, 1, "a test");
}

// x [n, width] as prepare makes it without a norm.
struct DeviceInput {
  sr::cuda::DeviceVectors vectors;
  sr::cuda::DeviceBuffer<int> kept;
  sr::cuda::DeviceBuffer<float> threshold;
  sr::cuda::Mask mask = {};

  DeviceInput(cudaStream_t s, const std::vector<float>& x, int n, int width, const std::vector<float>& thresholds = {},
              double limit = 1.0)
      : vectors(n, width, "a test"), kept(on_device(std::vector<int>{0})) {
    const auto source = on_device(x);
    const auto step = step_at(0);
    if (!thresholds.empty()) {
      threshold = on_device(thresholds);
      mask = {threshold.data(), nullptr, 0, kept.data(), int(limit * width)};
    }
    sr::cuda::PrepareArgs a = {};
    a.x = source.data();
    a.ldx = size_t(width);
    a.width = width;
    a.residual_scale = 1;
    a.out = vectors.view();
    a.quantise = 1;
    a.mask = mask;
    a.step = step.data();
    sr::cuda::prepare(s, a, n);
    sr::cuda::check(cudaStreamSynchronize(s), "prepare");
  }
};

}  // namespace sr_test
