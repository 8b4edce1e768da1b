// Operations on vectors: embedding, rotary tables, residual sums with norms, activations.
#include "kernels/cuda/emit.h"
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

constexpr int kThreads = 1024;  // of the kernels that take a row each: a norm needs all of it

__device__ __forceinline__ float half_at(const uint8_t* p, size_t i) {
  return from_half(__ldg(reinterpret_cast<const uint16_t*>(p) + i));
}

// Weight (row, c) of a stored part, as pack's unpack_row has it.
__device__ float weight_at(const Part& m, int row, int c) {
  const int first = row / m.panel_rows * m.panel_rows, r = row - first;
  const int R = min(m.panel_rows, m.tiles * kTileRows - first);
  const uint8_t* panel = m.data + size_t(row / m.panel_rows) * m.panel_bytes(m.panel_rows);
  if (m.store != Store::q4 && m.store != Store::q8) {
    const size_t at =
        size_t(r / kTileRows) * kTileRows * size_t(m.cols) + size_t(c) * kTileRows + size_t(r % kTileRows);
    if (m.store == Store::f32) return __ldg(reinterpret_cast<const float*>(panel) + at);
    if (m.store == Store::f16) return half_at(panel, at);
    return __uint_as_float(unsigned(__ldg(reinterpret_cast<const uint16_t*>(panel) + at)) << 16);
  }
  const int parts = 32 / m.group, in_slab = c % 32, part = in_slab / m.group;
  const uint8_t* slab = panel + m.units_bytes(R) + size_t(c / 32) * m.slab_bytes(R);
  const uint8_t* run = slab + m.head_bytes(R) + size_t(in_slab) * m.run_bytes(R);
  const auto scale_at = [&](int i) {
    const size_t place = size_t(i) * R + r;
    if (!m.unit_slabs) return half_at(slab, place);
    const float unit = half_at(panel + m.unit_offset(c / 32, R), size_t(i / parts) * R + r);
    return __fmul_rn(float(int(int8_t(__ldg(slab + place)))), unit);
  };
  const float scale = scale_at(part);
  int code;  // without its bias
  if (m.store == Store::q8) {
    code = int(__ldg(run + r)) - 128;
  } else {
    const int in_tile = r % kTileRows;
    code = (int(__ldg(run + r / kTileRows * 32 + in_tile % 32)) >> (in_tile / 32 * 4) & 15) - 8;
  }
  if (!m.has_min) return __fmul_rn(scale, float(code));
  return fmaf(scale, float(code + m.bias), scale_at(parts + part));
}

__global__ void __launch_bounds__(256) embed_kernel(const EmbedArgs a) {
  after_previous();
  const int row = int(blockIdx.y), c = int(blockIdx.x) * 256 + int(threadIdx.x), n = a.table.cols;
  if (row == 0)
    for (int i = c; i < a.n_zero; i += int(gridDim.x) * 256) a.zero[i] = 0;
  if (c >= n) return;
  int token = a.tokens ? a.tokens[row] : a.step->token;
  int p = 0;
  while (p + 1 < a.table.n_parts && token >= a.table.part[p].rows) token -= a.table.part[p++].rows;
  float v = weight_at(a.table.part[p], token, c);
  if (a.scale != 1) v = __fmul_rn(v, a.scale);
  if (a.position_embd) v = __fadd_rn(v, a.position_embd[size_t(a.step->pos + row) * n + c]);
  a.x[size_t(row) * n + c] = v;
}

struct RopeArgs {
  const double* frequency;
  int half;
  float mscale;
  const Step* step;
  float* table;
};

__global__ void __launch_bounds__(128) rope_kernel(const RopeArgs a) {
  after_previous();
  const int row = int(blockIdx.y), i = int(blockIdx.x) * 128 + int(threadIdx.x);
  if (i >= a.half) return;
  const double angle = double(a.step->pos + row) * a.frequency[i];
  a.table[size_t(row) * 2 * a.half + i] = __fmul_rn(float(cos(angle)), a.mscale);
  a.table[size_t(row) * 2 * a.half + a.half + i] = __fmul_rn(float(sin(angle)), a.mscale);
}

