// The device's operations as host functions: each puts one kernel (or a few) on the stream and returns. What they
// compute is in the .cu file of the same heading; every pointer is device memory.
#pragma once

#include "kernels/cuda/platform.h"
#include "kernels/cuda/views.h"

namespace sr {
namespace cuda {

// What changes from token to token, in device memory, so that a captured graph can be replayed.
struct Step {
  int pos;    // of the first token of the pass
  int token;  // of a single-token pass
};

// Whether this program has machine code for the device, or code that its driver can translate; which: the compute
// capability that it was compiled for (75: 7.5), of machine code and of PTX.
cudaError_t code_for_device(int* machine, int* ptx);

// ---- gemv.cu: one vector

// How a product is cut: `splits` blocks share the slabs of a row group.
struct GemvPlan {
  int splits = 1;
};
GemvPlan plan_gemv(const Matrix& w, int multiprocessors);
// Scratch that gemv needs where splits > 1: floats, and ints that are zero before the first call (calls leave them so).
size_t gemv_partial_floats(const Matrix& w, const GemvPlan& plan);
// The most that any matrix of at most so many groups needs.
size_t gemv_partial_most(int groups, int multiprocessors);
struct GemvScratch {
  float* partial;
  int* tickets;  // [groups]
};
// y[row] = W x + bias, padding rows included. mask.kept: the list of x is used where it pays.
void gemv(cudaStream_t s, const Matrix& w, const Vectors& x, const Mask& mask, const GemvPlan& plan,
          const GemvScratch& scratch, const Step* step, float* y);

// ---- gemm.cu: n vectors; y [n, ldy]
void gemm(cudaStream_t s, const Matrix& w, const Vectors& x, int first, int n, float* y, size_t ldy);

// ---- rows.cu: neurons stored as records
struct Neurons {
  const uint8_t* data;
  WeightKind kind;
  int has_min, group, neurons, cols, gated, slabs;
  size_t row_stride, up_offset, record_bytes;
  size_t high, scale, min;  // planes of a row
  const float* add;         // in the order of the panels' rows (64 of gate, 64 of up ...), or null

