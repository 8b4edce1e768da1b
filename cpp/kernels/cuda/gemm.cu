// A block of vectors times a stored matrix. Quantised parts go through the tensor cores as bytes: a slab of 32 inputs
// is exact in int32, then scaled and added in fp32 slab after slab, so that every output has the bits of the CPU's
// gemm.
#include "kernels/cuda/launch.h"

#ifndef SR_CUDA_EMULATED
#include <mma.h>
#endif

namespace sr {
namespace cuda {
namespace {

constexpr int kRows = 128, kTokens = 64, kThreads = 256;  // of a block; a warp computes 32 rows x 32 vectors
constexpr int kFragment = 256;                            // elements of a 16 x 16 tile

struct GemmArgs {
  Part m;           // of neurons: group, has_min, bias, slabs, tiles, add
  Neurons neurons;
  const int8_t* q;
  const float* x;
  const float* scale;
  const int* sum;
  int padded, slabs, n;
  float* y;
  size_t ldy;
};

// What a thread brings of the next slab beside weights: a scale and a minimum, two words of inputs, a vector's sums.
struct Fetched {
  unsigned x[2];
  float scale, min;
  float x_scale;
  int x_sum[2];
};

__device__ __forceinline__ uint16_t load_u16(const uint8_t* p) { return __ldg(reinterpret_cast<const uint16_t*>(p)); }

// Bytes u (below 64) to u - bias, four at a time.
__device__ __forceinline__ unsigned minus_bias(unsigned u, unsigned bias) {
  return ((u | 0x80808080u) - bias * 0x01010101u) ^ 0x80808080u;
}

// Where weights come from: panels of 4 bits, panels of bytes, or neurons' records of any bits.
enum class Source { nibbles, bytes, neurons };

// A thread's share of a slab of 128 rows, panels: words of one tile. 4 bits: columns tid / 16 and that + 16; 8 bits:
// columns tid / 32 + 0, 8, 16, 24.
template <bool kBytes>
struct PanelSource {
  static constexpr int kWords = kBytes ? 16 : 8, kPerThread = kBytes ? 4 : 2, kColumnStep = kBytes ? 8 : 16;
  using Layout = nvcuda::wmma::col_major;
  int tile, group, column, parts;
  unsigned run, scale_R;
  size_t slab_bytes, scale_slab;
  const uint8_t *codes, *scales, *units;
  const Part& m;
  bool has_scale;
  unsigned w[kPerThread];

