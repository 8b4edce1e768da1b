// After the last matrix: scale, soft cap and check of the logits, and the most likely token.
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

struct FinishArgs {
  float* logits;
  size_t ld;
  int n_vocab;
  float scale, cap;
  int* bad;
};

__global__ void __launch_bounds__(256) finish_kernel(const FinishArgs a) {
  after_previous();
  const int i = int(blockIdx.x) * 256 + int(threadIdx.x);
  int bad = 0;
  if (i < a.n_vocab) {
    float* at = a.logits + size_t(blockIdx.y) * a.ld + i;
    float v = *at;
    if (a.scale != 1) v = __fmul_rn(v, a.scale);
    if (a.cap > 0) v = a.cap * tanhf(v / a.cap);
    *at = v;
    bad = (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u;
  }
  if (bad) atomicOr(a.bad, 1);
}

constexpr int kBlocks = 256;

// The larger of two (value, index); of equal values the lower index.
__device__ __forceinline__ void better(float v, int i, float* most, int* at) {
  if (v > *most || (v == *most && i < *at)) {
    *most = v;
    *at = i;
  }
}

__device__ void block_best(float* most, int* at) {
  SR_SHARED(float, values, 8);
  SR_SHARED(int, places, 8);
  for (int step = 16; step > 0; step /= 2) {
    const float v = __shfl_xor_sync(kFullWarp, *most, step);
    const int i = __shfl_xor_sync(kFullWarp, *at, step);
    better(v, i, most, at);
  }
  if (threadIdx.x % 32 == 0) {
    values[threadIdx.x / 32] = *most;
    places[threadIdx.x / 32] = *at;
  }
  __syncthreads();
  for (int w = 0; w < 8; w++) better(values[w], places[w], most, at);
}

struct ArgmaxArgs {
  const float* logits;
  int n;
  float* values;
  int* places;
  int* token;
};

__global__ void __launch_bounds__(256) argmax_kernel(const ArgmaxArgs a) {
  after_previous();
  float most = -INFINITY;
  int at = 0x7fffffff;
  for (int i = int(blockIdx.x) * 256 + int(threadIdx.x); i < a.n; i += int(gridDim.x) * 256)
    better(a.logits[i], i, &most, &at);
  block_best(&most, &at);
  if (threadIdx.x == 0) {
    a.values[blockIdx.x] = most;
    a.places[blockIdx.x] = at;
  }
}

__global__ void __launch_bounds__(256) argmax_end_kernel(const ArgmaxArgs a) {
  after_previous();
  float most = a.values[threadIdx.x];
  int at = a.places[threadIdx.x];
  block_best(&most, &at);
  if (threadIdx.x == 0) *a.token = at < a.n ? at : 0;
}

}  // namespace

void finish_logits(cudaStream_t s, float* logits, size_t ld, int n_vocab, int n, float scale, float cap, int* bad) {
  const FinishArgs a = {logits, ld, n_vocab, scale, cap, bad};
  launch("logits", finish_kernel, dim3(unsigned(n_vocab + 255) / 256, unsigned(n)), dim3(256), 0, s, a);
}

void argmax(cudaStream_t s, const float* logits, int n, float* scratch, int* token) {
  const ArgmaxArgs a = {logits, n, scratch, reinterpret_cast<int*>(scratch + kBlocks), token};
  launch("argmax", argmax_kernel, dim3(kBlocks), dim3(256), 0, s, a);
  launch("argmax, end", argmax_end_kernel, dim3(1), dim3(kBlocks), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
