// One vector times a stored matrix. A warp takes 4 tiles (4 bits) or 2 (8 bits) of 64 rows, a word of 4 bytes a lane,
// so that a column is read as one line of 128 bytes and can be left out; four columns are turned into dot products of
// bytes in registers. Warps of a block share the slabs, blocks share them further; sums are added in a fixed order.
#include "kernels/cuda/launch.h"

namespace sr {
namespace cuda {
namespace {

constexpr int kRedRows = 256;  // floats of one warp's results
constexpr int kWarps = 8;      // of a block
constexpr int kResident = 3;   // blocks on a multiprocessor: 85 registers a thread, and what plan_gemv counts with

struct GemvArgs {
  Matrix w;
  Vectors x;
  Mask mask;
  int splits;
  float* partial;  // [splits, groups, 256]
  int* tickets;    // [groups]
  const Step* step;
  float* y;
  bool early;      // may start before its input is there
};

struct Halves4 {
  float f[4];
};
__device__ __forceinline__ uint2 load_halves(const uint8_t* p) { return __ldg(reinterpret_cast<const uint2*>(p)); }
__device__ __forceinline__ Halves4 floats_of(uint2 u) {
  return {{from_half(uint16_t(u.x & 0xffff)), from_half(uint16_t(u.x >> 16)), from_half(uint16_t(u.y & 0xffff)),
           from_half(uint16_t(u.y >> 16))}};
}

__device__ __forceinline__ unsigned load_word(const uint8_t* p) { return __ldg(reinterpret_cast<const unsigned*>(p)); }

// Four scales that are int8 codes in units of halves; the products are exact.
__device__ __forceinline__ Halves4 in_units(unsigned codes, const uint8_t* units) {
  Halves4 out = floats_of(load_halves(units));
#pragma unroll
  for (int k = 0; k < 4; k++) out.f[k] = __fmul_rn(float(int(int8_t(codes >> 8 * k & 255))), out.f[k]);
  return out;
}

// One row's share of a scale group, in the order of kernels/table.h.
__device__ __forceinline__ float add_group(float y, int sum, float scale, float min, int has_min, int bias,
                                           float x_scale, float x_total) {
  y = fmaf(__fmul_rn(float(sum), scale), x_scale, y);
  if (has_min) y = fmaf(fmaf(scale, float(bias), min), x_total, y);
  return y;
}

// Where a lane's rows lie: 4 bits, lane / 8 is the tile, lane % 8 * 4 + 0..3 and those + 32 its rows; 8 bits, lane / 16
// the tile, lane % 16 * 4 + 0..3 its rows.
template <bool kBytes>
struct Place {
  static constexpr int kLanes = kBytes ? 16 : 8;
  int at, row, R, parts;
  const uint8_t *panel, *units;  // the slabs, and where they have units those of this lane's first row
  size_t slab_bytes;
  unsigned run, minima, column;  // inside a slab 32 bits suffice, and save registers