  __device__ PanelSource(const GemmArgs& a, int tid, int first_tile) : m(a.m) {
    parts = 32 / m.group;
    tile = tid % (2 * kWords) / kWords;
    group = tid % kWords;
    column = tid / (2 * kWords);
    int R, in_panel;
    const uint8_t* panel = place(m, min(first_tile + tile, m.tiles - 1), &R, &in_panel);
    run = unsigned(m.run_bytes(R));
    slab_bytes = m.slab_bytes(R);
    codes = panel + m.units_bytes(R) + m.head_bytes(R) + size_t(kBytes ? in_panel : in_panel / 2) + 4 * size_t(group);
    // Scales: thread tid brings that of row tid % 128 in group tid / 128.
    const int row = tid % kRows, part = tid / kRows;
    panel = place(m, min(first_tile + row / kTileRows, m.tiles - 1), &R, &in_panel);
    scale_R = unsigned(R);
    scale_slab = m.slab_bytes(R);
    const size_t in_plane = size_t(in_panel + row % kTileRows);
    units = panel + 2 * in_plane;
    scales = panel + m.units_bytes(R) + size_t(m.scale_bytes()) * (size_t(part) * R + in_plane);
    has_scale = part < parts;
  }
  static __device__ const uint8_t* place(const Part& m, int tile, int* R, int* in_panel) {
    const int first = tile * kTileRows / m.panel_rows * m.panel_rows;
    *R = min(m.panel_rows, m.tiles * kTileRows - first);
    *in_panel = tile * kTileRows - first;
    return m.data + size_t(first / m.panel_rows) * m.panel_bytes(m.panel_rows);
  }
  __device__ void fetch(int s) {
#pragma unroll
    for (int i = 0; i < kPerThread; i++)
      w[i] = __ldg(
          reinterpret_cast<const unsigned*>(codes + size_t(s) * slab_bytes + unsigned(column + i * kColumnStep) * run));
  }
  // plane 0: scales, 1: minima.
  __device__ float scale_of(int s, int plane) const {
    if (!has_scale) return 0.0f;
    const uint8_t* at = scales + size_t(s) * scale_slab + size_t(plane * parts * m.scale_bytes()) * scale_R;
    if (!m.unit_slabs) return from_half(load_u16(at));
    const float unit = from_half(load_u16(units + m.unit_offset(s, int(scale_R)) + size_t(plane * 2) * scale_R));
    return __fmul_rn(float(int(int8_t(__ldg(at)))), unit);
  }
  __device__ float scale(int s) const { return scale_of(s, 0); }
  __device__ float low(int s) const { return scale_of(s, 1); }
  __device__ void put(signed char* ws) const {
#pragma unroll
    for (int i = 0; i < kPerThread; i++) {
      const int c = column + i * kColumnStep, row = tile * kTileRows + group * 4;
      unsigned* at = reinterpret_cast<unsigned*>(ws + ((c / 16 * 8 + row / 16) * 16 + c % 16) * 16 + row % 16);
      if (kBytes) {
        *at = w[i] ^ 0x80808080u;
      } else {
        *at = minus_bias(w[i] & 0x0f0f0f0fu, 8);
        at[2 * kFragment / 4] = minus_bias(w[i] >> 4 & 0x0f0f0f0fu, 8);  // 32 rows on: two row blocks
      }
    }
  }
};

// Neurons: thread tid brings half of the words of row tid / 2. Rows are counted as in panels: 64 of gate, 64 of up ...
struct NeuronSource {
  using Layout = nvcuda::wmma::row_major;
  const Neurons m;
  int row, half, parts, bytes, high_lane, scale_part;
  const uint8_t *record, *scale_record;
  bool has_scale;
  unsigned w[4] = {}, high[2] = {};

