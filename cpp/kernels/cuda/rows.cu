// Rows of neurons stored as records (models/format.md, layout `neurons`) times one vector: half a warp a row, a lane
// for every sixteenth slab, which is the canonical order of kernels/table.h: bit-equal to the CPU. The list of neurons
// and its length are read from device memory, so that a mask made by an earlier kernel needs no visit to the host.
#include "kernels/cuda/emit.h"
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

constexpr int kWarps = 8;

struct RowsArgs {
  Neurons w;
  Vectors x;
  const int* ids;
  const int* count;
  float* gate;
  float* up;
};

// Word v, lane l of the input's stripe in the order of RowVector: inputs 32 l + 4 v .. + 3, which lie together anyway.
__device__ __forceinline__ int input_word(const Vectors& x, int slab, int v) {
  return int(fresh(reinterpret_cast<const unsigned*>(x.q + 32 * size_t(slab)) + v));
}
__device__ __forceinline__ float half_at(const uint8_t* p, size_t i) {
  return from_half(__ldg(reinterpret_cast<const uint16_t*>(p) + i));
}

__device__ __forceinline__ float dot_quantised(const Neurons& w, const Vectors& x, const uint8_t* row, int l) {
  const int bytes = w.kind == WeightKind::q8, parts = 32 / w.group;
  const int low_lane = bytes ? 32 : 16, high_lane = w.kind == WeightKind::q5 ? 4 : w.kind == WeightKind::q6 ? 8 : 0;
  const int bias = code_bias(w.kind);
  float y = 0;
  for (int stripe = 0; stripe * kRowLanes < w.slabs; stripe++) {
    const int slab = stripe * kRowLanes + l, lanes = min(kRowLanes, w.slabs - stripe * kRowLanes);
    if (slab >= w.slabs) break;
    const unsigned* low = reinterpret_cast<const unsigned*>(row + size_t(stripe) * kRowLanes * low_lane) + l;
    const unsigned* high = reinterpret_cast<const unsigned*>(row + w.high + size_t(stripe) * kRowLanes * high_lane) + l;
    int sum[2] = {0, 0};
    if (bytes) {
      unsigned word[8];
#pragma unroll
      for (int v = 0; v < 8; v++) word[v] = __ldg(low + v * lanes);
#pragma unroll
      for (int v = 0; v < 8; v++) sum[v / 4] = __dp4a(int(word[v] ^ 0x80808080u), input_word(x, slab, v), sum[v / 4]);
    } else {
      unsigned word[4], top[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < 4; c++) word[c] = __ldg(low + c * lanes);
      if (high_lane) top[0] = __ldg(high);
      if (high_lane == 8) top[1] = __ldg(high + lanes);
#pragma unroll
      for (int v = 0; v < 8; v++) {
        unsigned u = word[v % 4] >> (v / 4 * 4) & 0x0f0f0f0fu;
        if (high_lane == 4) u |= (top[0] >> v & 0x01010101u) << 4;
        if (high_lane == 8) u |= (top[v / 4] >> (v % 4 * 2) & 0x03030303u) << 4;
        sum[v / 4] = __dp4a(int(u), input_word(x, slab, v), sum[v / 4]);
      }
    }
    const float x_scale = fresh(x.scale + slab);
    const int xs[2] = {fresh(x.sum + 2 * slab), fresh(x.sum + 2 * slab + 1)};
#pragma unroll
    for (int p = 0; p < 2; p++) {
      if (p >= parts) break;
      const int x_sum = parts == 1 ? xs[0] + xs[1] : xs[p];
      int total = parts == 1 ? sum[0] + sum[1] : sum[p];
      if (!bytes) total -= bias * x_sum;  // codes went in without their bias
      const size_t at = size_t(stripe) * kRowLanes * parts + size_t(p * lanes + l);
      const float scale = half_at(row + w.scale, at);
      y = fmaf(__fmul_rn(float(total), scale), x_scale, y);
      if (w.has_min) {
        const float low_end = fmaf(scale, float(bias), half_at(row + w.min, at));
        y = fmaf(low_end, __fmul_rn(x_scale, float(x_sum)), y);
      }
    }
  }
  return y;
}

