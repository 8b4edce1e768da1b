// One decoder's forward pass: tokens in, keys and values appended to a cache, logits out. decode.cc runs one token,
// prefill.cc a block of tokens; both are built from the row operations of decoder.cc and give the same bits.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "model/decoder_config.h"
#include "model/flash_weights.h"
#include "model/kv_cache.h"
#include "model/neuron_store.h"
#include "model/rope.h"
#include "model/weights.h"
#include "sparse/neurons.h"
#include "sparse/plan.h"
#include "sparse/predictor.h"
#include "sparse/statistic.h"

namespace sr {

constexpr int kMaxBlock = 256;  // tokens of one prefill pass

enum class Logits : uint8_t {
  none,
  last,  // [padded_vocab]: of the last token
  all,   // [n, n_vocab]: of every token; for blocks of two tokens or more
};

// What a session wants skipped.
struct Skipping {
  const SparsityPlan* plan = nullptr;  // null: nothing but exact zeros
  bool mask_blocks = false;            // blocks of tokens are masked too, from plan->dense_tokens() on
  bool exact = true;                   // in decode, up rows and down columns of neurons that are exactly 0 are left out
  const NeuronSets* neurons = nullptr;  // in decode, only these neurons are computed
  bool mask_neurons = false;            // in blocks as well
  const PredictorSet* predictor = nullptr;  // goes before `neurons`
  bool mask_predicted = false;           // blocks are masked as well
  bool measure = false;                  // nothing is left out; of blocks, what would have been is counted
  NeuronStatistic* statistic = nullptr;  // of blocks
  SiteCounts* counts = nullptr;
};

// What a single layer's run can show: the inputs of the sites before masking, and up, which multiplies G to make Z.
constexpr int kTaps = kSites + 1;
constexpr int kTapUp = kSites;

// One layer alone, for calibration.
struct LayerRun {
  int layer;
  const float* x;     // [n, n_embd] in
  float* out;         // [n, n_embd]
  float* taps[kTaps];  // [n, width]; null: not wanted
};

class Decoder {
 public:
  Decoder(const PackedModel& model, int threads);
  ~Decoder();

  // Under a memory budget: what of the weights would stay with so many bytes for them, and making it so. Before this
  // the weights of a file that is read piece by piece must not be used. Throws as FlashWeights does.
  ResidencyPlan plan_residency(size_t room) const { return FlashWeights::plan(weights_, room); }
  void load_resident(const PackedModel& model, const ResidencyPlan& plan, std::shared_ptr<ReadQueue> queue,
                     const LoadProgress& progress);
  // From then on weights, what is read ahead, contexts in use and the blocks of a prompt share `room` bytes: before
  // every pass weights give way to what the pass needs, or come back. budget: what the process may take, as the system
  // counts.
  void share_room(size_t room, size_t budget);
  // The caller is about to take so many bytes of the room himself; weights have given way when this returns, and may
  // come back with a pass after set_aside(0). for_good: in addition, and they do not come back. Throws Error(runtime)
  // when the file cannot be read.
  void set_aside(size_t bytes, bool for_good);
  // Contexts have come to take so many bytes more, or less.
  void use_for_contexts(int64_t bytes) { contexts_used_.fetch_add(bytes); }
  int64_t used_for_contexts() const { return contexts_used_.load(); }
  // Bytes that a pass of n tokens takes beyond what decoding one does.
  size_t block_bytes(int n) const;
  const FlashWeights* flash() const { return flash_.get(); }
  // Before load_resident, where store_refusal is empty: a store of single neurons that lists, or their gates, will
  // choose. Throws as NeuronStore does.
  NeuronStore* make_store(const PackedModel& model, std::shared_ptr<ByteSource> source, bool by_gate);
  void drop_store();
  // After load_resident. gate_blocks: of 64 neurons, that stay, where there are gates.
  // `more` slots are there while a token leaves memory for them.
  void open_store(int slots, int more, int64_t gate_blocks, int readers, size_t unit, const LoadProgress& progress);
  const NeuronStore* store() const { return store_.get(); }
  std::string store_refusal() const { return NeuronStore::refusal(weights_); }
  // Room at which everything but the FFNs stays in memory.
  size_t room_without_ffn() const { return FlashWeights::room_without_ffn(weights_); }
  // Bytes that a session of n_ctx positions takes, its share of the decoder's memory included.
  size_t context_bytes(int n_ctx) const;