  __device__ __forceinline__ Place(const Part& m, int group) {
    const int lane = int(threadIdx.x) % 32;
    // Surplus lanes repeat the last tile; their results are not stored.
    const int tile = min(group * (32 / kLanes) + lane / kLanes, m.tiles - 1);
    const int first = tile * kTileRows / m.panel_rows * m.panel_rows;
    at = lane % kLanes;
    row = tile * kTileRows - first;
    R = min(m.panel_rows, m.tiles * kTileRows - first);
    parts = 32 / m.group;
    units = m.data + size_t(first / m.panel_rows) * m.panel_bytes(m.panel_rows);
    panel = units + m.units_bytes(R);
    units += 2 * (row + at * 4);
    slab_bytes = m.slab_bytes(R);
    run = unsigned(m.run_bytes(R));
    minima = unsigned(parts * m.scale_bytes() * R);
    column = unsigned(m.head_bytes(R)) + unsigned((kBytes ? row : row / 2) + at * 4);
  }
};

// The slabs that a warp begins with, on their way to the L2 cache while the kernel before makes the input.
constexpr int kEarlySlabs = 2;
template <bool kBytes>
__device__ __forceinline__ void fetch_early(const Part& m, int group, int begin, int step) {
  const Place<kBytes> p(m, group);
  for (int i = 0, s = begin; i < kEarlySlabs && s < m.slabs; i++, s += step) {
    const uint8_t* slab = p.panel + size_t(s) * p.slab_bytes;
    prefetch(slab + m.scale_bytes() * (p.row + p.at * 4));
    for (int c = 0; c < 32; c++) prefetch(slab + (p.column + unsigned(c) * p.run));
  }
}

template <bool kBytes, bool kList, bool kUnits>
__device__ __forceinline__ void product(const Part& m, const Vectors& x, int group, int begin, int step, float* y) {
  constexpr int kSets = kBytes ? 1 : 2;
  const Place<kBytes> place(m, group);
  const int at = place.at, row = place.row, R = place.R, parts = place.parts;
  const unsigned run = place.run, minima = place.minima, column = place.column;

  for (int s = begin; s < m.slabs; s += step) {
    const uint8_t* slab = place.panel + size_t(s) * place.slab_bytes;
    const float x_scale = fresh(x.scale + s);
    const int2 both = fresh(reinterpret_cast<const int2*>(x.sum) + s);
    const int sums[2] = {both.x, both.y};
    int counts[2] = {16, 16};
    if (kList) {
      const unsigned n = fresh(reinterpret_cast<const uint16_t*>(x.count) + s);
      counts[0] = int(n & 255);
      counts[1] = int(n >> 8);
      if (n == 0) continue;
    }
    int acc[4 * kSets];
#pragma unroll
    for (int r = 0; r < 4 * kSets; r++) acc[r] = 0;
    for (int half = 0; half < 2; half++) {
      if (kList && parts == 2 && counts[half] == 0) continue;
      const int quads = kList ? (counts[half] + 3) / 4 : 4;
      // Inputs and scales are asked for before the columns, and with few loads: behind the branches of a list each
      // would add its own way from memory. Of a list the whole 16 places are read, of which `quads` are looked at.
      const uint4 x4 = fresh(reinterpret_cast<const uint4*>((kList ? x.listed : x.q) + 32 * s) + half);
      const unsigned xs[4] = {x4.x, x4.y, x4.z, x4.w};
      uint4 c4 = {0, 0, 0, 0};
      if (kList) c4 = fresh(reinterpret_cast<const uint4*>(x.cols + 32 * s) + half);
      const unsigned cs[4] = {c4.x, c4.y, c4.z, c4.w};
      const bool ends = half == 1 || parts == 2;  // a scale group
      const int p = parts == 1 ? 0 : half;
      uint2 scales[kSets] = {}, lows[kSets] = {};  // halves, or in x the codes of products
      const auto load_scales = [&] {
#pragma unroll
        for (int set = 0; set < kSets; set++) {
          const unsigned at_row = unsigned(p * R + row + at * 4 + 32 * set);
          if (kUnits && m.unit_slabs) {
            scales[set].x = load_word(slab + at_row);
            if (m.has_min) lows[set].x = load_word(slab + (minima + at_row));
          } else {
            scales[set] = load_halves(slab + 2 * at_row);
            if (m.has_min) lows[set] = load_halves(slab + (minima + 2 * at_row));
          }
        }
      };
      if (kList && ends) load_scales();
      unsigned word[16];
#pragma unroll
      for (int quad = 0; quad < 4; quad++) {
        if (quad < quads) {
          const unsigned c = kList ? cs[quad] : 0x03020100u + 0x04040404u * unsigned(quad + 4 * half);
#pragma unroll
          for (int i = 0; i < 4; i++)
            word[4 * quad + i] = __ldg(reinterpret_cast<const unsigned*>(slab + (column + (c >> 8 * i & 255) * run)));
        }
      }
#pragma unroll
      for (int quad = 0; quad < 4; quad++) {
        if (quad < quads) {
          const unsigned* w = word + 4 * quad;
          const int xv = int(xs[quad]);
          // Four columns of four rows, turned: t[k] holds row k of the four columns.
          const unsigned a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
          const unsigned c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
          const unsigned t[4] = {__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
                                 __byte_perm(c, d, 0x7632)};
#pragma unroll
          for (int k = 0; k < 4; k++) {
            if (kBytes) {
              acc[k] = __dp4a(int(t[k] ^ 0x80808080u), xv, acc[k]);
            } else {
              acc[k] = __dp4a(int(t[k] & 0x0f0f0f0fu), xv, acc[k]);
              acc[4 * (kSets - 1) + k] = __dp4a(int((t[k] ^ 0x80808080u) & 0xf0f0f0f0u), xv, acc[4 * (kSets - 1) + k]);
            }
          }
        }
      }
      if (!ends) continue;
      if (!kList) load_scales();
      // Low nibbles were summed without their bias of 8, high ones 16-fold.
      const int x_sum = parts == 1 ? sums[0] + sums[1] : sums[half];
      const float x_total = __fmul_rn(x_scale, float(x_sum));
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        Halves4 scale, low = {{0, 0, 0, 0}};
        if (kUnits && m.unit_slabs) {  // asked for only now: eight slabs share them
          const uint8_t* units = place.units + (m.unit_offset(s, R) + size_t(64 * set));
          scale = in_units(scales[set].x, units);
          if (m.has_min) low = in_units(lows[set].x, units + 2 * size_t(R));
        } else {
          scale = floats_of(scales[set]);
          low = floats_of(lows[set]);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int raw = acc[4 * set + k];
          const int sum = kBytes ? raw : set == 0 ? raw - 8 * x_sum : raw >> 4;
          y[4 * set + k] = add_group(y[4 * set + k], sum, scale.f[k], low.f[k], m.has_min, m.bias, x_scale, x_total);
          acc[4 * set + k] = 0;
        }
      }
    }
  }
}

// Lane l holds rows 2 l and 2 l + 1 of a tile; warps take columns in turn.
__device__ __forceinline__ void product_float(const Part& m, const float* x, int group, int begin, int step, float* y) {
  const int lane = int(threadIdx.x) % 32, tile = group;
  const int first = tile * kTileRows / m.panel_rows * m.panel_rows, row = tile * kTileRows - first;
  const uint8_t* panel = m.data + size_t(first / m.panel_rows) * m.panel_bytes(m.panel_rows);
  const size_t base = size_t(row) * size_t(m.cols) + 2 * size_t(lane);
#pragma unroll 8
  for (int c = begin; c < m.cols; c += step) {
    const size_t at = base + size_t(c) * kTileRows;
    const float xv = fresh(x + c);
    float a, b;
    if (m.store == Store::f32) {
      const float2 w = __ldg(reinterpret_cast<const float2*>(panel + 4 * at));
      a = w.x;
      b = w.y;
    } else {
      const unsigned w = __ldg(reinterpret_cast<const unsigned*>(panel + 2 * at));
      a = m.store == Store::f16 ? from_half(uint16_t(w & 0xffff)) : __uint_as_float(w << 16);
      b = m.store == Store::f16 ? from_half(uint16_t(w >> 16)) : __uint_as_float(w & 0xffff0000u);
    }
    y[0] = fmaf(a, xv, y[0]);
    y[1] = fmaf(b, xv, y[1]);
  }
}

// kUnits: some part's scales are products. A kernel of its own, so that others do not pay for its registers.
template <bool kUnits>
__global__ void __launch_bounds__(kWarps * 32, kResident) gemv_kernel(const GemvArgs a) {
  SR_SHARED(float, red, kWarps * kRedRows);
  SR_SHARED(int, last, 1);
  int p = 0;
  while (p + 1 < a.w.n_parts && int(blockIdx.x) >= a.w.part[p + 1].first_group) p++;
  const Part& m = a.w.part[p];
  const int group = int(blockIdx.x) - m.first_group;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int begin = int(blockIdx.y) * kWarps + warp, step = a.splits * kWarps;
  const int rows = group_rows(m.store);
  float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  float* out = red + warp * kRedRows;
  if (a.early && !a.mask.kept && m.store == Store::q4) fetch_early<false>(m, group, begin, step);
  if (a.early && !a.mask.kept && m.store == Store::q8) fetch_early<true>(m, group, begin, step);
  after_previous();
  if (m.store == Store::q4 || m.store == Store::q8) {
    // One decision for the whole grid: the list where few enough columns are left, else all of the masked vector.
    bool list = false;
    if (a.mask.kept) {
      const int pos = fresh(&a.step->pos), kept = fresh(a.mask.kept);  // both are asked for at once
      list = bool(a.mask.at(pos)) & (kept <= a.mask.limit);
    }
    if (m.store == Store::q4) {
      if (list) product<false, true, kUnits>(m, a.x, group, begin, step, y);
      else product<false, false, kUnits>(m, a.x, group, begin, step, y);
      const int at = lane / 8 * kTileRows + lane % 8 * 4;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        out[at + k] = y[k];
        out[at + 32 + k] = y[4 + k];
      }
    } else {
      if (list) product<true, true, kUnits>(m, a.x, group, begin, step, y);
      else product<true, false, kUnits>(m, a.x, group, begin, step, y);
#pragma unroll
      for (int k = 0; k < 4; k++) out[lane * 4 + k] = y[k];
    }
  } else {
    product_float(m, a.x.x, group, begin, step, y);
    out[2 * lane] = y[0];
    out[2 * lane + 1] = y[1];
  }
  __syncthreads();