// The sum of v over the block, in every thread. The order is fixed. One warp adds the warps' sums: most GPUs compute
// doubles at a 64th of the rate of floats, and 1024 threads that each add 32 take longer than the rest of a norm. Calls
// may follow each other: part[0 .. 31] of an earlier one were read before its second barrier, which all have left, and
// part[32] is written after the first barrier of this one, where nobody comes who has yet to read the earlier sum.
__device__ double block_sum(double v) {
  SR_SHARED(double, part, 33);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  v = warp_sum(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  if (warp == 0) {
    const double sum = warp_sum(lane < warps ? part[lane] : 0.0);
    if (lane == 0) part[32] = sum;
  }
  __syncthreads();
  return part[32];
}

// What a norm does to its vector: (x - mean) * factor * weight + bias.
struct NormFactors {
  float mean, factor;
};

template <class Get>
__device__ NormFactors norm_factors(const NormView& norm, int n, const Get& get) {
  if (norm.type == NormType::none) return {0, 1};
  double sum = 0, mean = 0;
  if (norm.type == NormType::layer) {
    for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) sum += get(i);
    mean = block_sum(sum) / n;
    sum = 0;
  }
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    const double d = double(get(i)) - mean;
    sum += d * d;
  }
  return {float(mean), float(1.0 / sqrt(block_sum(sum) / n + double(norm.eps)))};
}

__device__ __forceinline__ float apply_norm(const NormView& norm, const NormFactors& f, int i, float v) {
  if (norm.type == NormType::none) return v;
  v = __fmul_rn(__fmul_rn(v - f.mean, f.factor), norm.weight[i]);
  return norm.bias ? __fadd_rn(v, norm.bias[i]) : v;
}

// Weights of norms and thresholds lie in memory, and are needed only when a sum is ready: asked for ahead, a line each.
__device__ __forceinline__ void prefetch_floats(const float* p, int n) {
  for (int i = int(threadIdx.x) * 32; p && i < n; i += int(blockDim.x) * 32) prefetch(p + i);
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const PrepareArgs a) {
  after_previous();
  const int row = int(blockIdx.x), tid = int(threadIdx.x), threads = int(blockDim.x), n = a.width, pos = a.step->pos;
  for (int b = 0; b < 2; b++) prefetch_floats(a.branch[b].post.weight, n);
  prefetch_floats(a.norm.weight, n);
  prefetch_floats(a.norm.bias, n);
  prefetch_floats(a.mask.at(pos + row), n);
  float* x = a.x + size_t(row) * a.ldx;
  // Every thread keeps to its own elements of x, so that no barrier is needed between these loops.
  for (int b = 0; b < 2; b++) {
    const Branch& branch = a.branch[b];
    if (!branch.y) continue;
    const float* y = branch.y + size_t(row) * branch.ld;
    const NormFactors f = norm_factors(branch.post, n, [&](int i) { return y[i]; });
    for (int i = tid; i < n; i += threads) {
      const float v = apply_norm(branch.post, f, i, y[i]);
      x[i] = a.residual_scale == 1 ? __fadd_rn(x[i], v) : __fadd_rn(x[i], __fmul_rn(a.residual_scale, v));
    }
  }
  if (!a.out.x) return;
  const NormFactors f = norm_factors(a.norm, n, [&](int i) { return x[i]; });
  for (int i = tid; i < a.out.padded; i += threads) {
    const float v = i < n ? apply_norm(a.norm, f, i, x[i]) : 0.0f;
    emit(a.out, row, i, v, a.quantise, a.mask, pos);
  }
}

struct InPlaceArgs {
  NormView norm;
  float* y;
  size_t ld;
  int width;
};

