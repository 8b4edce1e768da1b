// A GPU made of fibers: enough of CUDA's language and runtime to run the sources of cpp/kernels/cuda and cpp/cuda on a
// host without one. Every thread of a block is a fiber; it runs until it meets a barrier or a warp operation. Checked
// on the way: threads that leave a barrier or a warp behind, warp operations that differ within a warp, wrong launch
// sizes. Shared, device and pinned memory begin as NaN; a page that nobody may touch follows every allocation, and the
// host may not touch device memory at all. The order in which threads and blocks run can be turned round or shuffled
// (sr_emu::set_order, SR_EMU_ORDER): code that lacks a barrier then gives other results. What this cannot show: speed,
// and the order in which real hardware makes one thread's writes visible to another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "kernels/f16.h"

// ---- language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define SR_SHARED(type, name, count)  \
  static char name##_tag;             \
  type* const name = static_cast<type*>(sr_emu::shared(&name##_tag, sizeof(type) * (count)))
#define SR_DYNAMIC_SHARED(name) unsigned char* const name = sr_emu::dynamic_shared()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t u) { return {u}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) { return sr::f16_to_f32(h.bits); }
inline __half __float2half_rn(float f) { return {sr::f32_to_f16(f)}; }

namespace sr_emu {

struct Place {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Place here;

// Order in which a block's threads, and a grid's blocks, take their turns.
enum class Order { forward, backward, shuffled };
void set_order(Order order, unsigned seed = 1);
void reset_order();  // to what SR_EMU_ORDER says, else forward

void* shared(const void* tag, size_t bytes);
unsigned char* dynamic_shared();
void barrier(const char* what);
// Waits until the 32 threads of the warp have called with the same `what`; each then sees all their values.
const uint64_t* warp_exchange(const char* what, uint64_t mine);
[[noreturn]] void broken(const char* what);
bool in_kernel();
void poison(void* p, size_t bytes);
extern uintptr_t device_begin, device_end;  // of all device memory

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
// Runs now, or is put down in the graph that the stream captures.
int submit(struct Stream* stream, std::function<void()> work);

template <class T>
uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8, "warp operations take up to 8 bytes");
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
T from_bits(uint64_t u) {
  T v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}
// Loads fault on a GPU where their address is not a multiple of their size, or the host's.
template <class T>
void check_load(const T* p) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % sizeof(T)) broken("a load that is not aligned to its size");
  if (at < device_begin || at >= device_end) broken("a load of what is no device memory");
}
// A thread says that what earlier kernels wrote may be used now; one that ends without having said so is an error.
void after_previous();
// p must be device memory.
void prefetch(const void* p);
inline int lane() {
  const unsigned t = here.thread.x + here.block_dim.x * (here.thread.y + here.block_dim.y * here.thread.z);
  return int(t % 32);
}
inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) broken("a warp operation with a partial mask");
}

}  // namespace sr_emu

#define threadIdx (sr_emu::here.thread)
#define blockIdx (sr_emu::here.block)
#define blockDim (sr_emu::here.block_dim)
#define gridDim (sr_emu::here.grid_dim)