  const int row = group * rows + int(threadIdx.x), end = m.tiles * kTileRows;
  const bool mine = int(threadIdx.x) < rows && row < end;
  float sum = 0;
  if (mine)
    for (int w = 0; w < kWarps; w++) sum += red[w * kRedRows + int(threadIdx.x)];
  if (a.splits > 1) {
    // The block that finishes last adds the others' sums, in their order.
    float* partial = a.partial + size_t(blockIdx.x) * kRedRows + threadIdx.x;
    const size_t stride = size_t(gridDim.x) * kRedRows;
    if (mine) partial[blockIdx.y * stride] = sum;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int ticket = atomicAdd(a.tickets + blockIdx.x, 1);
      last[0] = ticket == a.splits - 1;
      if (last[0]) a.tickets[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!last[0]) return;
    __threadfence();
    sum = 0;
    if (mine) {
#pragma unroll 8
      for (int i = 0; i < a.splits; i++) sum += __ldcg(partial + i * stride);
    }
  }
  if (mine) {
    if (m.add && row < m.rows) sum += m.add[row];
    a.y[m.y_begin + row] = sum;
  }
}

}  // namespace

namespace {
constexpr int kMostSplits = 32;
// Splits beyond those that fill the device once: for few multiprocessors, where blocks come in waves anyway.
constexpr int kMoreSplits = 3;
}  // namespace

