// Attention over the fp16 cache. A block takes one key head, up to 16 rows (queries that share the head, of one or more
// tokens) and one stretch of the keys; keys go by 32 at a time with a running softmax, four threads a key. The
// stretches' sums are merged by a second kernel, which also makes the input of the output matrix.
#include "kernels/cuda/emit.h"
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

constexpr int kThreads = 128, kKeys = 32, kPad = 1;

// One warp a head: norm, rotation, and for k and v the way into the cache.
__global__ void __launch_bounds__(32) heads_kernel(const HeadsArgs a) {
  after_previous();
  const AttendView& c = a.cache;
  const int head = int(blockIdx.x), row = int(blockIdx.y), lane = int(threadIdx.x), hd = c.head_dim;
  const int kind = head < c.n_heads ? 0 : head < c.n_heads + c.n_kv_heads ? 1 : 2;
  float* y = a.qkv + size_t(row) * a.ld + a.head_at[head];
  if (kind < 2) {
    const NormView& norm = kind == 0 ? a.q_norm : a.k_norm;
    if (norm.type != NormType::none) {
      double mean = 0, sum = 0;
      if (norm.type == NormType::layer) {
        for (int i = lane; i < hd; i += 32) sum += y[i];
        mean = warp_sum(sum) / hd;
        sum = 0;
      }
      for (int i = lane; i < hd; i += 32) sum += (double(y[i]) - mean) * (double(y[i]) - mean);
      const float factor = float(1.0 / sqrt(warp_sum(sum) / hd + double(norm.eps)));
      for (int i = lane; i < hd; i += 32) {
        const float v = __fmul_rn(__fmul_rn(y[i] - float(mean), factor), norm.weight[i]);
        y[i] = norm.bias ? __fadd_rn(v, norm.bias[i]) : v;
      }
      __syncwarp();
    }
    const float* table = a.table + size_t(row) * 2 * a.rope_half;
    for (int i = lane; i < a.rope_half; i += 32) {
      const int p = a.interleaved ? 2 * i : i, q = a.interleaved ? 2 * i + 1 : i + a.rope_half;
      const float u = y[p], v = y[q], cosine = table[i], sine = table[a.rope_half + i];
      y[p] = __fadd_rn(__fmul_rn(u, cosine), -__fmul_rn(v, sine));
      y[q] = __fadd_rn(__fmul_rn(u, sine), __fmul_rn(v, cosine));
    }
  }
  if (kind == 0) return;
  __syncwarp();
  const int kv = head - c.n_heads - (kind == 2 ? c.n_kv_heads : 0), pos = a.step->pos + row;
  uint16_t* to = (kind == 1 ? c.k : c.v) + (size_t(kv) * c.n_ctx + pos) * hd;
  for (int i = lane; i < hd; i += 32) to[i] = to_half(y[i]);
}

struct Args {
  AttendArgs_ a;
  int n;
};

