// One token. Every thread computes the cheap vector operations for itself and a fixed share of each matrix's tiles, so
// that a layer needs five barriers: after q/k/v, after attention, after o, after gate and up, after down.
#include <algorithm>

#include "model/attention.h"
#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {
namespace {

// Up to so many chunks each thread merges all heads itself; more are merged head by head, at the price of a barrier.
constexpr int kMergeAlone = 8;

}  // namespace

void Decoder::decode(int tid, const Pass& pass) {
  Thread& t = *thread_[size_t(tid)];
  const DecoderConfig& c = config_;
  const auto share = [&](const Linear& w, const Input& in, float* y) {
    if (w.in_partials()) return gemv_partial(w, in, w.unit_share[size_t(tid)], w.unit_share[size_t(tid) + 1], y);
    for_share(w, tid, pass, [&](int begin, int end) { gemv(w, in, begin, end, y); });
  };
  // What all threads have multiplied.
  const auto whole = [&](const Linear& w, const float* y) -> const float* {
    if (!w.in_partials()) return y;
    add_partials(w, y, t.sum.data());
    return t.sum.data();
  };

  embed_row(pass, 0, t.x.data());
  if (tid == 0) {
    rope_in(*pass.cache, false).fill(pass.pos, rope_table_.data());
    rope_in(*pass.cache, true).fill(pass.pos, rope_table_local_.data());
  }
  for (int l = 0; l < c.n_layers; l++) {
    const LayerWeights& w = attention_weights(l);
    if (l == 0 && tid == 0 && pass.stored) request_neurons(pass, 0, Ask::known);
    if (tid == 0) count_held(pass, pass.pos, true, w.attn_qkv.bytes + w.attn_o.bytes);
    prepare_row(w.attn_norm, t.x.data(), w.attn_qkv, &t.in, 0);
    share(w.attn_qkv, masked(pass, tid, l, Site::A, &t.in), qkv_.data());
    predict_hidden(tid, pass, l);
    pool_.barrier();

    predict_scores(tid, pass, l);
    decode_attention(t, pass, l, whole(w.attn_qkv, qkv_.data()));
    pool_.barrier();

    if (tid == 0) counter_[0].reset();
    if (l + 1 == c.n_layers && pass.which == Logits::none) break;
    if (tid == 0 && pass.stored) request_neurons(pass, l, Ask::predicted);
    gather_attention(tid, t, l, pass.pos);
    mask_heads(pass, l, 0, tid == 0, t.att.row(0));
    norm_row(w.attn_sub_norm, t.att.row(0), c.n_attn(), t.att.row(0));
    if (w.attn_o.quantised) t.att.quantise(0);
    share(w.attn_o, masked(pass, tid, l, Site::O, &t.att), branch_o_.data());
    pool_.barrier();

    const LayerWeights& f = ffn_weights(l);
    if (tid == 0) count_held(pass, pass.pos, true, f.ffn_bytes());
    prepare_ffn(f, whole(w.attn_o, branch_o_.data()), t.scratch.data(), t.x.data(), &t.in, 0);
    if (f.ffn_rows) decode_neurons(tid, pass, l);
    else decode_panels(tid, pass, l);
    pool_.barrier();

    if (f.ffn_sub_norm) {
      norm_row(f.ffn_sub_norm, z_.row(0), c.n_ff, t.z.row(0));
      if (f.ffn_down.quantised) t.z.quantise(0);
    }
    const Input z = f.ffn_sub_norm ? masked(pass, tid, l, Site::Z, &t.z) : masked(pass, tid, l, Site::Z, &z_, true);
    if (pass.stored) multiply_columns(tid, l, z);
    else share(f.ffn_down, z, branch_down_.data());
    if (tid == 0) leave_ = gives_up(pass);
    pool_.barrier();

    if (leave_) return;
    const float* down = pass.stored ? branch_down_.data() : whole(f.ffn_down, branch_down_.data());
    add_branch(down, f.post_ffn_norm, t.scratch.data(), t.x.data());
  }
  if (pass.which == Logits::none) return;

  const Linear& head = weights_.head();
  prepare_row(weights_.output_norm, t.x.data(), head, &t.in, 0);
  for_share(head, tid, pass, [&](int begin, int end) {
    gemv(head, t.in.input(), begin, end, pass.logits);
    finish_logits(pass.logits, begin * kTileRows, std::min(end * kTileRows, c.n_vocab));
  });
}

