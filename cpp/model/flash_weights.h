// The weights of a decoder under a memory budget: which part of every matrix is resident, the stream that brings the
// rest, and rows of an embedding that is not in memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "flash/read_queue.h"
#include "flash/residency.h"
#include "flash/weight_stream.h"
#include "model/weights.h"

namespace sr {

class MappedFile;
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

  // Between passes: as much stays as this plan says. What leaves is given back before anything is read. Returns why
  // that failed, "cancelled" when should_stop said so, or the empty text; unless it is empty, no pass may run before a
  // call that is.
  std::string resize(const ResidencyPlan& plan, const std::function<bool()>& should_stop);
  bool usable() const { return usable_; }
  // Between passes that stream nothing: gives the ring's memory back. resize(), with plan() for one, must come before
  // the next pass that streams. False: should_stop said so, and nothing is changed.
  bool park(const std::function<bool()>& should_stop);
  bool parked() const { return parked_; }
  bool holds_all_but_ffn() const;

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

  // The part of the thread that runs the passes.
  const ResidencyPlan& plan() const { return plan_; }
  double load_bytes_per_second() const { return load_rate_; }

  // From any thread.
  struct Sizes {
    size_t resident = 0, streamed = 0, ring = 0;
  };
  Sizes sizes() const;
  StreamStats stream_stats() const;  // of all streams there have been
  ReadStats read_stats() const { return queue_->stats(); }
  const std::shared_ptr<ReadQueue>& queue() const { return queue_; }

 private:
  struct Range {
    size_t begin, end;  // of the file, whole blocks
  };
  using Waiting = std::function<bool(size_t done, size_t total)>;  // true: stop
  std::string arrange(const ResidencyPlan& plan, const Waiting& waiting);
  void end_stream();
  void measure_rate(const LoadProgress& progress);
  std::string read(uint64_t offset, size_t bytes, uint8_t* to, const std::function<bool()>& should_stop);

  const MappedFile& room_;
  DecoderWeights* weights_;
  int threads_;
  std::shared_ptr<ReadQueue> queue_;
  ResidencyPlan plan_;
  bool usable_ = false, parked_ = false;
  std::vector<Linear> whole_;         // the matrices as if all of the file were in memory, in the order of use
  std::vector<NeuronRows> whole_rows_;
  std::vector<Range> held_;           // in memory, ascending
  int units_ = 0;
  std::unique_ptr<WeightStream> stream_;
  mutable std::mutex mutex_;          // of what other threads look at: stream_ itself, sizes_, past_
  Sizes sizes_;
  StreamStats past_;
  double load_rate_ = 0;
  // The embedding as one matrix, where it would lie if all of the file were in memory.
  Linear embedding_;
  const uint8_t* file_ = nullptr;
  int resident_rows_ = 0;
  std::shared_ptr<AlignedBuffer<uint8_t>> panel_;  // one panel of the embedding, whole blocks of the file
};

}  // namespace sr
