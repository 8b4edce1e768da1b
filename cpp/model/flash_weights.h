// The weights of a decoder under a memory budget: which part of every matrix is resident, the stream that brings the
// rest, and rows of an embedding that is not in memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "flash/read_queue.h"
#include "flash/residency.h"
#include "flash/weight_stream.h"
#include "model/weights.h"

namespace sr {

class PackedModel;

// Bytes done of bytes to do; true: stop.
using LoadProgress = std::function<bool(size_t done, size_t total)>;

class FlashWeights {
 public:
  // Says what would stay with `room` bytes for weights and ring. Looks at sizes only.
  static ResidencyPlan plan(const DecoderWeights& w, size_t room);
  // The least room (to a megabyte) at which all but FFNs stays.
  static size_t room_without_ffn(const DecoderWeights& w);

  // Cuts the matrices of *w as planned and reads what stays into the room of the packed file, which must be one that is
  // read piece by piece. Throws Error(runtime) on a failed read, Error(cancelled) when progress says so.
  FlashWeights(const PackedModel& model, DecoderWeights* w, const ResidencyPlan& plan, int threads,
               std::shared_ptr<ReadQueue> queue, const LoadProgress& progress);

  // A pass over the layers; see WeightStream. Without streamed weights all of it is free.
  void begin_pass();
  bool await(int unit, const std::function<bool()>* should_stop) { return stream_->await(unit, should_stop); }
  void done(int unit) { stream_->done(unit); }
  bool failed() const { return stream_ && stream_->failed(); }
  // Why the pass failed, the file having been changed meanwhile included; else the empty text.
  std::string end_pass();

  // Embedding rows of n tokens to out [n, cols], some of which must be read. Returns why that failed, "cancelled" when
  // should_stop said so, or the empty text. False from holds_rows: all of them are in memory.
  bool holds_all_rows() const { return resident_rows_ == embedding_.rows; }
  std::string fetch_rows(const int32_t* tokens, int n, const std::function<bool()>& should_stop, float* out);

  const ResidencyPlan& plan() const { return plan_; }
  size_t ring_bytes() const { return stream_ ? stream_->ring_bytes() : 0; }
  double load_bytes_per_second() const { return load_rate_; }
  StreamStats stream_stats() const { return stream_ ? stream_->stats() : StreamStats(); }
  ReadStats read_stats() const { return queue_->stats(); }

 private:
  void measure_rate(int units, int threads, const LoadProgress& progress);
  std::string read(uint64_t offset, size_t bytes, uint8_t* to, const std::function<bool()>& should_stop);

  std::shared_ptr<ReadQueue> queue_;
  ResidencyPlan plan_;
  std::unique_ptr<WeightStream> stream_;
  double load_rate_ = 0;
  // The embedding as one matrix, where it would lie if all of the file were in memory.
  Linear embedding_;
  const uint8_t* file_ = nullptr;
  int resident_rows_ = 0;
  std::shared_ptr<AlignedBuffer<uint8_t>> panel_;  // one panel of the embedding, whole blocks of the file
};

}  // namespace sr