  __device__ NeuronSource(const GemmArgs& a, int tid, int first_tile) : m(a.neurons) {
    parts = 32 / m.group;
    bytes = m.kind == WeightKind::q8;
    high_lane = m.kind == WeightKind::q5 ? 4 : m.kind == WeightKind::q6 ? 8 : 0;
    row = tid / 2;
    half = tid % 2;
    scale_part = tid / kRows;
    has_scale = scale_part < parts;
    record = row_at(first_tile * kTileRows + row);
    scale_record = row_at(first_tile * kTileRows + tid % kRows);
  }
  __device__ const uint8_t* row_at(int r) const {
    const int neuron = min(m.gated ? r / 128 * 64 + r % 64 : r, m.neurons - 1);
    return m.row(neuron, m.gated && r % 128 >= 64);
  }
  __device__ int lanes(int s) const { return min(kRowLanes, m.slabs - s / kRowLanes * kRowLanes); }
  __device__ void fetch(int s) {
    const int stripe = s / kRowLanes, l = s % kRowLanes, n = lanes(s);
    const unsigned* low =
        reinterpret_cast<const unsigned*>(record + size_t(stripe) * kRowLanes * (bytes ? 32 : 16)) + l;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (bytes || i < 2) w[i] = __ldg(low + ((bytes ? 4 : 2) * half + i) * n);
    const unsigned* top =
        reinterpret_cast<const unsigned*>(record + m.high + size_t(stripe) * kRowLanes * high_lane) + l;
    if (high_lane) high[0] = __ldg(top);
    if (high_lane == 8) high[1] = __ldg(top + n);
  }
  __device__ size_t scale_at(int s) const {
    return size_t(s / kRowLanes) * kRowLanes * parts + size_t(scale_part * lanes(s) + s % kRowLanes);
  }
  __device__ float scale(int s) const {
    return has_scale ? from_half(load_u16(scale_record + m.scale + 2 * scale_at(s))) : 0.0f;
  }
  __device__ float low(int s) const {
    return has_scale ? from_half(load_u16(scale_record + m.min + 2 * scale_at(s))) : 0.0f;
  }
  __device__ void put_chunk(signed char* ws, int v, unsigned word) const {
    *reinterpret_cast<unsigned*>(ws + ((v / 4 * 8 + row / 16) * 16 + row % 16) * 16 + v % 4 * 4) = word;
  }
  __device__ void put(signed char* ws) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (bytes) {
        put_chunk(ws, 4 * half + i, w[i] ^ 0x80808080u);
      } else {  // word 2 half + i / 2 holds chunks of that number and of 4 more
        const int v = 2 * half + i / 2 + i % 2 * 4;
        unsigned u = w[i / 2] >> (i % 2 * 4) & 0x0f0f0f0fu;
        if (high_lane == 4) u |= (high[0] >> v & 0x01010101u) << 4;
        if (high_lane == 8) u |= ((i % 2 ? high[1] : high[0]) >> (v % 4 * 2) & 0x03030303u) << 4;
        put_chunk(ws, v, minus_bias(u, unsigned(code_bias(m.kind))));
      }
    }
  }
};

template <Source kSource>
struct SourceOf;
template <>
struct SourceOf<Source::nibbles> {
  using type = PanelSource<false>;
};
template <>
struct SourceOf<Source::bytes> {
  using type = PanelSource<true>;
};
template <>
struct SourceOf<Source::neurons> {
  using type = NeuronSource;
};

template <Source kSource>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(const GemmArgs a) {
  after_previous();
  using namespace nvcuda;
  using From = typename SourceOf<kSource>::type;
  // 16 x 16 tiles of weights [half slab, 8 row blocks; 256] and of vectors [half slab, 4 blocks; vector, input].
  SR_SHARED(signed char, ws, 2 * 8 * kFragment);
  SR_SHARED(signed char, xs, 2 * 4 * kFragment);
  SR_SHARED(float, w_scale, 2 * kRows);
  SR_SHARED(float, w_min, 2 * kRows);
  SR_SHARED(float, x_scale, kTokens);
  SR_SHARED(float, x_total, 2 * kTokens);
  SR_SHARED(int, products, 8 * kFragment);

  const Part& m = a.m;
  const int tid = int(threadIdx.x), warp = tid / 32, lane = tid % 32;
  const int parts = 32 / m.group;
  const int first_tile = int(blockIdx.x) * 2, first_token = int(blockIdx.y) * kTokens;
  From from(a, tid, first_tile);
  // Inputs: thread tid brings words tid % 8 of vectors tid / 8 and that + 32, and scale and sums of vector tid.
  const int x_word = tid % 8, x_token = tid / 8;
  Fetched next;
  const auto fetch = [&](int s) {
    from.fetch(s);
    next.scale = from.scale(s);
    next.min = m.has_min ? fmaf(next.scale, float(m.bias), from.low(s)) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = first_token + x_token + 32 * i;
      next.x[i] = t < a.n ? fresh(reinterpret_cast<const unsigned*>(a.q + size_t(t) * a.padded + 32 * s) + x_word) : 0u;
    }
    const int t = first_token + tid;
    const bool mine = tid < kTokens && t < a.n;
    next.x_scale = mine ? fresh(a.scale + size_t(t) * a.slabs + s) : 0.0f;
    next.x_sum[0] = mine ? fresh(a.sum + 2 * (size_t(t) * a.slabs + s)) : 0;
    next.x_sum[1] = mine ? fresh(a.sum + 2 * (size_t(t) * a.slabs + s) + 1) : 0;
  };
  const auto put = [&] {
    from.put(ws);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = x_token + 32 * i;
      *reinterpret_cast<unsigned*>(xs + ((x_word / 4 * 4 + t / 16) * 16 + t % 16) * 16 + x_word % 4 * 4) = next.x[i];
    }
    w_scale[tid] = next.scale;  // [group, row]
    w_min[tid] = next.min;
    if (tid < kTokens) {
      x_scale[tid] = next.x_scale;
      x_total[tid] = __fmul_rn(next.x_scale, float(parts == 1 ? next.x_sum[0] + next.x_sum[1] : next.x_sum[0]));
      x_total[kTokens + tid] = __fmul_rn(next.x_scale, float(next.x_sum[1]));
    }
  };

  const int row_block = warp % 4 * 2, token_block = warp / 4 * 2;
  const int in_row = lane % 16, in_token = lane / 16;
  float y[2][2][8];
