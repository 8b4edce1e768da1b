// FFNs of which single neurons are in memory, for decoding under a memory budget where something says which neurons a
// token needs: their rows and columns in slots of a pool, multiplied there by the same kernels. Either a list says it
// beforehand, or the gates do: then gate rows are held and streamed apart, and slots hold what only neurons that are
// not 0 need.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "flash/neuron_pool.h"
#include "format/neuron_file.h"
#include "model/flash_weights.h"
#include "model/gate_rows.h"
#include "model/weights.h"

namespace sr {

class NeuronStore {
 public:
  // Why there can be none for these weights, in words that follow "because"; empty where there can.
  static std::string refusal(const DecoderWeights& w);
  // w: not cut yet. Throws Error(model) where the file is damaged or belongs to other weights.
  NeuronStore(const PackedModel& model, const DecoderWeights& w, std::shared_ptr<ByteSource> source, bool by_gate);

  // What chooses the neurons by their gates, null: lists do.
  GateRows* gates() { return gates_.get(); }
  const GateRows* gates() const { return gates_.get(); }
  // Bytes that n slots take without the gates, and the fewest slots.
  size_t bytes(int64_t slots) const;
  int least_slots() const { return NeuronPool::least_slots(shape_); }
  int64_t all_neurons() const { return int64_t(shape_.layers) * shape_.neurons; }

  // What a token that needs this share of the neurons costs, in bytes of long reads, if half of the slots hold some of
  // them.
  size_t token_cost(double share) const;

  // Makes the slots and fills them with the first records of every layer; where there are gates, after they were
  // opened. `more` slots take memory only while it is lent. Throws as FlashWeights does.
  void open(int slots, int more, int readers, size_t unit, const LoadProgress& progress);
  // Between tokens: this much memory may be taken beside the slots that are always there, until the next call.
  void lend(size_t bytes);
  bool enough_with(size_t lent) const { return limit_with(lent) >= least_slots(); }
  // Of what is lent; pages are huge where they can be, and where rows and columns end, one each is begun.
  static constexpr size_t kLendSpare = size_t(4) << 20;
  // Whether there are slots for a token.
  bool enough() const { return pool_->limit() >= least_slots(); }
  size_t slot_bytes() const { return (has_rows_ ? form_.record_bytes() : 0) + column_bytes_; }
  // What a slot takes that is not lent anything.
  size_t idle_slot_bytes() const { return NeuronPool::table_bytes(shape_, 1) - NeuronPool::table_bytes(shape_, 0); }

  // A token begins, and is over, whole or not. The end returns why it failed, or the empty text.
  void begin_token();
  std::string end_token();
  bool failed() const { return pool_->failed() || (gates_ && gates_->failed()); }  // or stopped

  NeuronPool& pool() { return *pool_; }
  const NeuronPool& pool() const { return *pool_; }
  ReadStats read_stats() const { return queue_->stats(); }
  double load_bytes_per_second() const { return load_rate_; }
  // gate[k] and up[k] of neuron ids[k] (of neuron k where ids is null), as rows() of neuron_rows.h; `slots` is room for
  // end - begin of them. All must have been requested and awaited.
  void rows(const NeuronRows& w, int layer, const InputBuffer& x, const int32_t* ids, int begin, int end, float* gate,
            float* up, int32_t* slots) const;
  // Where the columns that were selected of a vector of neurons lie, for slabs [begin, end): to place [slabs * 32].
  void places(int layer, const ActiveColumns& active, int begin, int end, uint32_t* place) const;
  // down, to be multiplied with selected columns and their places.
  const Linear& down(int layer) const { return down_[size_t(layer)]; }

 private:
  int limit_with(size_t lent) const;
  // What readers write to, and may hold on to.
  struct Memory {
    NeuronMatrix rows;  // of slots; without rows where slots hold columns only
    size_t row_bytes = 0, column_bytes = 0;
    bool has_rows = true;
    AlignedBuffer<uint8_t> of_rows, of_columns;
  };

  std::shared_ptr<ByteSource> source_;
  std::shared_ptr<NeuronFile> file_;
  NeuronPool::Shape shape_;
  NeuronMatrix form_;       // of gate and up in a slot
  bool has_rows_ = true;    // a slot has rows
  size_t column_bytes_ = 0;
  std::unique_ptr<GateRows> gates_;
  std::vector<Linear> down_;
  std::vector<AlignedBuffer<uint8_t>> heads_;
  std::shared_ptr<Memory> memory_;
  std::shared_ptr<ReadQueue> queue_;
  std::unique_ptr<NeuronPool> pool_;
  int base_ = 0;  // slots that are always there
  double load_rate_ = 0;
};

}  // namespace sr
