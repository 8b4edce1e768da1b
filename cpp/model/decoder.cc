// Set-up, and the row operations that decode and prefill share.
#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>

#include "format/packed_model.h"
#include "kernels/pack/pack.h"
#include "model/attention.h"
#include "model/decoder_buffers.h"
#include "model/row_ops.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr const char* kWorkspace = "the model's working memory";
constexpr const char* kEndsHere = "; the answer ends here, what was generated before it is sound";

size_t scratch_bytes(const DecoderWeights& w) {
  size_t most = 0;
  const auto look = [&](const Linear& m) {
    for (const PanelMatrix& p : m.parts) most = std::max(most, gemm_scratch_bytes(p));
  };
  look(w.head());
  for (const LayerWeights& l : w.layers) {
    for (const Linear* m : {&l.attn_qkv, &l.attn_o, &l.ffn_in, &l.ffn_down}) look(*m);
    if (l.ffn_rows) most = std::max(most, rows_scratch_bytes(l.ffn_rows.m));
  }
  return most;
}

}  // namespace

Decoder::Decoder(const PackedModel& model, int threads)
    : config_(read_decoder_config(model)),
      weights_(load_weights(model, config_, threads)),
      rope_(config_.rope_style, config_.rope_dims, config_.rope_theta, weights_.rope_factors, config_.rope_mscale),
      rope_local_(config_.rope_style, config_.rope_dims, config_.rope_theta_local, weights_.rope_factors_local,
                  config_.rope_mscale_local),
      rope_long_(config_.rope_style, config_.rope_dims, config_.rope_theta, weights_.rope_factors_long,
                 config_.rope_mscale),
      rope_long_local_(config_.rope_style, config_.rope_dims, config_.rope_theta_local, weights_.rope_factors_long,
                       config_.rope_mscale_local),
      pool_(threads) {
  const DecoderConfig& c = config_;
  int qkv_rows = 0, qkv_partial = 0, branch_partial = 0;
  for (const LayerWeights& l : weights_.layers) {
    qkv_rows = std::max(qkv_rows, l.attn_qkv.padded_rows());
    qkv_partial = std::max(qkv_partial, l.attn_qkv.partial_rows());
    branch_partial = std::max({branch_partial, l.attn_o.partial_rows(), l.ffn_down.partial_rows()});
  }
  const int embd_rows = weights_.layers[0].attn_o.padded_rows();
  const size_t scratch = scratch_bytes(weights_);
  const size_t hd = size_t(c.head_dim);
  const bool by_neuron = weights_.any_neuron_rows();

  for (int i = 0; i < threads; i++) {
    auto t = std::make_unique<Thread>();
    t->x.reset(size_t(c.n_embd), kWorkspace);
    t->scratch.reset(size_t(c.n_embd), kWorkspace);
    t->sum.reset(size_t(std::max(qkv_rows, embd_rows)), kWorkspace);
    t->in.reset(1, c.n_embd, kWorkspace, by_neuron);
    t->kept_share.assign(size_t(c.n_layers), 0);
    t->att.reset(1, c.n_attn(), kWorkspace);
    t->q.reset(size_t(std::min(c.heads_per_kv(), kMaxQueries)) * hd, kWorkspace);
    t->k.reset(hd, kWorkspace);
    if (c.qk_norm == QkNorm::full) t->qk.reset(size_t(c.n_attn() + c.n_kv()), kWorkspace);
    if (weights_.layers[0].ffn_sub_norm) t->z.reset(1, c.n_ff, kWorkspace);
    t->half.reset(hd, kWorkspace);
    t->attend_scratch.reset(kAttendScratchBytes, kWorkspace);
    t->tile.reset(size_t(kMaxBlock) * 2 * kTileRows, kWorkspace);
    t->sums.reset(2 * size_t(kMaxQueries) * hd, kWorkspace);
    t->gemm_scratch.reset(scratch, kWorkspace);
    thread_.push_back(std::move(t));
  }
  qkv_.reset(size_t(qkv_partial), kWorkspace);
  branch_o_.reset(size_t(branch_partial), kWorkspace);
  branch_down_.reset(size_t(branch_partial), kWorkspace);
  attention_.reset(size_t(c.n_attn()), kWorkspace);
  gate_up_.reset(size_t(c.n_ff) * 2, kWorkspace);
  rope_table_.reset(size_t(c.rope_dims), kWorkspace);
  rope_table_local_.reset(size_t(c.rope_dims), kWorkspace);
  z_.reset(1, c.n_ff, kWorkspace);

  if (by_neuron) survivors_.reset(size_t(c.n_ff), kWorkspace);
  for (int l = 0; l < c.n_layers; l++)
    for (Site s : {Site::A, Site::O, Site::M, Site::Z}) break_even_.push_back(break_even_by_shape(matrix_of(l, s)));
  true_zeros_ = has_true_zeros(c);

  block_ = std::make_unique<Block>();
  Block& b = *block_;
  const size_t rows = kMaxBlock;
  b.ld_qkv = size_t(qkv_rows);
  b.ld_branch = size_t(embd_rows);
  b.x.reset(rows * size_t(c.n_embd), kWorkspace);
  b.in.reset(kMaxBlock, c.n_embd, kWorkspace, by_neuron);
  b.att.reset(kMaxBlock, c.n_attn(), kWorkspace);
  b.z.reset(kMaxBlock, c.n_ff, kWorkspace);
  b.qkv.reset(rows * b.ld_qkv, kWorkspace);
  b.branch_o.reset(rows * b.ld_branch, kWorkspace);
  b.branch_down.reset(rows * b.ld_branch, kWorkspace);
  b.rope_table.reset(rows * size_t(c.rope_dims), kWorkspace);
  b.rope_table_local.reset(rows * size_t(c.rope_dims), kWorkspace);
}