#pragma unroll
  for (int i = 0; i < 32; i++) y[i / 16][i / 8 % 2][i % 8] = 0;
  int* scratch = products + warp * kFragment;

  fetch(0);
  for (int s = 0; s < m.slabs; s++) {
    __syncthreads();
    put();
    __syncthreads();
    if (s + 1 < m.slabs) fetch(s + 1);
    for (int p = 0; p < parts; p++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = (row_block + i) * 16 + in_row;
        const float scale = w_scale[p * kRows + row], low = w_min[p * kRows + row];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          wmma::fragment<wmma::accumulator, 16, 16, 16, int> sum;
          wmma::fill_fragment(sum, 0);
          for (int half = parts == 1 ? 0 : p; half < (parts == 1 ? 2 : p + 1); half++) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, typename From::Layout> w;
            wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::col_major> x;
            wmma::load_matrix_sync(w, ws + (half * 8 + row_block + i) * kFragment, 16);
            wmma::load_matrix_sync(x, xs + (half * 4 + token_block + j) * kFragment, 16);
            wmma::mma_sync(sum, w, x, sum);
          }
          wmma::store_matrix_sync(scratch, sum, 16, wmma::mem_col_major);
          __syncwarp();
#pragma unroll
          for (int e = 0; e < 8; e++) {
            const int token = in_token + 2 * e, at = (token_block + j) * 16 + token;
            const float part = __fmul_rn(float(scratch[token * 16 + in_row]), scale);
            float v = fmaf(part, x_scale[at], y[i][j][e]);
            if (m.has_min) v = fmaf(low, x_total[p * kTokens + at], v);
            y[i][j][e] = v;
          }
          __syncwarp();
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = first_tile * kTileRows + (row_block + i) * 16 + in_row;
    if (row >= m.tiles * kTileRows) continue;
    const float add = m.add && row < m.rows ? m.add[row] : 0.0f;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int t = first_token + (token_block + j) * 16 + in_token + 2 * e;
        if (t < a.n) a.y[size_t(t) * a.ldy + m.y_begin + row] = m.add ? y[i][j][e] + add : y[i][j][e];
      }
  }
}

// Float weights, which are rare: 64 rows x 32 vectors a block, each output summed input after input.
constexpr int kFloatTokens = 32;

__device__ __forceinline__ float float_weight(const uint8_t* p, size_t i, bool four_bytes, bool half) {
  if (four_bytes) return __ldg(reinterpret_cast<const float*>(p) + i);
  const uint16_t h = load_u16(p + 2 * i);
  return half ? from_half(h) : __uint_as_float(unsigned(h) << 16);
}

// The row's weight of input c is at base + c * step of `data`.
__device__ void gemm_float(const GemmArgs& a, const uint8_t* data, size_t base, size_t step, bool four_bytes,
                           bool half) {
  const Part& m = a.m;
  const int row = int(threadIdx.x) % kTileRows, set = int(threadIdx.x) / kTileRows, tile = int(blockIdx.x);
  const int token = int(blockIdx.y) * kFloatTokens + set * 8;
  float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int c = 0; c < m.cols; c++) {
    const float w = float_weight(data, base + size_t(c) * step, four_bytes, half);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (token + i < a.n) y[i] = fmaf(w, fresh(a.x + size_t(token + i) * a.padded + c), y[i]);
  }
  const int out = tile * kTileRows + row;
  for (int i = 0; i < 8; i++)
    if (token + i < a.n)
      a.y[size_t(token + i) * a.ldy + m.y_begin + out] = m.add && out < m.rows ? y[i] + m.add[out] : y[i];
}

