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

__device__ __forceinline__ float half_at(const uint8_t* p, size_t i) {
  return from_half(__ldg(reinterpret_cast<const uint16_t*>(p) + i));
}

// Lane l's slab of a stripe of up to 16; lanes: how many there are. The inputs of a slab lie together, in the order of
// the codes.
template <bool kBytes, int kHighLane>
struct StripeSlab {
  static constexpr int kWords = kBytes ? 8 : 4;
  unsigned word[kWords], top[2] = {};
  float scale[2] = {}, low[2] = {};

  // What comes from memory, and depends on nothing.
  __device__ __forceinline__ void fetch(const Neurons& w, const uint8_t* row, int stripe, int lanes, int l) {
    const size_t before = size_t(stripe) * kRowLanes;
    const unsigned* codes = reinterpret_cast<const unsigned*>(row + before * (kBytes ? 32 : 16)) + l;
    const unsigned* high = reinterpret_cast<const unsigned*>(row + w.high + before * kHighLane) + l;
#pragma unroll
    for (int v = 0; v < kWords; v++) word[v] = __ldg(codes + v * lanes);
    if (kHighLane) top[0] = __ldg(high);
    if (kHighLane == 8) top[1] = __ldg(high + lanes);
    const bool two = w.group == 16;
    const size_t at = before * (two ? 2 : 1) + size_t(l);
    scale[0] = half_at(row + w.scale, at);
    if (two) scale[1] = half_at(row + w.scale, at + lanes);
    if (w.has_min) low[0] = half_at(row + w.min, at);
    if (w.has_min && two) low[1] = half_at(row + w.min, at + lanes);
  }