__global__ void __launch_bounds__(kThreads) in_place_kernel(const InPlaceArgs a) {
  after_previous();
  float* y = a.y + size_t(blockIdx.x) * a.ld;
  const NormFactors f = norm_factors(a.norm, a.width, [&](int i) { return y[i]; });
  for (int i = int(threadIdx.x); i < a.width; i += int(blockDim.x)) y[i] = apply_norm(a.norm, f, i, y[i]);
}

struct AddArgs {
  const float* add;
  float* y;
  size_t ld;
  int width;
};

__global__ void __launch_bounds__(256) add_kernel(const AddArgs a) {
  after_previous();
  const int i = int(blockIdx.x) * 256 + int(threadIdx.x);
  if (i >= a.width) return;
  const size_t at = size_t(blockIdx.y) * a.ld + size_t(i);
  a.y[at] = __fadd_rn(a.y[at], a.add[at]);
}

__global__ void __launch_bounds__(256) activate_kernel(const ActivateArgs a) {
  after_previous();
  const int row = int(blockIdx.y), i = int(blockIdx.x) * 256 + int(threadIdx.x);
  if (i / 32 * 32 >= a.out.padded) return;  // whole warps
  const int pos = a.step->pos;
  prefetch_threshold(a.out, i, a.mask, pos + row);
  float v = 0;
  if (i < a.n_ff) {
    float up = 1;
    if (a.in) {
      const float* in = a.in + size_t(row) * a.ld + (a.gated ? i / kTileRows * 2 * kTileRows + i % kTileRows : i);
      const float g = *in;
      v = activation(a.act, a.cut > 0 && g < a.cut ? 0.0f : g);
      if (a.gated) up = in[kTileRows];
      const float* threshold = a.neurons.at(pos + row);
      if (threshold && fabsf(v) <= threshold[i]) v = up = 0;
      else if (threshold && a.neurons.kept) atomicAdd(a.neurons.kept, 1);
    } else {
      v = a.gate[i];
      if (a.gated) up = v == 0 ? 0.0f : a.up[i];
    }
    if (a.up_relu && up < 0) up = 0;
    if (a.gated) v = __fmul_rn(v, up);
  }
  emit(a.out, row, i, v, a.quantise, a.mask, pos);
}

unsigned row_threads(int width) {
  const unsigned n = (unsigned(width) + 31) / 32 * 32;
  return n < 64 ? 64 : n > unsigned(kThreads) ? unsigned(kThreads) : n;
}

}  // namespace

void embed(cudaStream_t s, const EmbedArgs& a, int n) {
  launch("embed", embed_kernel, dim3(unsigned(a.table.cols + 255) / 256, unsigned(n)), dim3(256), 0, s, a);
}

void rope_tables(cudaStream_t s, const double* frequency, int half, float mscale, const Step* step, int n,
                 float* table) {
  const RopeArgs a = {frequency, half, mscale, step, table};
  launch("rope tables", rope_kernel, dim3(unsigned(half + 127) / 128, unsigned(n)), dim3(128), 0, s, a);
}

void prepare(cudaStream_t s, const PrepareArgs& a, int n) {
  launch("prepare", prepare_kernel, dim3(unsigned(n)), dim3(row_threads(a.width)), 0, s, a);
}

void norm_in_place(cudaStream_t s, const NormView& norm, float* y, size_t ld, int width, int n) {
  const InPlaceArgs a = {norm, y, ld, width};
  launch("norm", in_place_kernel, dim3(unsigned(n)), dim3(row_threads(width)), 0, s, a);
}

void add_rows(cudaStream_t s, const float* add, float* y, size_t ld, int width, int n) {
  const AddArgs a = {add, y, ld, width};
  launch("add", add_kernel, dim3(unsigned(width + 255) / 256, unsigned(n)), dim3(256), 0, s, a);
}

void activate(cudaStream_t s, const ActivateArgs& a, int n) {
  launch("activate", activate_kernel, dim3(unsigned(a.out.padded + 255) / 256, unsigned(n)), dim3(256), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