  const DecoderConfig& config() const { return config_; }
  int threads() const { return pool_.size(); }
  size_t bytes_per_token() const { return weights_.bytes_per_token; }
  // Positions that the model can encode, 0 = no limit.
  int position_limit() const { return weights_.n_positions; }
  // Floats that Logits::last needs.
  int padded_vocab() const { return weights_.head().padded_rows(); }

  // Runs tokens[0..n) (1 <= n <= kMaxBlock, ids in range) at positions pos, pos + 1 ... of the cache, which must hold
  // all positions before. should_stop is asked by the calling thread once a layer; when it says true, the pass is given
  // up and false returned: what the cache holds from pos on is then undefined. Sessions may call from several threads;
  // their passes take turns. Throws Error(runtime) when the logits are not finite.
  bool forward(const int32_t* tokens, int n, int pos, KvCache* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping = {});
  // The residual stream before the first layer, [n, n_embd].
  void embed(const int32_t* tokens, int n, int pos, float* out);
  // n <= kMaxBlock rows through one layer, at positions pos, pos + 1 ...; earlier positions must have been run before.
  void run_layer(const LayerRun& run, int n, int pos, KvCache* cache, const Skipping& skipping);
  int site_width(Site site) const;
  // The density above which products of a site run dense where a plan says nothing; the smallest of all layers.
  float break_even(Site site) const;
  // Of rows of neurons, sites N and G, as it was measured.
  void set_break_even(Site site, float value) { rows_break_even_[site == Site::G] = value; }
  // Why a site cannot work in this layer, to follow "site X of layer N"; empty where it can.
  std::string site_refusal(int layer, Site site) const;

 private:
  struct Thread;
  struct Block;
  struct Prediction;
  // What one pass works on.
  struct Pass {
    const int32_t* tokens;
    int n, pos;
    KvCache* cache;
    Logits which;
    float* logits;
    const std::function<bool()>* should_stop;
    Skipping skipping;
    const LayerRun* one = nullptr;  // a single layer instead of all
    bool stored = false;            // FFNs are computed from the store of single neurons
  };

  // Neurons of one thread: [begin, end), multiples of 64; where a list says which of them are computed, its positions
  // [first, last).
  struct NeuronShare {
    int begin, end;
    int first, last;
    const int32_t* list;  // null: all neurons
    bool more = false;    // z of the others stands already
  };

  bool run_pass(Pass pass);
  // Shares the room anew where this pass needs it; returns as FlashWeights::resize does.
  std::string make_room(const Pass& pass);
  void give_back_block();
  size_t room_taken() const;  // of the shared room, by all that is not weights
  std::string fit_room(bool may_grow, const std::function<bool()>& should_stop);
  bool lend_to_store(const std::function<bool()>& should_stop);
  bool fetches_rows() const { return flash_ && !flash_->holds_all_rows(); }
  // Calls fn(first tile, last) for this thread's tiles of a matrix, as soon as each slice of it is in memory. What is
  // left out after a failed read makes the pass fail.
  template <class Fn>
  void for_share(const Linear& w, int tid, const Pass& pass, Fn fn) {
    if (w.slices.empty()) return fn(w.share[size_t(tid)], w.share[size_t(tid) + 1]);
    for_slices(w.slices, tid, pass, [&](const Slice& s) { fn(s.share[size_t(tid)], s.share[size_t(tid) + 1]); });
  }
  template <class Fn>
  void for_slices(const std::vector<Slice>& slices, int tid, const Pass& pass, Fn fn) {
    for (const Slice& s : slices) {
      if (await(s, tid, pass)) fn(s);
      if (s.unit >= 0) flash_->done(s.unit);
    }
  }
  bool await(const Slice& s, int tid, const Pass& pass) {
    return s.unit < 0 || flash_->await(s.unit, tid == 0 ? pass.should_stop : nullptr);
  }
  bool gives_up(const Pass& pass) {
    return (*pass.should_stop)() || (pass.stored ? store_->failed() : flash_ && flash_->failed());
  }