template <int kRows>
__global__ void __launch_bounds__(kThreads) attend_kernel(const Args args) {
  after_previous();
  const AttendArgs_& a = args.a;
  const AttendView& c = a.cache;
  SR_DYNAMIC_SHARED(bytes);
  float* q = reinterpret_cast<float*>(bytes);  // [kRows, head_dim]
  SR_SHARED(float, p, kRows * (kKeys + kPad));
  SR_SHARED(float, factor, kRows);
  SR_SHARED(float, top, kRows);
  SR_SHARED(float, total, kRows);
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32, hd = c.head_dim;
  const int group = c.n_heads / c.n_kv_heads, kv = int(blockIdx.x);
  const int base = int(blockIdx.y) * kRows, rows = min(kRows, args.n * group - base);
  const int pos = a.step->pos;
  // Row r is query head kv * group + (base + r) % group of token (base + r) / group.
  const auto last_of = [&](int r) { return pos + (base + r) / group; };
  const auto first_of = [&](int r) { return c.window ? max(0, last_of(r) - c.window + 1) : 0; };

  // This block's stretch of the keys that any of its rows sees; stretches begin at multiples of 32.
  const int all_first = first_of(0) / kKeys * kKeys, all_end = last_of(rows - 1) + 1;
  const int each = ((all_end - all_first + a.splits - 1) / a.splits + kKeys - 1) / kKeys * kKeys;
  const int begin = all_first + int(blockIdx.z) * each, end = min(all_end, begin + each);
  const uint16_t* keys = c.k + size_t(kv) * c.n_ctx * hd;
  const uint16_t* values = c.v + size_t(kv) * c.n_ctx * hd;
  // Keys and values of 32 positions are a line of 64 each for every thread; they are asked for a tile ahead.
  static_assert(kKeys * kMaxHeadDim <= 64 * kThreads, "a line a thread");
  const auto prefetch_tile = [&](int tile) {
    if (64 * tid >= (min(end, tile + kKeys) - tile) * hd) return;
    prefetch(keys + size_t(tile) * hd + 64 * tid);
    prefetch(values + size_t(tile) * hd + 64 * tid);
  };
  prefetch_tile(begin);

  for (int i = tid; i < kRows * hd; i += kThreads) {
    const int r = i / hd;
    float v = 0;
    if (r < rows) {
      const int head = kv * group + (base + r) % group;
      v = a.q[size_t((base + r) / group) * a.ld + a.head_at[head] + i % hd];
    }
    q[i] = v;
  }
  if (tid < kRows) {
    top[tid] = -INFINITY;
    total[tid] = 0;
  }
  constexpr int kDims = kMaxHeadDim / kThreads;
  float out[kDims][kRows];
#pragma unroll
  for (int i = 0; i < kDims * kRows; i++) out[i / kRows][i % kRows] = 0;
  __syncthreads();

  const int my_key = tid / 4, quarter = tid % 4;
  for (int tile = begin; tile < end; tile += kKeys) {
    prefetch_tile(tile + kKeys);
    // Scores: thread (key, quarter) takes every fourth piece of 8 dimensions, for all rows.
    const int key = tile + my_key;
    const bool real = key < end;
    float s[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) s[r] = 0;
    if (real) {
      const uint16_t* k = keys + size_t(key) * hd;
      for (int d = 8 * quarter; d < hd; d += 32) {
        const uint4 u = fresh(reinterpret_cast<const uint4*>(k + d));
        const unsigned words[4] = {u.x, u.y, u.z, u.w};
        float kd[8];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          kd[2 * i] = from_half(uint16_t(words[i] & 0xffff));
          kd[2 * i + 1] = from_half(uint16_t(words[i] >> 16));
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const float4 lo = *reinterpret_cast<const float4*>(q + r * hd + d);
          const float4 hi = *reinterpret_cast<const float4*>(q + r * hd + d + 4);
          s[r] = fmaf(lo.x, kd[0], s[r]);
          s[r] = fmaf(lo.y, kd[1], s[r]);
          s[r] = fmaf(lo.z, kd[2], s[r]);
          s[r] = fmaf(lo.w, kd[3], s[r]);
          s[r] = fmaf(hi.x, kd[4], s[r]);
          s[r] = fmaf(hi.y, kd[5], s[r]);
          s[r] = fmaf(hi.z, kd[6], s[r]);
          s[r] = fmaf(hi.w, kd[7], s[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float v = s[r];
      v += __shfl_xor_sync(kFullWarp, v, 1);
      v += __shfl_xor_sync(kFullWarp, v, 2);
      v *= c.scale;
      if (c.softcap > 0) v = c.softcap * tanhf(v / c.softcap);
      const bool seen = real && r < rows && key <= last_of(r) && key >= first_of(r);
      if (quarter == 0) p[r * (kKeys + kPad) + my_key] = seen ? v : -INFINITY;
    }
    __syncthreads();
    for (int r = warp; r < kRows; r += kThreads / 32) {
      const float score = p[r * (kKeys + kPad) + lane];
      const float before = top[r], most = fmaxf(before, warp_max(score));
      // Where nothing has been seen yet, all scores are -inf and e is 0.
      const float e = score == -INFINITY ? 0.0f : expf(score - most);
      const float sum = warp_sum(e), f = before == -INFINITY ? 0.0f : expf(before - most);
      p[r * (kKeys + kPad) + lane] = e;
      __syncwarp();
      if (lane == 0) {
        factor[r] = f;
        total[r] = total[r] * f + sum;
        top[r] = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kDims; i++) {
      const int d = tid + i * kThreads;
      if (d < hd) {
#pragma unroll
        for (int r = 0; r < kRows; r++) out[i][r] *= factor[r];
        // All 32: keys beyond the end have the probability 0, and the last value stands for theirs. A shorter loop
        // would take what is left over from batches one after the other.
        const uint16_t* column = values + size_t(tile) * hd + d;
        const int last = end - 1 - tile;
#pragma unroll(kRows <= 4 ? 16 : 8)
        for (int j = 0; j < kKeys; j++) {
          const float v = from_half(fresh(column + min(j, last) * hd));
#pragma unroll
          for (int r = 0; r < kRows; r++) out[i][r] = fmaf(p[r * (kKeys + kPad) + j], v, out[i][r]);
        }
      }
    }
    __syncthreads();
  }
  for (int r = 0; r < rows; r++) {
    const size_t slot =
        (size_t(blockIdx.z) * args.n + (base + r) / group) * c.n_heads + kv * group + (base + r) % group;
    if (tid == 0) {
      a.row_max[slot] = top[r];
      a.row_sum[slot] = total[r];
    }
  }
#pragma unroll
  for (int i = 0; i < kDims; i++) {
    const int d = tid + i * kThreads;
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (d >= hd || r >= rows) continue;
      const size_t slot =
          (size_t(blockIdx.z) * args.n + (base + r) / group) * c.n_heads + kv * group + (base + r) % group;
      a.partial[slot * hd + d] = out[i][r];
    }
  }
}

struct MergeKernelArgs {
  MergeArgs a;
  int n;
};

__global__ void __launch_bounds__(128) merge_kernel(const MergeKernelArgs args) {
  after_previous();
  const MergeArgs& a = args.a;
  const int row = int(blockIdx.y), i = int(blockIdx.x) * 128 + int(threadIdx.x);
  if (i / 32 * 32 >= a.out.padded) return;  // whole warps
  const int pos = a.step->pos;
  prefetch_threshold(a.out, i, a.mask, pos + row);
  float v = 0;
  if (i < a.out.width) {
    const size_t head = size_t(row) * a.n_heads + i / a.head_dim, stride = size_t(args.n) * a.n_heads;
    float most = -INFINITY, sum = 0;
    // No branches, so that the loads of many stretches are under way at once. One that saw nothing has sums of 0.
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) most = fmaxf(most, a.row_max[s * stride + head]);
#pragma unroll 8
    for (int s = 0; s < a.splits; s++) {
      const float f = expf(a.row_max[s * stride + head] - most);
      sum = fmaf(a.row_sum[s * stride + head], f, sum);
      v = fmaf(a.partial[(s * stride + head) * a.head_dim + i % a.head_dim], f, v);
    }
    v *= 1.0f / sum;
  }
  emit(a.out, row, i, v, a.quantise, a.mask, pos);
}

template <int kRows>
void attend_rows(cudaStream_t s, const AttendArgs_& a, int n) {
  const Args args = {a, n};
  const int rows = n * (a.cache.n_heads / a.cache.n_kv_heads);
  launch("attend", attend_kernel<kRows>,
         dim3(unsigned(a.cache.n_kv_heads), unsigned(rows + kRows - 1) / kRows, unsigned(a.splits)), dim3(kThreads),
         size_t(kRows) * size_t(a.cache.head_dim) * sizeof(float), s, args);
}

}  // namespace

void heads(cudaStream_t s, const HeadsArgs& a, int n) {
  launch("heads", heads_kernel, dim3(unsigned(a.cache.n_heads + 2 * a.cache.n_kv_heads), unsigned(n)), dim3(32), 0, s,
         a);
}

void attend(cudaStream_t s, const AttendArgs_& a, int n) {
  const int rows = n * (a.cache.n_heads / a.cache.n_kv_heads);
  if (rows == 1) attend_rows<1>(s, a, n);
  else if (rows <= 4) attend_rows<4>(s, a, n);
  else if (rows <= 8) attend_rows<8>(s, a, n);
  else attend_rows<16>(s, a, n);
}

void merge(cudaStream_t s, const MergeArgs& a, int n) {
  const MergeKernelArgs args = {a, n};
  launch("merge", merge_kernel, dim3(unsigned(a.out.padded + 127) / 128, unsigned(n)), dim3(128), 0, s, args);
}

}  // namespace cuda
}  // namespace sr
