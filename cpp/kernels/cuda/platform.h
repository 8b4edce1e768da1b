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

// While one lives on this thread, a kernel of a GPU with compute capability 9.0 may be put on the multiprocessors while
// the one before it still runs (programmatic dependent launch): it waits in after_previous(). For stretches of a stream
// in which kernels follow each other without copies between them.
class OverlapLaunches {
 public:
  explicit OverlapLaunches(bool on) : before_(active()) { active() = on; }
  ~OverlapLaunches() { active() = before_; }
  OverlapLaunches(const OverlapLaunches&) = delete;
  OverlapLaunches& operator=(const OverlapLaunches&) = delete;
  static bool& active() {
    static thread_local bool on = false;
    return on;
  }

 private:
  bool before_;
};

#ifdef SR_CUDA_EMULATED
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... args) {
  check(sr_emu::launch(name, OverlapLaunches::active(), kernel, grid, block, shared, stream, P(args)...), name);
  check(cudaGetLastError(), name);
}
#elif defined(__CUDACC__)
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            A... args) {
  if (OverlapLaunches::active()) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, P(args)...), name);
    return;
  }
  kernel<<<grid, block, shared, stream>>>(P(args)...);
  check(cudaGetLastError(), name);
}
#endif

#if defined(SR_CUDA_EMULATED) || defined(__CUDACC__)
// Every thread of every kernel calls this once, before it reads or writes what another kernel touches: with overlapping
// launches the kernel before is not over until here, with all that it wrote. Only weights may be asked for earlier. All
// threads of all kernels: the next kernel then knows from this one that the ones before it are over too.
__device__ __forceinline__ void after_previous() {
#ifdef SR_CUDA_EMULATED
  sr_emu::after_previous();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// What another kernel wrote. Not __ldg, which promises that nobody writes while this kernel lives, so that it may be
// read ahead of after_previous().
template <class T>
__device__ __forceinline__ T fresh(const T* p) {
#ifdef SR_CUDA_EMULATED
  sr_emu::check_load(p);
#endif
  return *p;
}
// Asks for bytes that are read soon; p: device memory that no kernel writes.
__device__ __forceinline__ void prefetch(const void* p) {
#ifdef SR_CUDA_EMULATED
  sr_emu::prefetch(p);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

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