  void decode(int tid, const Pass& pass);
  // The store, where a pass works from it (stored.cc): what a layer needs is asked for, awaited, and multiplied.
  bool works_from_store(const Pass& pass) const;
  bool chooses_by_gate(const Pass& pass) const;
  // What was known before the layer began; what its predictor has said, or nothing yet.
  enum class Ask : uint8_t { known, predicted };
  void request_neurons(const Pass& pass, int layer, Ask ask);
  bool await_neurons(int tid, const Pass& pass, int layer);
  // rows() of the layer's weights wherever they are; slots_ from `room` on is this thread's.
  void multiply_rows(const Pass& pass, int layer, int tid, const int32_t* ids, int begin, int end, float* gate,
                     float* up, int room);
  void decode_stored(int tid, const Pass& pass, int layer);
  void decode_by_gate(int tid, const Pass& pass, int layer);
  void multiply_columns(int tid, int layer, Input z);
  void decode_panels(int tid, const Pass& pass, int layer);
  void decode_neurons(int tid, const Pass& pass, int layer);
  void decode_neurons(int tid, const Pass& pass, int layer, NeuronShare share);
  // z of neurons [begin, end) is there: what down multiplies is made of it.
  void finish_neurons(const Pass& pass, int layer, int begin, int end);
  NeuronShare neuron_share(int tid, const Pass& pass, int layer, int from, int to) const;
  // The set of neurons that was fixed for a layer, null: all.
  const NeuronSet* chosen(const Pass& pass, int layer, bool decode) const;
  void decode_attention(Thread& t, const Pass& pass, int layer, const float* qkv);
  void gather_attention(int tid, Thread& t, int layer, int pos);
  void prefill(int tid, const Pass& pass);
  void prefill_attention(Thread& t, const Pass& pass, int layer, int item, int row_begin);
  void prefill_neurons(Thread& t, const Pass& pass, int layer, int unit, int row_begin, int row_end);

  // Predictors (predict.cc).
  void make_prediction_buffers(const Pass& pass);
  bool predicting(const Pass& pass, int pos, bool decode) const;
  const LowRank* neuron_predictor(const Pass& pass, int layer, int pos, bool decode) const;
  const LowRank* head_predictor(const Pass& pass, int layer, int pos, bool decode) const;
  void predict_hidden(int tid, const Pass& pass, int layer);
  void predict_scores(int tid, const Pass& pass, int layer);
  void predict_block(Thread& t, const Pass& pass, int layer, int begin, int end);
  // Flags of what a token computes, null: everything.
  const uint8_t* heads_kept(const Pass& pass, int layer, int row, bool decode) const;  // [n_heads]
  const uint8_t* neurons_kept(const Pass& pass, int layer, int row) const;             // [n_ff], of a block's row
  void mask_heads(const Pass& pass, int layer, int row, bool count, float* attention) const;

  // Every pass takes a layer's weights from here, once before its attention and once before its FFN.
  const LayerWeights& attention_weights(int layer) const { return weights_.layers[size_t(layer)]; }
  const LayerWeights& ffn_weights(int layer) const { return weights_.layers[size_t(layer)]; }