inline void __syncthreads() { sr_emu::barrier("__syncthreads"); }
inline int __syncthreads_or(int v) {
  SR_SHARED(int, any, 1);
  __syncthreads();
  any[0] = 0;
  __syncthreads();
  if (v) any[0] = 1;
  __syncthreads();
  return any[0];
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  sr_emu::check_mask(mask);
  sr_emu::warp_exchange("__syncwarp", 0);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int from) {
  sr_emu::check_mask(mask);
  return sr_emu::from_bits<T>(sr_emu::warp_exchange("__shfl_sync", sr_emu::to_bits(v))[from & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with) {
  sr_emu::check_mask(mask);
  return sr_emu::from_bits<T>(
      sr_emu::warp_exchange("__shfl_xor_sync", sr_emu::to_bits(v))[(sr_emu::lane() ^ with) & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  sr_emu::check_mask(mask);
  const int lane = sr_emu::lane(), from = lane >= int(by) ? lane - int(by) : lane;
  return sr_emu::from_bits<T>(sr_emu::warp_exchange("__shfl_up_sync", sr_emu::to_bits(v))[from]);
}
inline unsigned __ballot_sync(unsigned mask, int v) {
  sr_emu::check_mask(mask);
  const uint64_t* all = sr_emu::warp_exchange("__ballot_sync", v != 0);
  unsigned out = 0;
  for (int i = 0; i < 32; i++) out |= unsigned(all[i]) << i;
  return out;
}
inline void __threadfence() {}
template <class T>
T atomicAdd(T* at, T v) {
  const T old = *at;
  *at = old + v;
  return old;
}
template <class T>
T atomicOr(T* at, T v) {
  const T old = *at;
  *at = old | v;
  return old;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
template <class T>
T __ldg(const T* p) {
  sr_emu::check_load(p);
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  sr_emu::check_load(p);
  return *p;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
  return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
inline int __float2int_rn(float f) { return int(std::nearbyint(f)); }
inline float __int_as_float(int i) { return sr_emu::from_bits<float>(uint32_t(i)); }
inline int __float_as_int(float f) { return int(sr_emu::to_bits(f)); }
inline unsigned __float_as_uint(float f) { return unsigned(sr_emu::to_bits(f)); }
inline float __uint_as_float(unsigned i) { return sr_emu::from_bits<float>(i); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
using std::max;
using std::min;

// ---- tensor cores: a fragment is the whole tile, held by every thread of the warp

namespace nvcuda {
namespace wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  T x[16 * 16];
};
template <class F>
void fill_fragment(F& f, int v) {
  sr_emu::warp_exchange("fill_fragment", 0);
  for (auto& x : f.x) x = v;
}
inline void check_stride(unsigned ldm, size_t size) {
  if (ldm * size % 16) sr_emu::broken("a wmma stride that is not a multiple of 16 bytes");
}
// a [16, 16] as rows x inputs, b as inputs x columns, kept row-major.
template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned ldm) {
  sr_emu::warp_exchange("load_matrix_sync", sr_emu::to_bits(p));
  check_stride(ldm, sizeof(T));
  if (reinterpret_cast<uintptr_t>(p) % 32) sr_emu::broken("a wmma load that is not aligned to 32 bytes");
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++)
      f.x[i * 16 + j] = std::is_same<Layout, row_major>::value ? p[i * ldm + j] : p[j * ldm + i];
}
template <class L1, class L2>
void mma_sync(fragment<accumulator, 16, 16, 16, int>& d, const fragment<matrix_a, 16, 16, 16, signed char, L1>& a,
              const fragment<matrix_b, 16, 16, 16, signed char, L2>& b,
              const fragment<accumulator, 16, 16, 16, int>& c) {
  sr_emu::warp_exchange("mma_sync", 0);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      int sum = c.x[i * 16 + j];
      for (int k = 0; k < 16; k++) sum += int(a.x[i * 16 + k]) * int(b.x[k * 16 + j]);
      d.x[i * 16 + j] = sum;
    }
}
inline void store_matrix_sync(int* p, const fragment<accumulator, 16, 16, 16, int>& f, unsigned ldm, layout_t layout) {
  sr_emu::warp_exchange("store_matrix_sync", sr_emu::to_bits(p));
  check_stride(ldm, sizeof(int));
  if (reinterpret_cast<uintptr_t>(p) % 32) sr_emu::broken("a wmma store that is not aligned to 32 bytes");
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) p[layout == mem_row_major ? i * ldm + j : j * ldm + i] = f.x[i * 16 + j];
}
}  // namespace wmma
}  // namespace nvcuda

// ---- runtime

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchFailure = 719,
  cudaErrorSystemNotReady = 802,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };


struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

namespace sr_emu {
struct Stream;
struct Graph;
struct Event;
// Test switches: device memory that is left, allocations and launches that fail.
struct Faults {
  int devices = 1;
  size_t memory = size_t(1) << 34;
  int fail_launch_after = -1;  // launches that still succeed; -1: all
  int fail_copy_after = -1;    // copies, of those that run in a stream or a graph
  bool failed = false;         // every later call reports the failure, as a broken context does
  cudaError_t code = cudaSuccess;   // what loading a kernel gives
  cudaError_t count = cudaSuccess;  // what asking for devices gives
  int capability = 75;
  int ptx = 0;                 // that the loaded code was compiled for, before it was translated; 0: this GPU
  int driver = 12080;          // the newest CUDA that it knows; 0: there is none
};
extern Faults faults;
extern size_t allocated, elsewhere;     // bytes; of these, those that are not on the first device
extern long long launches, overlapped;  // of kernels; of these, those that were allowed to start early
extern long long copied;                // bytes, by copies that ran in a stream
extern size_t behind_wait;              // the least work in a stream behind an event that the host waited for

// A kernel is loaded by its first launch, or by being asked for its attributes; in a capture it must be.
void load(const void* kernel, const char* name);

template <class... P>
cudaError_t launch(const char* name, bool overlap, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   Stream* stream, P... args) {
  static_assert((size_t(0) + ... + sizeof(P)) <= 4096, "what a kernel takes at most");
  if (faults.failed) return cudaErrorLaunchFailure;
  load(reinterpret_cast<const void*>(kernel), name);
  overlapped += overlap;
  const std::tuple<P...> pack(args...);
  return cudaError_t(submit(stream, [=] {
    run_grid(name, grid, block, shared_bytes, [&] { std::apply(kernel, pack); });
  }));
}
}  // namespace sr_emu

using cudaStream_t = sr_emu::Stream*;
using cudaGraph_t = sr_emu::Graph*;
using cudaGraphExec_t = sr_emu::Graph*;
using cudaEvent_t = sr_emu::Event*;
struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};

const char* cudaGetErrorString(cudaError_t e);
cudaError_t cudaGetDeviceCount(int* n);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device);
cudaError_t cudaMemGetInfo(size_t* available, size_t* total);
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMallocHost(void** p, size_t bytes);
cudaError_t cudaFreeHost(void* p);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t s);
cudaError_t cudaStreamSynchronize(cudaStream_t s);
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s);
cudaError_t cudaGraphDestroy(cudaGraph_t g);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* kernel);
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads, size_t) {
  *blocks = 1024 / threads;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, void (*kernel)(P...)) {
  return cudaFuncGetAttributes(a, reinterpret_cast<const void*>(kernel));
}
cudaError_t cudaEventCreate(cudaEvent_t* e);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t e);
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s);
cudaError_t cudaEventSynchronize(cudaEvent_t e);
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b);