GemvPlan plan_gemv(const Matrix& w, int multiprocessors) {
  // Blocks come in waves of as many as are resident; a wave lasts as long as a warp's slabs, and half a slab for the
  // sums at its end. A last wave of a few blocks costs as much as a full one.
  GemvPlan plan;
  const int resident = kResident * multiprocessors, full = (resident + w.groups - 1) / w.groups;
  int most = w.slabs / kWarps;  // a warp keeps a slab of its own
  most = most < full + kMoreSplits ? most : full + kMoreSplits;
  most = most < kMostSplits ? most : kMostSplits;
  most = most > 1 ? most : 1;
  long long least = 0;
  for (int splits = 1; splits <= most; splits++) {
    const long long waves = (w.groups * splits + resident - 1) / resident;
    const long long slabs = (w.slabs + kWarps * splits - 1) / (kWarps * splits), cost = waves * (2 * slabs + 1);
    if (splits > 1 && cost >= least) continue;
    least = cost;
    plan.splits = splits;
  }
  return plan;
}

cudaError_t code_for_device(int* machine, int* ptx) {
  cudaFuncAttributes a = {};
  // Both are asked for, which loads them: the first launch may be in a capture.
  cudaError_t found = cudaFuncGetAttributes(&a, gemv_kernel<true>);
  if (found == cudaSuccess) found = cudaFuncGetAttributes(&a, gemv_kernel<false>);
  *machine = a.binaryVersion;
  *ptx = a.ptxVersion;
  return found;
}

size_t gemv_partial_floats(const Matrix& w, const GemvPlan& plan) {
  return plan.splits > 1 ? size_t(plan.splits) * size_t(w.groups) * kRedRows : 0;
}

size_t gemv_partial_most(int groups, int multiprocessors) {
  return size_t(kResident * multiprocessors + (1 + kMoreSplits) * groups) * kRedRows;  // full is rounded up
}

void gemv(cudaStream_t s, const Matrix& w, const Vectors& x, const Mask& mask, const GemvPlan& plan,
          const GemvScratch& scratch, const Step* step, float* y) {
  const GemvArgs a = {w, x, mask, plan.splits, scratch.partial, scratch.tickets, step, y, OverlapLaunches::active()};
  bool units = false;
  for (int p = 0; p < w.n_parts; p++) units |= w.part[p].unit_slabs != 0;
  const dim3 blocks(unsigned(w.groups), unsigned(plan.splits));
  if (units) launch("gemv, products", gemv_kernel<true>, blocks, dim3(kWarps * 32), 0, s, a);
  else launch("gemv", gemv_kernel<false>, blocks, dim3(kWarps * 32), 0, s, a);
}

}  // namespace cuda
}  // namespace sr
