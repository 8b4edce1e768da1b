// The rows that say which neurons a token needs, where the activation gives zeros or thresholds choose by it: gate
// rows, or up rows where there is no gate. All are needed for every token: as many as fit stay, the others are
// streamed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "flash/weight_stream.h"
#include "model/flash_weights.h"
#include "model/weights.h"

namespace sr {

class GateRows {
 public:
  // w: all layers alike and by neuron, not cut yet. Looks at places only.
  GateRows(const PackedModel& model, const DecoderWeights& w);

  // Empty, or why they cannot be read alone, in words that follow "because".
  std::string refusal() const;
  // Blocks of 64 neurons, of all layers; bytes that the GateRows take when so many of them stay.
  int64_t all_blocks() const { return int64_t(offsets_.size()) * (form_.neurons / kNeuronBlock); }
  size_t bytes(int64_t blocks) const;
  size_t streamed_bytes(int64_t blocks) const { return size_t(all_blocks() - blocks) * block_bytes_; }

  // Reads what stays. Throws Error(runtime) on a failed read, Error(cancelled) when progress says so.
  void open(int64_t blocks, int threads, std::shared_ptr<ReadQueue> queue, const LoadProgress& progress);
  size_t resident_bytes() const { return size_t(blocks_) * block_bytes_; }
  size_t streamed_bytes() const { return streamed_bytes(blocks_); }

  // A layer's neurons in the order of use: tiles of 64, and the rows of each slice as those of a matrix that begins
  // with neuron 0 and is not gated.
  const std::vector<Slice>& slices(int layer) const { return layers_[size_t(layer)].slices; }
  const NeuronMatrix& rows(int layer, size_t slice) const { return layers_[size_t(layer)].places[slice]; }

  // A token; see WeightStream. Without streamed rows all of it is free.
  void begin_pass() {
    if (stream_) stream_->begin_pass();
  }
  bool await(const Slice& s, const std::function<bool()>* should_stop) {
    return s.unit < 0 || stream_->await(s.unit, should_stop);
  }
  void done(const Slice& s) {
    if (s.unit >= 0) stream_->done(s.unit);
  }
  bool failed() const { return stream_ && stream_->failed(); }
  std::string end_pass();
  StreamStats stats() const { return stream_ ? stream_->stats() : StreamStats(); }

 private:
  struct Layer {
    std::vector<Slice> slices;
    std::vector<NeuronMatrix> places;
  };
  int resident_of(int layer) const;  // blocks

  NeuronMatrix form_;              // not gated
  size_t block_bytes_ = 0;         // the rows of 64 neurons
  size_t stride_ = 0;              // from one block of the file to the next
  std::vector<uint64_t> offsets_;  // of the file, by layer
  int64_t blocks_ = 0;             // that stay
  std::shared_ptr<AlignedBuffer<uint8_t>> memory_;
  std::vector<Layer> layers_;
  std::shared_ptr<ReadQueue> queue_;
  std::unique_ptr<WeightStream> stream_;
};

}  // namespace sr
