// What the device code is compiled against: the CUDA toolkit, or, with SR_CUDA_EMULATED, the host emulation of
// tests/gpu/emulator, which runs the same sources thread by thread. Nothing else in this folder names either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#ifdef SR_CUDA_EMULATED
#include <sr_cuda_emulator.h>
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Static shared memory of a kernel, aligned as the tensor cores want it, and the dynamic part of the launch.
#define SR_SHARED(type, name, count) __shared__ __align__(32) type name[count]
#define SR_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include "sparse_run/error.h"

namespace sr {
namespace cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Throws Error(budget) where the device's memory does not suffice, Error(runtime) otherwise; `what` names the
// operation.
[[noreturn]] void fail(cudaError_t error, const char* what);
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(error, what);
}

#ifdef SR_CUDA_EMULATED
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... args) {
  check(sr_emu::launch(name, kernel, grid, block, shared, stream, P(args)...), name);
}
#elif defined(__CUDACC__)
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... args) {
  kernel<<<grid, block, shared, stream>>>(P(args)...);
  check(cudaGetLastError(), name);
}
#endif

#if defined(SR_CUDA_EMULATED) || defined(__CUDACC__)
__device__ __forceinline__ float from_half(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}
#endif

}  // namespace cuda
}  // namespace sr
