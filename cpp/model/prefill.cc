// A block of tokens. Phases are separated by barriers; inside a phase threads take rows by fixed ranges and tiles or
// query blocks from a counter. The last layer computes only what the logits need.
#include <algorithm>
#include <cstring>

#include "model/attention.h"
#include "model/decoder.h"
#include "model/decoder_buffers.h"

namespace sr {
namespace {

// Into how many row ranges a tile's work is cut, so that few tiles still divide well among the threads: of nine tiles
// on two threads one thread does five. Each range unpacks the tile anew, about a twentieth of its work. 256 tokens of a
// 135M model on two threads: 3% faster.
int row_pieces(int tiles, int threads, int rows) {
  int best = 1;
  double least = 0;
  for (int pieces = 1; pieces <= 4 && (pieces == 1 || rows / pieces >= 32); pieces++) {
    const int rounds = (tiles * pieces + threads - 1) / threads;
    const double cost = double(rounds) / pieces * (1 + 0.05 * (pieces - 1));
    if (pieces == 1 || cost < least) {
      least = cost;
      best = pieces;
    }
  }
  return best;
}

}  // namespace

void Decoder::prefill(int tid, const Pass& pass) {
  Thread& t = *thread_[size_t(tid)];
  Block& b = *block_;
  const DecoderConfig& c = config_;
  const int n = pass.n, threads = pool_.size(), embd = c.n_embd;
  int phase = 0;

  // Rows [begin, end) of this thread, of the rows [from, n).
  const auto for_rows = [&](int from, auto&& fn) {
    const int begin = from + (n - from) * tid / threads, end = from + (n - from) * (tid + 1) / threads;
    for (int i = begin; i < end; i++) fn(i);
  };
  // Items [0, count), whoever comes first. Two counters in turn: the one that is reset is used by nobody in this phase.
  const auto for_items = [&](int count, auto&& fn) {
    WorkCounter& counter = counter_[phase & 1];
    if (tid == 0) counter_[(phase + 1) & 1].reset();
    for (int item = counter.take(); item < count; item = counter.take()) fn(item);
    phase++;
  };
  // Items are (unit of `step` tiles, range of the rows [from, n)), slice after slice where not all is in memory.
  const auto for_tiles = [&](const std::vector<Slice>& slices, int tiles, int step, int from, auto&& fn) {
    const auto some = [&](int begin, int end, bool there) {
      const int units = (end - begin) / step, first = begin / step, rows = n - from;
      const int pieces = row_pieces(units, threads, rows);
      for_items(units * pieces, [&](int item) {
        const int piece = item % pieces;
        if (there) fn(first + item / pieces, from + rows * piece / pieces, from + rows * (piece + 1) / pieces);
      });
    };
    if (slices.empty()) return some(0, tiles, true);
    for (const Slice& s : slices) {
      if (&s != slices.data()) pool_.barrier();  // between two rounds of items
      some(s.tile_begin, s.tile_end, await(s, tid, pass));
      if (s.unit >= 0) flash_->done(s.unit);
    }
  };
  const auto multiply = [&](const Linear& w, const InputBuffer& in, float* y, size_t ldy, int from) {
    for_tiles(w.slices, w.tiles(), 1, from, [&](int tile, int begin, int end) {
      gemm(w, in.input(begin), end - begin, tile, tile + 1, y + size_t(begin) * ldy, ldy, t.gemm_scratch.data());
    });
  };
  const auto x_row = [&](int i) { return b.x.data() + size_t(i) * embd; };
  const auto branch_row = [&](AlignedBuffer<float>& branch, int i) { return branch.data() + size_t(i) * b.ld_branch; };

  for_rows(0, [&](int i) {
    if (pass.one) std::copy_n(pass.one->x + size_t(i) * embd, embd, x_row(i));
    else embed_row(pass, i, x_row(i));
    rope_in(*pass.cache, false).fill(pass.pos + i, b.rope_table.data() + size_t(i) * c.rope_dims);
    rope_in(*pass.cache, true).fill(pass.pos + i, b.rope_table_local.data() + size_t(i) * c.rope_dims);
  });
  int from = 0;  // rows before it are done: their keys and values are all that is still wanted
  const int first_layer = pass.one ? pass.one->layer : 0, last_layer = pass.one ? first_layer + 1 : c.n_layers;
  for (int l = first_layer; l < last_layer; l++) {
    const LayerWeights& w = attention_weights(l);
    const Rope& rope = rope_of(l);
    const float* tables = (&rope == &rope_ ? b.rope_table : b.rope_table_local).data();
    const bool rotate = c.rope_style != RopeStyle::none && c.rope_layers[size_t(l)];
    for_rows(0, [&](int i) {
      count_held(pass, pass.pos + i, false, w.attn_qkv.bytes);
      prepare_row(w.attn_norm, x_row(i), w.attn_qkv, &b.in, i);
      mask_row(pass, l, Site::A, i, &b.in);
    });
    predict_block(t, pass, l, n * tid / threads, n * (tid + 1) / threads);
    pool_.barrier();
    multiply(w.attn_qkv, b.in, b.qkv.data(), b.ld_qkv, 0);
    pool_.barrier();

    for_rows(0, [&](int i) {
      float* row = b.qkv.data() + size_t(i) * b.ld_qkv;
      const float* table = tables + size_t(i) * c.rope_dims;
      const bool full = c.qk_norm == QkNorm::full;
      if (full) {
        float *q = row + w.head_at[0], *k = row + w.head_at[size_t(c.n_heads)];
        norm_row(w.q_norm, q, c.n_attn(), q);
        norm_row(w.k_norm, k, c.n_kv(), k);
      }
      const Norm q_norm = full ? Norm() : w.q_norm, k_norm = full ? Norm() : w.k_norm;
      for (int h = 0; h < c.n_heads; h++) rotate_head(q_norm, rope, rotate, table, row + w.head_at[size_t(h)]);
      for (int h = 0; h < c.n_kv_heads; h++) {
        float* k = row + w.head_at[size_t(c.n_heads + h)];
        rotate_head(k_norm, rope, rotate, table, k);
        pass.cache->write(l, h, pass.pos + i, k, row + w.head_at[size_t(c.n_heads + c.n_kv_heads + h)], t.half.data());
      }
    });
    pool_.barrier();

    if (l + 1 == c.n_layers) {
      // A statistic wants every token's neurons.
      if (pass.which == Logits::none && !pass.skipping.statistic) return;
      if (pass.which == Logits::last && !pass.skipping.statistic) from = n - 1;
    }
    const int blocks = (n - from + kMaxQueries - 1) / kMaxQueries;
    for_items(blocks * c.n_heads, [&](int item) { prefill_attention(t, pass, l, item, from); });
    pool_.barrier();
    if (w.attn_o.quantised || w.attn_sub_norm || pass.one || pass.skipping.predictor) {
      for_rows(from, [&](int i) {
        mask_heads(pass, l, i, true, b.att.row(i));
        norm_row(w.attn_sub_norm, b.att.row(i), c.n_attn(), b.att.row(i));
        if (w.attn_o.quantised) b.att.quantise(i);
        mask_row(pass, l, Site::O, i, &b.att);
      });
      pool_.barrier();
    }
    multiply(w.attn_o, b.att, b.branch_o.data(), b.ld_branch, from);
    pool_.barrier();

    const LayerWeights& f = ffn_weights(l);
    for_rows(from, [&](int i) {
      count_held(pass, pass.pos + i, false, w.attn_o.bytes + f.ffn_bytes());
      b.neurons[i].in_set = b.neurons[i].kept = 0;
      prepare_ffn(f, branch_row(b.branch_o, i), t.scratch.data(), x_row(i), &b.in, i);
      mask_row(pass, l, Site::M, i, &b.in);
    });
    pool_.barrier();
    const int step = f.ffn_rows || !c.ffn_gated ? 1 : 2;
    for_tiles(f.ffn_rows ? f.ffn_rows.slices : f.ffn_in.slices, c.n_ff / kTileRows * step, step, from,
              [&](int unit, int begin, int end) { prefill_neurons(t, pass, l, unit, begin, end); });
    pool_.barrier();
    if (NeuronStatistic* statistic = pass.one ? nullptr : pass.skipping.statistic) {
      for_rows(0, [&](int i) { statistic->look(i, b.z.row(i)); });
      pool_.barrier();
      statistic->add(l, n, b.z.row(0), b.z.input().ldx, c.n_ff * tid / threads, c.n_ff * (tid + 1) / threads);
      pool_.barrier();
    }
    if (f.ffn_sub_norm || pass.one || masks_blocks(pass)) {
      for_rows(from, [&](int i) {
        if (f.ffn_sub_norm) {
          norm_row(f.ffn_sub_norm, b.z.row(i), c.n_ff, b.z.row(i));
          if (f.ffn_down.quantised) b.z.quantise(i);
        }
        count_row_neurons(pass, l, i);
        mask_row(pass, l, Site::Z, i, &b.z);
      });
      pool_.barrier();
    }
    multiply(f.ffn_down, b.z, b.branch_down.data(), b.ld_branch, from);
    if (tid == 0) leave_ = gives_up(pass);
    pool_.barrier();

    if (leave_) return;
    for_rows(from, [&](int i) {
      add_branch(branch_row(b.branch_down, i), f.post_ffn_norm, t.scratch.data(), x_row(i));
    });
    // The same thread goes on with the same rows, unless fewer rows are left (or the last one of all): another may have
    // them.
    if (from > 0 || l + 1 == c.n_layers) pool_.barrier();
  }

  if (pass.one) {
    for_rows(0, [&](int i) { std::copy_n(x_row(i), embd, pass.one->out + size_t(i) * embd); });
    return;
  }
  if (pass.which == Logits::none) return;
  const Linear& head = weights_.head();
  if (pass.which == Logits::last) {
    prepare_row(weights_.output_norm, x_row(n - 1), head, &t.in, 0);
    for_share(head, tid, pass, [&](int begin, int end) {
      gemv(head, t.in.input(), begin, end, pass.logits);
      finish_logits(pass.logits, begin * kTileRows, std::min(end * kTileRows, c.n_vocab));
    });
    return;
  }
  for_rows(0, [&](int i) { prepare_row(weights_.output_norm, x_row(i), head, &b.in, i); });
  pool_.barrier();
  for_tiles(head.slices, head.tiles(), 1, 0, [&](int tile, int begin, int end) {
    // Through local memory: the caller's rows are not padded to whole tiles.
    const int row = tile * kTileRows, width = std::min(kTileRows, c.n_vocab - row);
    gemm(head, b.in.input(begin), end - begin, tile, tile + 1, indexed_from(t.tile.data(), size_t(row)), kTileRows,
         t.gemm_scratch.data());
    for (int i = begin; i < end; i++) {
      float* out = pass.logits + size_t(i) * c.n_vocab + row;
      std::memcpy(out, t.tile.data() + size_t(i - begin) * kTileRows, size_t(width) * sizeof(float));
      finish_logits(out, 0, width);
    }
  });
}

// Item: one head's block of up to kMaxQueries queries, against its keys chunk by chunk.
void Decoder::prefill_attention(Thread& t, const Pass& pass, int layer, int item, int row_begin) {
  Block& b = *block_;
  const DecoderConfig& c = config_;
  const int hd = c.head_dim, head = item % c.n_heads, kv_head = head / c.heads_per_kv();
  const int begin = row_begin + item / c.n_heads * kMaxQueries, count = std::min(kMaxQueries, pass.n - begin);
  const int q_at = attention_weights(layer).head_at[size_t(head)];
  float row_max[kMaxQueries], row_sum[kMaxQueries];
  int firsts[kMaxQueries], lasts[kMaxQueries];
  bool empty[kMaxQueries];
  AttentionSums sums[kMaxQueries];
  float* partial = t.sums.data() + size_t(kMaxQueries) * hd;
  for (int i = 0; i < count; i++) {
    sums[i] = {t.sums.data() + size_t(i) * hd, 0, 0};
    empty[i] = true;
  }

  const int first_pos = pass.pos + begin, last_pos = first_pos + count - 1;
  for (int chunk = first_key(layer, first_pos) / kAttentionChunk; chunk <= last_pos / kAttentionChunk; chunk++) {
    const int base = chunk * kAttentionChunk;
    for (int i = 0; i < count; i++) {
      const int pos = first_pos + i;
      firsts[i] = std::min(std::max(first_key(layer, pos) - base, 0), kAttentionChunk);
      lasts[i] = std::min(std::max(pos + 1 - base, 0), kAttentionChunk);
    }
    AttendArgs a;
    a.q = b.qkv.data() + size_t(begin) * b.ld_qkv + q_at;
    a.n_q = count;
    a.q_stride = b.ld_qkv;
    a.head_dim = hd;
    a.k = pass.cache->k(layer, kv_head, chunk);
    a.v = pass.cache->v(layer, kv_head, chunk);
    a.n_keys = std::min(last_pos + 1 - base, kAttentionChunk);
    a.first = firsts;
    a.last = lasts;
    a.scale = c.attn_scale;
    a.softcap = c.attn_softcap;
    a.out = partial;
    a.out_stride = size_t(hd);
    a.row_max = row_max;
    a.row_sum = row_sum;
    a.scratch = t.attend_scratch.data();
    kernels().attend(a);
    for (int i = 0; i < count; i++) {
      if (firsts[i] >= lasts[i]) continue;
      merge_chunk(&sums[i], empty[i], partial + size_t(i) * hd, row_max[i], row_sum[i], hd);
      empty[i] = false;
    }
  }
  for (int i = 0; i < count; i++) finish_attention(sums[i], hd, b.att.row(begin + i) + size_t(head) * hd);
}

}  // namespace sr