  __device__ __forceinline__ float add(const Neurons& w, const Vectors& x, int slab, float y) const {
    const int parts = 32 / w.group, bias = code_bias(w.kind);
    const uint4* inputs = reinterpret_cast<const uint4*>(x.q + 32 * size_t(slab));
    const uint4 first = fresh(inputs), second = fresh(inputs + 1);
    const unsigned in[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    const float x_scale = fresh(x.scale + slab);
    const int2 both = fresh(reinterpret_cast<const int2*>(x.sum) + slab);
    int sum[2] = {0, 0};
#pragma unroll
    for (int v = 0; v < 8; v++) {
      unsigned u;
      if (kBytes) {
        u = word[v % kWords] ^ 0x80808080u;
      } else {
        u = word[v % 4] >> (v / 4 * 4) & 0x0f0f0f0fu;
        if (kHighLane == 4) u |= (top[0] >> v & 0x01010101u) << 4;
        if (kHighLane == 8) u |= (top[v / 4] >> (v % 4 * 2) & 0x03030303u) << 4;
      }
      sum[v / 4] = __dp4a(int(u), int(in[v]), sum[v / 4]);
    }
#pragma unroll
    for (int p = 0; p < 2; p++) {
      if (p >= parts) break;
      const int x_sum = parts == 1 ? both.x + both.y : p ? both.y : both.x;
      int total = parts == 1 ? sum[0] + sum[1] : sum[p];
      if (!kBytes) total -= bias * x_sum;  // codes went in without their bias
      y = fmaf(__fmul_rn(float(total), scale[p]), x_scale, y);
      if (w.has_min) y = fmaf(fmaf(scale[p], float(bias), low[p]), __fmul_rn(x_scale, float(x_sum)), y);
    }
    return y;
  }
};

// Of a list, several whole stripes are on their way at once: few neurons have too few warps to hide the way of one
// after the other. Of all neurons, many warps that need few registers hide it. Stripes are added in their order.
template <bool kBytes, int kHighLane, bool kList>
__device__ __forceinline__ float dot_quantised(const Neurons& w, const Vectors& x, const uint8_t* row, int l) {
  constexpr int kAhead = !kList ? 1 : kBytes ? 2 : 4;
  const int whole = w.slabs / kRowLanes, rest = w.slabs % kRowLanes;
  StripeSlab<kBytes, kHighLane> slab[kAhead];
  float y = 0;
  int stripe = 0;
  for (; stripe + kAhead <= whole; stripe += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) slab[i].fetch(w, row, stripe + i, kRowLanes, l);
#pragma unroll
    for (int i = 0; i < kAhead; i++) y = slab[i].add(w, x, (stripe + i) * kRowLanes + l, y);
  }
  for (; kAhead > 1 && stripe < whole; stripe++) {
    slab[0].fetch(w, row, stripe, kRowLanes, l);
    y = slab[0].add(w, x, stripe * kRowLanes + l, y);
  }
  if (l < rest) {
    slab[0].fetch(w, row, whole, rest, l);
    y = slab[0].add(w, x, whole * kRowLanes + l, y);
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

template <bool kList>
__global__ void __launch_bounds__(kWarps * 32, kList ? 2 : 4) rows_kernel(const RowsArgs a) {
  after_previous();
  const int lane = int(threadIdx.x) % 32, l = lane % kRowLanes, second = lane / kRowLanes;
  const int warp = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32, warps = int(gridDim.x) * kWarps;
  const int n = kList ? *a.count : a.w.neurons;
  const bool both = a.gate && a.up;
  // Half a warp makes the gate row, the other half the up row of a neuron; with one of them wanted, two neurons.
  const int each = both ? 1 : 2;
  for (int k = warp * each; k < n; k += warps * each) {
    const int mine = both ? k : k + second;
    const bool work = mine < n;
    const int id = !work ? 0 : kList ? fresh(a.ids + mine) : mine;
    const bool up = both ? second == 1 : a.up != nullptr;
    float y = 0;
    if (work) {
      const uint8_t* row = a.w.row(id, up);
      switch (a.w.kind) {
        case WeightKind::q4: y = dot_quantised<false, 0, kList>(a.w, a.x, row, l); break;
        case WeightKind::q5: y = dot_quantised<false, 4, kList>(a.w, a.x, row, l); break;
        case WeightKind::q6: y = dot_quantised<false, 8, kList>(a.w, a.x, row, l); break;
        case WeightKind::q8: y = dot_quantised<true, 0, kList>(a.w, a.x, row, l); break;
        default: y = dot_float(a.w, a.x, row, l);
      }
    }
    for (int step = kRowLanes / 2; step > 0; step /= 2) y += __shfl_xor_sync(kFullWarp, y, step);
    if (work && l == 0) (up ? a.up : a.gate)[id] = a.w.add ? y + a.w.add[a.w.add_at(id, up)] : y;
  }
}

// One block, so that the list is in order. It takes up to 16 turns of 1024 neurons between barriers, and asks memory
// for four turns at a time: a barrier and a way to memory for every turn would take longer than what the list saves.
constexpr int kTurns = 16, kTogether = 4;

__global__ void __launch_bounds__(1024) survive_kernel(const SurviveArgs a) {
  after_previous();
  SR_SHARED(int, before, kTurns * 32);  // [turn, warp]: how many stay, then how many stay in warps before it
  SR_SHARED(int, of_turn, kTurns);
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const float* threshold = a.mask.at(a.step->pos);
  int offset = 0;
  for (int base = 0; base < a.n; base += kTurns * 1024) {
    const int turns = min(kTurns, (a.n - base + kTogether * 1024 - 1) / (kTogether * 1024) * kTogether);
    unsigned stay = 0;  // bit t: this thread's neuron of turn t
    for (int turn = 0; turn < turns; turn += kTogether) {
      float g[kTogether], cut[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; k++) {
        const int i = base + (turn + k) * 1024 + tid;
        g[k] = i < a.n ? a.gate[i] : 0.0f;
        cut[k] = i < a.n && threshold ? threshold[i] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kTogether; k++) {
        const int i = base + (turn + k) * 1024 + tid;
        const float v = activation(a.act, a.cut > 0 && g[k] < a.cut ? 0.0f : g[k]);
        const bool on = i < a.n && !(fabsf(v) <= cut[k]);
        if (i < a.n) a.gate[i] = on ? v : 0.0f;
        const unsigned mask = __ballot_sync(kFullWarp, on);
        if (lane == 0) before[(turn + k) * 32 + warp] = __popc(mask);
        stay |= unsigned(on) << (turn + k);
      }
    }
    __syncthreads();
    if (warp < turns) {
      const int here = before[warp * 32 + lane];
      int sum = here;
      for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(kFullWarp, sum, unsigned(step));
        if (lane >= step) sum += lower;
      }
      before[warp * 32 + lane] = sum - here;
      if (lane == 31) of_turn[warp] = sum;
    }
    __syncthreads();
    for (int turn = 0; turn < turns; turn++) {
      const bool on = stay >> turn & 1;
      const unsigned mask = __ballot_sync(kFullWarp, on);
      const int rank = __popc(mask & ((1u << lane) - 1));
      if (on) a.ids[offset + before[turn * 32 + warp] + rank] = base + turn * 1024 + tid;
      offset += of_turn[turn];
    }
    __syncthreads();  // before the next ones are counted
  }
  if (tid == 0) {
    *a.count = offset;
    if (a.mask.kept) *a.mask.kept += offset;
  }
}

// Blocks that are resident at once on a multiprocessor; and the kernel is loaded.
template <bool kList>
int resident_blocks() {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, rows_kernel<kList>), "rows");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, rows_kernel<kList>, kWarps * 32, 0), "rows");
  return blocks > 0 ? blocks : 1;
}

template <bool kList>
void launch_rows(cudaStream_t s, const RowsArgs& a, int multiprocessors) {
  const int each = a.gate && a.up ? kWarps : 2 * kWarps;
  // As many as are resident: warps take neurons in turn, and a second wave of blocks would be a thin one. Both kernels
  // are looked at by the first launch: a list may be asked for in a capture first, in which nothing is to be loaded.
  static const int residents[2] = {resident_blocks<kList>(), resident_blocks<!kList>()}, resident = residents[0];
  const int all = (a.w.neurons + each - 1) / each, most = resident * multiprocessors;
  launch(kList ? "rows of a list" : "rows", rows_kernel<kList>, dim3(unsigned(all < most ? all : most)),
         dim3(kWarps * 32), 0, s, a);
}

}  // namespace

void rows(cudaStream_t s, const Neurons& w, const Vectors& x, const int* ids, const int* count, float* gate, float* up,
          int multiprocessors) {
  const RowsArgs a = {w, x, ids, count, gate, up};
  if (ids) launch_rows<true>(s, a, multiprocessors);
  else launch_rows<false>(s, a, multiprocessors);
}

void survivors(cudaStream_t s, const SurviveArgs& a) {
  launch("survivors", survive_kernel, dim3(1), dim3(1024), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