  // Rows: the operations on one token's vector.
  void embed_row(int32_t token, int pos, float* x) const;
  // Row i of the pass.
  void embed_row(const Pass& pass, int i, float* x) const;
  void finish_embedding(int pos, float* x) const;
  void add_branch(const float* branch, const Norm& post_norm, float* scratch, float* x) const;
  void norm_row(const Norm& norm, const float* x, int n, float* out) const;
  void prepare_row(const Norm& norm, const float* x, const Linear& w, InputBuffer* in, int row) const;
  void prepare_ffn(const LayerWeights& w, const float* branch, float* scratch, float* x, InputBuffer* in,
                   int row) const;
  void activate(float* gate, float* up, int n, float* z) const;
  void activate_up(float* up, int n) const;
  void measure(const Pass& pass, const NeuronRows& w, float* gate, float* up, const uint8_t* flags, float* z) const;
  void rotate_head(const Norm& norm, const Rope& rope, bool rotate, const float* table, float* head) const;
  // Thresholds of a site for the token at pos, or null. Decode: also those of exact zeros.
  Thresholds threshold_for(const Pass& pass, int layer, Site site, int pos, bool decode) const;
  const Linear& matrix_of(int layer, Site site) const;
  bool site_quantised(int layer, Site site) const;
  // Whether neurons that are exactly 0 are looked for in decode.
  bool skips_zeros(const Pass& pass) const { return pass.skipping.exact && true_zeros_; }
  // Whether something is left out of blocks of tokens.
  static bool masks_blocks(const Pass& pass) {
    const Skipping& s = pass.skipping;
    return (s.plan && s.mask_blocks) || (s.neurons && s.mask_neurons) || (s.predictor && s.mask_predicted);
  }
  // Bytes of a layer's attention or FFN that a token which may skip some of them would read without skipping.
  void count_held(const Pass& pass, int pos, bool decode, size_t bytes) const;
  void count_kept(const Pass& pass, int layer, Site site, int kept) const;
  // Share of columns or neurons above which leaving out the others does not pay.
  float break_even(const Pass& pass, int layer, Site site) const;
  float break_even(int layer, Site site) const;  // where the pass's thresholds bring none
  // Of `offered` neurons `kept` are computed; rows: rows of each of the others that are not read.
  void count_neurons(const Pass& pass, Site site, const NeuronRows& w, int kept, int offered, int rows) const;
  // What decoding would read of a layer's neurons for row `row` of a block whose gates are known.
  void count_row_neurons(const Pass& pass, int layer, int row) const;
  // What w multiplies in decode: `in`, its columns listed where fewer are kept than the break-even.
  Input masked(const Pass& pass, int tid, int layer, Site site, InputBuffer* in, bool selected = false) const;
  void mask_row(const Pass& pass, int layer, Site site, int row, InputBuffer* in) const;
  void tap(const Pass& pass, Site site, int row, const InputBuffer& in) const;
  void tap_neurons(const Pass& pass, int tap, int row, int begin, int count, const float* values) const;
  void finish_logits(float* logits, int begin, int end);
  int first_key(int layer, int pos) const;
  const Rope& rope_of(int layer) const { return config_.window[size_t(layer)] ? rope_local_ : rope_; }
  // What fills the tables: by the room of a cache and not by what it holds, so that all its positions agree.
  const Rope& rope_in(const KvCache& cache, bool local) const {
    const bool wide = weights_.rope_factors_long && cache.n_ctx() > config_.rope_long_context;
    return wide ? (local ? rope_long_local_ : rope_long_) : (local ? rope_local_ : rope_);
  }

  DecoderConfig config_;
  DecoderWeights weights_;
  Rope rope_, rope_local_, rope_long_, rope_long_local_;
  ThreadPool pool_;
  FairMutex turn_;  // the pool and everything below belong to the pass that holds it

  std::unique_ptr<FlashWeights> flash_;  // null: all weights are in memory
  std::unique_ptr<NeuronStore> store_;   // null: no single neurons are read
  // [n_ff] of the store: a prediction in one list; of each thread's share, slots and what is there before what is not.
  AlignedBuffer<int32_t> wanted_, slots_, there_first_;
  struct ByGate;
  std::vector<std::unique_ptr<ByGate>> by_gate_;  // [threads] of a store with gates
  AlignedBuffer<uint32_t> place_;          // [n_ff] of the columns that z selects
  AlignedBuffer<float> fetched_rows_;    // [kMaxBlock, n_embd] embedding rows of the pass; pages untouched without need
  size_t shared_room_ = 0, budget_ = 0;  // 0: what is resident stays so
  size_t room_seen_ = SIZE_MAX;          // for weights, when it was last looked at
  int block_rows_ = 0;                   // whose memory is in use
  size_t aside_ = 0;
  int passes_unmeasured_ = 0;
  std::atomic<int64_t> contexts_used_{0};

  std::vector<std::unique_ptr<Thread>> thread_;
  std::unique_ptr<Block> block_;
  std::unique_ptr<Prediction> prediction_;  // once there has been a predictor
  // Decode's vectors that threads share.
  AlignedBuffer<float> qkv_, branch_o_, branch_down_, attention_, gate_up_;
  AlignedBuffer<float> rope_table_, rope_table_local_;
  InputBuffer z_;
  // Partial attention sums: [chunks, n_heads, head_dim] and [chunks, n_heads] twice.
  int partial_chunks_ = 0;
  AlignedBuffer<float> partial_out_, partial_max_, partial_sum_;
  WorkCounter counter_[2];
  AlignedBuffer<int32_t> survivors_;   // [n_ff] neurons of each thread's share whose up rows are wanted
  std::vector<float> break_even_;      // [n_layers, A O M Z] by shape
  std::atomic<float> rows_break_even_[2] = {{-1.0f}, {-1.0f}};  // of N and of G; below 0: by the rows' length
  bool true_zeros_ = false;            // the activation gives exact zeros
  static constexpr int32_t no_neurons_[1] = {0};  // an empty list is not a missing one
  bool leave_ = false;
  std::atomic<bool> not_finite_{false};
};

}  // namespace sr
