// The most likely tokens, so that a sampler needs 2 KB of a vocabulary's logits. The 256th largest of 1024 stretches'
// maxima is a lower bound of the 256th largest logit: what reaches it is gathered, and sorted by one block. Exact, and
// the same in every run, whatever the order in which blocks find a place for what they gather.
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

constexpr int kWarps = 8, kBlocks = kTopStretches / kWarps;

__device__ __forceinline__ int stretch(int n) { return (n + kTopStretches - 1) / kTopStretches; }

// Larger keys are likelier: by the logit, then by the lower id. Both zeros are one number.
__device__ __forceinline__ unsigned long long key_of(float logit, int id) {
  const unsigned bits = __float_as_uint(logit + 0.0f);
  const unsigned ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (unsigned long long)(ordered) << 32 | (0xffffffffu - unsigned(id));
}
__device__ __forceinline__ float logit_of(unsigned long long key) {
  const unsigned ordered = unsigned(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// Sorts 1024 keys in shared memory, the largest first; a thread each.
__device__ void sort_keys(unsigned long long* keys) {
  const unsigned i = threadIdx.x;
  for (unsigned size = 2; size <= 1024; size *= 2) {
    for (unsigned step = size / 2; step > 0; step /= 2) {
      __syncthreads();
      const unsigned other = i ^ step;
      if (other < i) continue;
      const unsigned long long a = keys[i], b = keys[other];
      if ((a < b) == ((i & size) == 0)) {
        keys[i] = b;
        keys[other] = a;
      }
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kWarps * 32) stretch_kernel(const TopArgs a) {
  after_previous();
  const int lane = int(threadIdx.x) % 32, s = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32, each = stretch(a.n);
  const int begin = s * each, end = min(a.n, begin + each);
  float most = -INFINITY;
  for (int i = begin + lane; i < end; i += 32) most = fmaxf(most, fresh(a.logits + i));
  most = warp_max(most);
  if (lane == 0) a.scratch->most[s] = most;
}

__global__ void __launch_bounds__(1024) bound_kernel(const TopArgs a) {
  SR_SHARED(unsigned long long, keys, 1024);
  after_previous();
  const int i = int(threadIdx.x);
  keys[i] = key_of(a.scratch->most[i], i);
  sort_keys(keys);
  if (i != 0) return;
  a.scratch->largest = logit_of(keys[0]);
  a.scratch->bound = logit_of(keys[kTop - 1]);
  a.scratch->found = 0;
}

__global__ void __launch_bounds__(kWarps * 32) gather_kernel(const TopArgs a) {
  SR_SHARED(double, part, kWarps);
  after_previous();
  const float bound = a.scratch->bound, largest = a.scratch->largest;
  double sum = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < a.n; i += int(gridDim.x * blockDim.x)) {
    const float v = fresh(a.logits + i);
    sum += exp(double(v - largest));
    if (v < bound) continue;
    const int at = atomicAdd(&a.scratch->found, 1);
    if (at < kTopRoom) a.scratch->keys[at] = key_of(v, i);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int w = 0; w < kWarps; w++) sum += part[w];
  a.scratch->sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(1024) top_kernel(const TopArgs a) {
  SR_SHARED(unsigned long long, keys, 1024);
  after_previous();
  const int i = int(threadIdx.x), found = a.scratch->found;
  keys[i] = i < found && found <= kTopRoom ? a.scratch->keys[i] : 0ull;
  sort_keys(keys);
  if (i < kTop && i < found) {
    a.top->logit[i] = logit_of(keys[i]);
    a.top->id[i] = int(0xffffffffu - unsigned(keys[i]));
  }
  if (i >= 32) return;
  double sum = 0;
  for (int b = i; b < kBlocks; b += 32) sum += a.scratch->sums[b];
  sum = warp_sum(sum);
  if (i != 0) return;
  a.top->total = sum;
  a.top->n = found > kTopRoom ? -1 : min(found, kTop);
}

}  // namespace

void find_top(cudaStream_t s, const TopArgs& a) {
  static_assert(kTopStretches == 1024 && kTopRoom == 1024 && kTop <= 1024, "a block sorts 1024");
  launch("stretches of logits", stretch_kernel, dim3(kBlocks), dim3(kWarps * 32), 0, s, a);
  launch("bound of the top logits", bound_kernel, dim3(1), dim3(1024), 0, s, a);
  launch("gathering the top logits", gather_kernel, dim3(kBlocks), dim3(kWarps * 32), 0, s, a);
  launch("top logits", top_kernel, dim3(1), dim3(1024), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
