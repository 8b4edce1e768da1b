// Weights that do not stay in memory, read in the order in which every pass uses them, a little ahead of it, into a
// ring of memory. The order is the same in every pass, so each piece has its own place in the ring, known from the
// start, and while one pass ends the first pieces of the next are being read.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "flash/read_queue.h"

namespace sr {

// A piece of the file: what is waited for, used and released at once. Or `count` pieces of so many bytes each, one
// every `stride` bytes, all whole blocks: in memory they lie one after another.
struct StreamUnit {
  uint64_t offset = 0;
  size_t bytes = 0;
  int count = 1;
  size_t stride = 0;
};

struct StreamStats {
  int64_t passes = 0;       // that came to their end
  int64_t ready = 0;        // units that were there when they were needed
  int64_t waited = 0;       // units that were not
  int64_t bytes = 0;        // of the units used
  double wait_seconds = 0;  // of the calling thread

  StreamStats& operator+=(const StreamStats& other) {
    passes += other.passes;
    ready += other.ready;
    waited += other.waited;
    bytes += other.bytes;
    wait_seconds += other.wait_seconds;
    return *this;
  }
};

class WeightStream {
 public:
  // units: in order of use. ring_bytes: at least ring_floor(units). users: threads that call `done` for each unit.
  WeightStream(std::shared_ptr<ReadQueue> queue, std::vector<StreamUnit> units, size_t ring_bytes, int users);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  // The smallest ring: room for the largest unit.
  static size_t ring_floor(const std::vector<StreamUnit>& units);

  // Where the unit's first byte lies whenever it is held.
  const uint8_t* address(int unit) const;
  size_t bytes_per_pass() const { return bytes_per_pass_; }
  size_t ring_bytes() const;

  // A pass begins: reading goes on, or starts.
  void begin_pass();
  // Waits until the unit may be read; false: the pass has failed or was stopped, and nothing of it is of use any more.
  // Every user calls await and then, whatever it said, done; should_stop (or null) is asked every 20 ms while waiting.
  bool await(int unit, const std::function<bool()>* should_stop);
  void done(int unit);
  // The pass is over, whole or not: what it did not use is skipped. Returns why it failed, or the empty text.
  // No thread may be in await or done.
  std::string end_pass();
  bool failed() const;  // or stopped
  // Between passes: reads nothing more and waits for what is being read; after that the stream can only be given up.
  // False: should_stop, asked every 20 ms, said so, and the stream is as it was.
  bool settle(const std::function<bool()>& should_stop);

  StreamStats stats() const;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::shared_ptr<ReadQueue> queue_;
  size_t bytes_per_pass_ = 0;
};

}  // namespace sr