Decoder::~Decoder() = default;

bool Decoder::forward(const int32_t* tokens, int n, int pos, KvCache* cache, Logits which, float* logits,
                      const std::function<bool()>& should_stop, const Skipping& skipping) {
  std::lock_guard<FairMutex> lock(turn_);
  const int chunks = (pos + n - 1) / kAttentionChunk + 1;
  if (n == 1 && chunks > partial_chunks_) {
    // For the whole context at once: pages are used only as the context grows.
    const int most = std::max(chunks, (cache->n_ctx() - 1) / kAttentionChunk + 1);
    const size_t heads = size_t(most) * size_t(config_.n_heads);
    partial_out_.reset(heads * size_t(config_.head_dim), "attention over a long context");
    partial_max_.reset(heads, "attention over a long context");
    partial_sum_.reset(heads, "attention over a long context");
    partial_chunks_ = most;
  }
  leave_ = false;
  not_finite_.store(false, std::memory_order_relaxed);
  counter_[0].reset();
  counter_[1].reset();
  const Pass pass = {tokens, n, pos, cache, which, logits, &should_stop, skipping};
  make_prediction_buffers(pass);
  if (!run_pass(pass)) return false;
  if (not_finite_.load(std::memory_order_relaxed)) {
    cache->erase(pos, pos + n);
    throw Error(ErrorCode::runtime, "the model's output at position " + std::to_string(pos + n - 1) +
                                        " is not a number (NaN or infinity): its weights are damaged or overflow; "
                                        "check the source and convert it again with sparse-run convert");
  }
  return true;
}

// False: stopped. Throws Error(runtime) when weights could not be read.
bool Decoder::run_pass(Pass pass) {
  std::string error;
  if (flash_) {
    pass.stored = works_from_store(pass);
    error = make_room(pass);
    if (error == "cancelled") return false;
    if (!error.empty()) throw Error(ErrorCode::runtime, error + kEndsHere);
    pass.stored = works_from_store(pass) && store_->enough();  // with the room as it is now
    if (pass.stored) store_->begin_token();
    else flash_->begin_pass();
    if (fetches_rows() && pass.tokens) {
      error = flash_->fetch_rows(pass.tokens, pass.n, *pass.should_stop, fetched_rows_.data());
    }
  }
  if (error.empty()) {
    if (pass.n == 1 && !pass.one) pool_.run([&](int tid) { decode(tid, pass); });
    else pool_.run([&](int tid) { prefill(tid, pass); });
  }
  if (!flash_) return !leave_;
  const bool stopped = (pass.stored ? store_->failed() : flash_->failed()) || error == "cancelled";
  const std::string end = pass.stored ? store_->end_token() : flash_->end_pass();
  if (!end.empty()) error = end;
  if (!error.empty() && error != "cancelled") {
    throw Error(ErrorCode::runtime, error + kEndsHere);
  }
  return !leave_ && !stopped;
}

void Decoder::load_resident(const PackedModel& model, const ResidencyPlan& plan, std::shared_ptr<ReadQueue> queue,
                            const LoadProgress& progress) {
  flash_ = std::make_unique<FlashWeights>(model, &weights_, plan, pool_.size(), std::move(queue), progress);
  fetched_rows_.reset(size_t(kMaxBlock) * size_t(config_.n_embd), kWorkspace);
}

