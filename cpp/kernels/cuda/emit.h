// Device functions that several files share. emit is the end of every kernel that makes the input of a product: a warp
// holds a slab of 32 values, stores them in fp32 and in int8, masks them, and lists the active columns. The bits are
// those of the CPU's quantise and select.
#pragma once

#include "kernels/cuda/launch.h"

#if defined(SR_CUDA_EMULATED) || defined(__CUDACC__)

namespace sr {
namespace cuda {

__device__ __forceinline__ float activation(Activation act, float g) {
  switch (act) {
    case Activation::silu: return g / (1.0f + expf(-g));
    case Activation::gelu_tanh: return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g)));
    case Activation::gelu: return 0.5f * g * (1.0f + erff(g * 0.7071067812f));
    case Activation::relu: return g < 0 ? 0.0f : g;  // keeps NaN
    default: return g < 0 ? 0.0f : g * g;
  }
}

// Asks for the threshold that emit will look at, while its value is still being made.
__device__ __forceinline__ void prefetch_threshold(const Vectors& v, int i, const Mask& mask, int pos) {
  const float* threshold = mask.at(pos);
  if (threshold && i < v.width) prefetch(threshold + i);
}

// Value of input i (lane i % 32 of the warp, which holds all of slab i / 32); inputs from width on must be passed too.
__device__ __forceinline__ void emit(const Vectors& v, int row, int i, float value, int quantise, const Mask& mask,
                                     int pos) {
  const int lane = i % 32, slab = i / 32, half = lane / 16, place = lane % 16;
  const bool inside = i < v.width;
  if (!inside) value = 0;
  v.x[size_t(row) * v.padded + i] = value;
  if (!quantise) return;

  unsigned top = __float_as_uint(value) & 0x7fffffffu;  // compared as bits, so that a NaN wins
  for (int step = 16; step > 0; step /= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, step));
  const float most = __uint_as_float(top);
  const bool finite = top < 0x7f800000u;
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  int q = finite ? __float2int_rn(__fmul_rn(value, inverse)) : 0;
  const float* threshold = mask.at(pos + row);
  if (threshold && !(inside && fabsf(value) > threshold[inside ? i : 0])) q = 0;
  int sum = q;
  for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  const size_t at = size_t(row) * v.slabs + slab;
  if (lane == 0) v.scale[at] = finite ? most / 127.0f : __uint_as_float(0x7fc00000u);
  if (place == 0) v.sum[2 * at + half] = sum;
  v.q[size_t(row) * v.padded + i] = int8_t(q);
  if (!threshold) return;

  const unsigned on = __ballot_sync(kFullWarp, q != 0);
  if (mask.kept && lane == 0) atomicAdd(mask.kept, __popc(on));
  if (!v.cols || row) return;
  const unsigned mine = on >> 16 * half & 0xffff;
  const int n = __popc(mine);
  if (q != 0) {
    const int to = 32 * slab + 16 * half + __popc(mine & ((1u << place) - 1));
    v.cols[to] = uint8_t(lane);
    v.listed[to] = int8_t(q);
  }
  if (place >= n && place < (n + 3) / 4 * 4) {  // fills up the last quad: a column that is read anyway, times 0
    v.cols[32 * slab + 16 * half + place] = uint8_t(16 * half + 31 - __clz(int(mine)));
    v.listed[32 * slab + 16 * half + place] = 0;
  }
  if (place == 0) v.count[2 * slab + half] = uint8_t(n);
}

}  // namespace cuda
}  // namespace sr

#endif