  SR_INLINE const uint8_t* row(int id, bool up) const {
    return data + size_t(id / kNeuronBlock) * kNeuronBlock * record_bytes + size_t(id % kNeuronBlock) * row_stride +
           (up ? up_offset : 0);
  }
  SR_INLINE int add_at(int id, bool up) const { return gated ? id / 64 * 128 + id % 64 + (up ? 64 : 0) : id; }
};
// Results at the neurons' own places: gate[id], up[id] for id of ids[0 .. *count), or for all neurons where ids is
// null. gate or up may be null: not computed.
void rows(cudaStream_t s, const Neurons& w, const Vectors& x, const int* ids, const int* count, float* gate, float* up,
          int multiprocessors);
// All neurons times n vectors; y [n, ldy] in the order of the panels' rows, 64 of gate, 64 of up ...
void gemm_neurons(cudaStream_t s, const Neurons& w, const Vectors& x, int n, float* y, size_t ldy);
// gate[i] = act(gate[i]) where its magnitude is above threshold[i] (no threshold: where it is not 0), else 0; ids of
// the former, ascending, and their number. What is not a number stays.
struct SurviveArgs {
  float* gate;
  int n;
  Activation act;
  float cut;
  Mask mask;  // kept is added to; limit is not looked at
  const Step* step;
  int* ids;
  int* count;
};
void survivors(cudaStream_t s, const SurviveArgs& a);

// ---- vector.cu
struct EmbedArgs {
  Matrix table;
  const int* tokens;     // [n]; null: step->token
  const Step* step;
  const float* position_embd;  // [positions, n_embd] or null
  float scale;
  float* x;              // [n, n_embd]
  int* zero;             // [n_zero] ints set to 0: the step's counters
  int n_zero;
};
void embed(cudaStream_t s, const EmbedArgs& a, int n);

// cos and sin of positions step->pos + i: table [n, 2 * half] as model/rope.h has it; frequency [half] double.
void rope_tables(cudaStream_t s, const double* frequency, int half, float mscale, const Step* step, int n,
                 float* table);

// Rows of the residual stream: adds up to two branches, each through its own norm, then makes the input of the next
// product: norm, int8, mask.
struct Branch {
  const float* y;  // [n, ld] or null
  size_t ld;
  NormView post;
};
struct PrepareArgs {
  float* x;          // [n, ldx] stream; with no branches only read
  size_t ldx;
  int width;
  Branch branch[2];
  float residual_scale;
  NormView norm;
  Vectors out;
  int quantise;      // out.q, scale, sum are wanted
  Mask mask;
  const Step* step;
};
void prepare(cudaStream_t s, const PrepareArgs& a, int n);

// y[i, r] += add[i, r], i < n, r < width: what was computed elsewhere joins a branch.
void add_rows(cudaStream_t s, const float* add, float* y, size_t ld, int width, int n);

// A norm over part of every row, in place (QkNorm::full).
void norm_in_place(cudaStream_t s, const NormView& norm, float* y, size_t ld, int width, int n);

struct ActivateArgs {
  const float* in;   // [n, ld]: gate and up in blocks of 64 rows, or `gate` alone
  size_t ld;
  const float* gate; // where `in` is null: act(gate) of one token and its up, which is looked at where gate is not 0
  const float* up;
  int gated;
  Activation act;
  float cut;
  int up_relu;
  int n_ff;
  Mask neurons;      // site G, blocks of tokens: act(gate) that does not exceed its threshold gives 0
  Vectors out;
  int quantise;
  Mask mask;
  const Step* step;
};
void activate(cudaStream_t s, const ActivateArgs& a, int n);

// ---- attend.cu
// Keys and values of one layer: [n_kv_heads, n_ctx, head_dim] fp16 each.
struct AttendView {
  uint16_t* k;
  uint16_t* v;
  int n_ctx, n_heads, n_kv_heads, head_dim;
  int window;      // 0: all positions
  float scale, softcap;
};
struct HeadsArgs {
  AttendView cache;
  float* qkv;          // [n, ld]; q is normed and rotated in place
  size_t ld;
  const int* head_at;  // [n_heads + 2 n_kv_heads]
  NormView q_norm, k_norm;
  int rope_half;       // pairs turned, 0: none
  int interleaved;
  const float* table;  // [n, 2 * rope_half]
  const Step* step;
};
void heads(cudaStream_t s, const HeadsArgs& a, int n);

struct AttendArgs_ {
  AttendView cache;
  const float* q;      // [n, ld]
  size_t ld;
  const int* head_at;
  const Step* step;
  int splits;
  float* partial;      // [splits, n, n_heads, head_dim]
  float* row_max;      // [splits, n, n_heads]
  float* row_sum;
};
constexpr int kMaxHeadDim = 256;
void attend(cudaStream_t s, const AttendArgs_& a, int n);
struct MergeArgs {
  const float* partial;
  const float* row_max;
  const float* row_sum;
  int splits, n_heads, head_dim;
  Vectors out;
  int quantise;
  Mask mask;
  const Step* step;
};
void merge(cudaStream_t s, const MergeArgs& a, int n);

// ---- head.cu
// Scale, soft cap and check of logits [n, ld], n_vocab of each row; *bad becomes nonzero where one is not finite.
void finish_logits(cudaStream_t s, float* logits, size_t ld, int n_vocab, int n, float scale, float cap, int* bad);
// The first of the largest logits; scratch: [2 * 256] floats.
void argmax(cudaStream_t s, const float* logits, int n, float* scratch, int* token);

// ---- top.cu
constexpr int kTop = 256, kTopStretches = 1024, kTopRoom = 1024;
// The likeliest tokens, the likeliest first, the lower id first among equals.
struct Top {
  float logit[kTop];
  int id[kTop];
  double total;  // of exp(logit - largest logit) over all logits
  int n;         // tokens here: kTop, or all; -1: unknown, as too many are equal
};
struct TopScratch {
  unsigned long long keys[kTopRoom];
  double sums[kTopStretches / 8];
  float most[kTopStretches];
  float largest, bound;
  int found;
};
struct TopArgs {
  const float* logits;  // [n], finite
  int n;
  TopScratch* scratch;
  Top* top;
};
void find_top(cudaStream_t s, const TopArgs& a);
}  // namespace cuda
}  // namespace sr