size_t Decoder::context_bytes(int n_ctx) const {
  const size_t chunks = size_t((n_ctx - 1) / kAttentionChunk + 1);
  return kv_cache_bytes(config_.n_layers, config_.n_kv_heads, config_.head_dim, n_ctx) +
         chunks * size_t(config_.n_heads) * size_t(config_.head_dim + 2) * sizeof(float) +
         size_t(padded_vocab()) * sizeof(float);
}

void Decoder::embed_row(const Pass& pass, int i, float* x) const {
  if (!fetches_rows()) return embed_row(pass.tokens[i], pass.pos + i, x);
  const float* from = fetched_rows_.data() + size_t(i) * size_t(config_.n_embd);
  std::copy(from, from + config_.n_embd, x);
  finish_embedding(pass.pos + i, x);
}

void Decoder::embed_row(int32_t token, int pos, float* x) const {
  const Linear& w = weights_.token_embd;
  size_t p = 0;
  while (token >= w.row_begin[p + 1]) p++;
  unpack_row(w.parts[p], token - w.row_begin[p], x);
  finish_embedding(pos, x);
}

void Decoder::finish_embedding(int pos, float* x) const {
  const int n = config_.n_embd;
  if (config_.embedding_scale != 1) {
    for (int i = 0; i < n; i++) x[i] *= config_.embedding_scale;
  }
  if (weights_.position_embd) {
    const float* at = weights_.position_embd + size_t(pos) * size_t(n);
    for (int i = 0; i < n; i++) x[i] += at[i];
  }
}

void Decoder::norm_row(const Norm& norm, const float* x, int n, float* out) const {
  sr::norm_row(config_, norm, x, n, out);
}

void Decoder::add_branch(const float* branch, const Norm& post_norm, float* scratch, float* x) const {
  const int n = config_.n_embd;
  if (post_norm) {
    norm_row(post_norm, branch, n, scratch);
    branch = scratch;
  }
  const float scale = config_.residual_scale;
  if (scale == 1) {
    for (int i = 0; i < n; i++) x[i] += branch[i];
  } else {
    for (int i = 0; i < n; i++) x[i] += scale * branch[i];
  }
}

// From the residual stream to what w multiplies: norm, and int8 where w is quantised.
void Decoder::prepare_row(const Norm& norm, const float* x, const Linear& w, InputBuffer* in, int row) const {
  norm_row(norm, x, config_.n_embd, in->row(row));
  if (w.quantised) in->quantise(row);
}

// The attention branch is added to x, and what the FFN multiplies is made: of x after that, or, in a parallel block, of
// x before it (where both branches share one norm, row holds it already, its int8 form perhaps masked for attention).
void Decoder::prepare_ffn(const LayerWeights& w, const float* branch, float* scratch, float* x, InputBuffer* in,
                          int row) const {
  const auto prepare = [&] {
    if (!config_.parallel_block || w.ffn_norm) norm_row(w.ffn_norm, x, config_.n_embd, in->row(row));
    if (!w.ffn_in_quantised()) return;
    in->quantise(row);
    if (w.ffn_rows) in->order(row);
  };
  if (config_.parallel_block) prepare();
  add_branch(branch, w.post_attn_norm, scratch, x);
  if (!config_.parallel_block) prepare();
}

void Decoder::activate(float* gate, float* up, int n, float* z) const { sr::activate(config_, gate, up, n, z); }

void Decoder::activate_up(float* up, int n) const { sr::activate_up(config_, up, n); }

void Decoder::rotate_head(const Norm& norm, const Rope& rope, bool rotate, const float* table, float* head) const {
  if (norm) norm_row(norm, head, config_.head_dim, head);
  if (rotate) rope.apply(table, head);
}

int Decoder::first_key(int layer, int pos) const {
  const int window = config_.window[size_t(layer)];
  return window ? std::max(0, pos - window + 1) : 0;
}

// Scale, soft cap and check of logits[begin, end).
void Decoder::finish_logits(float* logits, int begin, int end) {
  const float scale = config_.logit_scale, cap = config_.logit_softcap;
  if (scale != 1) {
    for (int i = begin; i < end; i++) logits[i] *= scale;
  }
  if (cap > 0) {
    for (int i = begin; i < end; i++) logits[i] = cap * std::tanh(logits[i] / cap);
  }
  uint32_t bad = 0;  // an exponent of all ones is NaN or infinity
  for (int i = begin; i < end; i++) {
    uint32_t bits;
    std::memcpy(&bits, logits + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  if (bad) not_finite_.store(true, std::memory_order_relaxed);
}

}  // namespace sr