__device__ __forceinline__ float dot_float(const Neurons& w, const Vectors& x, const uint8_t* row, int l) {
  float y = 0;
  for (int c = l; c < w.cols; c += kRowLanes) {
    float v;
    if (w.kind == WeightKind::f32) {
      v = __ldg(reinterpret_cast<const float*>(row) + c);
    } else {
      const uint16_t h = __ldg(reinterpret_cast<const uint16_t*>(row) + c);
      v = w.kind == WeightKind::f16 ? from_half(h) : __uint_as_float(unsigned(h) << 16);
    }
    y = fmaf(v, fresh(x.x + c), y);
  }
  return y;
}

__global__ void __launch_bounds__(kWarps * 32) rows_kernel(const RowsArgs a) {
  after_previous();
  const int lane = int(threadIdx.x) % 32, l = lane % kRowLanes, second = lane / kRowLanes;
  const int warp = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32, warps = int(gridDim.x) * kWarps;
  const int n = a.ids ? *a.count : a.w.neurons;
  const bool both = a.gate && a.up;
  // Half a warp makes the gate row, the other half the up row of a neuron; with one of them wanted, two neurons.
  const int each = both ? 1 : 2;
  for (int k = warp * each; k < n; k += warps * each) {
    const int mine = both ? k : k + second;
    const bool work = mine < n;
    const int id = work ? (a.ids ? fresh(a.ids + mine) : mine) : 0;
    const bool up = both ? second == 1 : a.up != nullptr;
    float y = 0;
    if (work) {
      const uint8_t* row = a.w.row(id, up);
      y = is_quantised(a.w.kind) ? dot_quantised(a.w, a.x, row, l) : dot_float(a.w, a.x, row, l);
    }
    for (int step = kRowLanes / 2; step > 0; step /= 2) y += __shfl_xor_sync(kFullWarp, y, step);
    if (work && l == 0) (up ? a.up : a.gate)[id] = a.w.add ? y + a.w.add[a.w.add_at(id, up)] : y;
  }
}

// One block: a running offset, so that the list is in order.
__global__ void __launch_bounds__(1024) survive_kernel(const SurviveArgs a) {
  after_previous();
  SR_SHARED(int, warp_count, 32);
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const float* threshold = a.mask.at(a.step->pos);
  int offset = 0;
  for (int base = 0; base < a.n; base += 1024) {
    const int i = base + tid;
    bool on = false;
    if (i < a.n) {
      const float g = a.gate[i], v = activation(a.act, a.cut > 0 && g < a.cut ? 0.0f : g);
      on = !(fabsf(v) <= (threshold ? threshold[i] : 0.0f));
      a.gate[i] = on ? v : 0.0f;
    }
    const unsigned mask = __ballot_sync(kFullWarp, on);
    if (lane == 0) warp_count[warp] = __popc(mask);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < 32; w++) {
      before += w < warp ? warp_count[w] : 0;
      total += warp_count[w];
    }
    if (on) a.ids[offset + before + __popc(mask & ((1u << lane) - 1))] = i;
    offset += total;
    __syncthreads();
  }
  if (tid == 0) {
    *a.count = offset;
    if (a.mask.kept) *a.mask.kept += offset;
  }
}

}  // namespace

void rows(cudaStream_t s, const Neurons& w, const Vectors& x, const int* ids, const int* count, float* gate, float* up,
          int multiprocessors) {
  const RowsArgs a = {w, x, ids, count, gate, up};
  const int each = gate && up ? kWarps : 2 * kWarps;
  // As many as are resident at once: warps take neurons in turn, and a second wave of blocks would be a thin one.
  static const int resident = [] {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, rows_kernel, kWarps * 32, 0), "rows");
    return blocks > 0 ? blocks : 1;
  }();
  const int all = (w.neurons + each - 1) / each, most = resident * multiprocessors;
  launch("rows", rows_kernel, dim3(unsigned(all < most ? all : most)), dim3(kWarps * 32), 0, s, a);
}

void survivors(cudaStream_t s, const SurviveArgs& a) {
  launch("survivors", survive_kernel, dim3(1), dim3(1024), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