// Items are (chunk, key head), the last chunk last: it is the short one. Whoever takes a head's last chunk also stores
// the new key and value, which no other item reads.
void Decoder::decode_attention(Thread& t, const Pass& pass, int layer, const float* qkv) {
  const DecoderConfig& c = config_;
  const LayerWeights& w = attention_weights(layer);
  const Rope& rope = rope_of(layer);
  const float* table = (&rope == &rope_ ? rope_table_ : rope_table_local_).data();
  const bool rotate = c.rope_style != RopeStyle::none && c.rope_layers[size_t(layer)];
  const int group = c.heads_per_kv(), hd = c.head_dim;
  const int first = first_key(layer, pass.pos);
  const int chunk_begin = first / kAttentionChunk, chunk_end = pass.pos / kAttentionChunk + 1;
  const int items = (chunk_end - chunk_begin) * c.n_kv_heads;
  int firsts[kMaxQueries], lasts[kMaxQueries];
  const uint8_t* keep = heads_kept(pass, layer, 0, true);
  const bool full = c.qk_norm == QkNorm::full;
  if (full) {
    norm_row(w.q_norm, qkv + w.head_at[0], c.n_attn(), t.qk.data());
    norm_row(w.k_norm, qkv + w.head_at[size_t(c.n_heads)], c.n_kv(), t.qk.data() + c.n_attn());
  }
  // Head h of q, or of k counted on from there, normed and rotated.
  const auto make_head = [&](int h, const Norm& norm, float* out) {
    const float* from = full ? t.qk.data() + size_t(h) * hd : qkv + w.head_at[size_t(h)];
    std::copy(from, from + hd, out);
    rotate_head(full ? Norm() : norm, rope, rotate, table, out);
  };

  for (int item = counter_[0].take(); item < items; item = counter_[0].take()) {
    const int chunk = chunk_begin + item / c.n_kv_heads, kv_head = item % c.n_kv_heads;
    const int base = chunk * kAttentionChunk, last = std::min(pass.pos + 1 - base, kAttentionChunk);
    if (chunk + 1 == chunk_end) {
      const float* v = qkv + w.head_at[size_t(c.n_heads + c.n_kv_heads + kv_head)];
      make_head(c.n_heads + kv_head, w.k_norm, t.k.data());
      pass.cache->write(layer, kv_head, pass.pos, t.k.data(), v, t.half.data());
    }
    std::fill(firsts, firsts + kMaxQueries, std::max(first - base, 0));
    std::fill(lasts, lasts + kMaxQueries, last);
    // All queries of a key at once, unless there are dozens, or some of their heads are left out.
    for (int begin = 0; begin < group;) {
      const int head = kv_head * group + begin;
      if (keep && !keep[head]) {
        begin++;
        continue;
      }
      int count = 1;
      while (begin + count < group && count < kMaxQueries && (!keep || keep[head + count])) count++;
      for (int g = 0; g < count; g++) make_head(head + g, w.q_norm, t.q.data() + size_t(g) * hd);
      const size_t slot = size_t(chunk - chunk_begin) * c.n_heads + size_t(head);
      AttendArgs a;
      a.q = t.q.data();
      a.n_q = count;
      a.q_stride = size_t(hd);
      a.head_dim = hd;
      a.k = pass.cache->k(layer, kv_head, chunk);
      a.v = pass.cache->v(layer, kv_head, chunk);
      a.n_keys = last;
      a.first = firsts;
      a.last = lasts;
      a.scale = c.attn_scale;
      a.softcap = c.attn_softcap;
      a.out = partial_out_.data() + slot * hd;
      a.out_stride = size_t(hd);
      a.row_max = partial_max_.data() + slot;
      a.row_sum = partial_sum_.data() + slot;
      a.scratch = t.attend_scratch.data();
      kernels().attend(a);
      begin += count;
    }
  }
}

// Merges the chunks of all heads into this thread's input of attn_o.
void Decoder::gather_attention(int tid, Thread& t, int layer, int pos) {
  const DecoderConfig& c = config_;
  const int hd = c.head_dim;
  const int chunks = pos / kAttentionChunk - first_key(layer, pos) / kAttentionChunk + 1;
  const auto merge = [&](int head, float* out) {
    AttentionSums sums = {out, 0, 0};
    for (int chunk = 0; chunk < chunks; chunk++) {
      const size_t slot = size_t(chunk) * c.n_heads + size_t(head);
      merge_chunk(&sums, chunk == 0, partial_out_.data() + slot * hd, partial_max_[slot], partial_sum_[slot], hd);
    }
    finish_attention(sums, hd, out);
  };
  if (chunks <= kMergeAlone) {
    for (int h = 0; h < c.n_heads; h++) merge(h, t.att.row(0) + size_t(h) * hd);
    return;
  }
  const int threads = pool_.size();
  for (int h = c.n_heads * tid / threads; h < c.n_heads * (tid + 1) / threads; h++) {
    merge(h, attention_.data() + size_t(h) * hd);
  }
  pool_.barrier();
  std::copy(attention_.data(), attention_.data() + c.n_attn(), t.att.row(0));
}

}  // namespace sr