__global__ void __launch_bounds__(kThreads) gemm_float_kernel(const GemmArgs a) {
  after_previous();
  const Part& m = a.m;
  const int tile = int(blockIdx.x), first = tile * kTileRows / m.panel_rows * m.panel_rows;
  const uint8_t* panel = m.data + size_t(first / m.panel_rows) * m.panel_bytes(m.panel_rows);
  const size_t base = size_t(tile * kTileRows - first) * size_t(m.cols) + threadIdx.x % kTileRows;
  gemm_float(a, panel, base, kTileRows, m.store == Store::f32, m.store == Store::f16);
}

__global__ void __launch_bounds__(kThreads) gemm_float_neurons_kernel(const GemmArgs a) {
  after_previous();
  const Neurons& w = a.neurons;
  const int r = int(blockIdx.x) * kTileRows + int(threadIdx.x) % kTileRows;
  const int neuron = min(w.gated ? r / 128 * 64 + r % 64 : r, w.neurons - 1);
  const uint8_t* row = w.row(neuron, w.gated && r % 128 >= 64);
  gemm_float(a, row, 0, 1, w.kind == WeightKind::f32, w.kind == WeightKind::f16);
}

GemmArgs inputs(const Vectors& x, int first, int n, float* y, size_t ldy) {
  GemmArgs a = {};
  a.q = x.q + size_t(first) * x.padded;
  a.x = x.x + size_t(first) * x.padded;
  a.scale = x.scale + size_t(first) * x.slabs;
  a.sum = x.sum + 2 * size_t(first) * x.slabs;
  a.padded = x.padded;
  a.slabs = x.slabs;
  a.n = n;
  a.y = y;
  a.ldy = ldy;
  return a;
}

unsigned blocks(int count, int each) { return unsigned(count + each - 1) / unsigned(each); }

}  // namespace

void gemm(cudaStream_t s, const Matrix& w, const Vectors& x, int first, int n, float* y, size_t ldy) {
  for (int p = 0; p < w.n_parts; p++) {
    GemmArgs a = inputs(x, first, n, y, ldy);
    a.m = w.part[p];
    const dim3 grid(blocks(a.m.tiles, 2), blocks(n, kTokens));
    if (a.m.store == Store::q4) {
      launch("gemm, 4 bits", gemm_kernel<Source::nibbles>, grid, dim3(kThreads), 0, s, a);
    } else if (a.m.store == Store::q8) {
      launch("gemm, 8 bits", gemm_kernel<Source::bytes>, grid, dim3(kThreads), 0, s, a);
    } else {
      launch("gemm, float", gemm_float_kernel, dim3(unsigned(a.m.tiles), blocks(n, kFloatTokens)), dim3(kThreads), 0, s,
             a);
    }
  }
}

void gemm_neurons(cudaStream_t s, const Neurons& w, const Vectors& x, int n, float* y, size_t ldy) {
  GemmArgs a = inputs(x, 0, n, y, ldy);
  a.neurons = w;
  Part& m = a.m;
  m.group = w.group;
  m.has_min = w.has_min;
  m.rows = w.neurons * (w.gated ? 2 : 1);
  m.cols = w.cols;
  m.slabs = w.slabs;
  m.tiles = (m.rows + kTileRows - 1) / kTileRows;
  m.add = w.add;
  if (is_quantised(w.kind)) {
    m.bias = code_bias(w.kind);
    launch("gemm, neurons", gemm_kernel<Source::neurons>, dim3(blocks(m.tiles, 2), blocks(n, kTokens)), dim3(kThreads),
           0, s, a);
  } else {
    launch("gemm, float neurons", gemm_float_neurons_kernel, dim3(unsigned(m.tiles), blocks(n, kFloatTokens)),
           dim3(kThreads), 0, s, a);
  }
}

}  // namespace cuda
}  // namespace sr
