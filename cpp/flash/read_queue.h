// Reads of one file by a few threads: urgent ones first, long ones cut into units that several threads share.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/direct_file.h"

namespace sr {

enum class ReadPriority : uint8_t {
  miss,         // somebody waits for it
  speculative,  // may be needed later
};

struct ReadJob {
  uint64_t offset = 0;     // of the file; like bytes and to, a multiple of kReadAlign
  size_t bytes = 0;
  uint8_t* to = nullptr;   // must live until `done` is called or the queue is gone
  ReadPriority priority = ReadPriority::miss;
  // Called once by a reader: the empty text when all is read, else what went wrong. Must not throw.
  std::function<void(const std::string& error)> done;
};

struct ReadStats {
  int64_t jobs = 0;         // whole ones
  int64_t reads = 0;        // of units
  int64_t bytes = 0;
  int64_t failed = 0;       // jobs
  double busy_seconds = 0;  // during which at least one read was in progress
  // The same, weighted with the number in progress: divided by busy_seconds, the queue's depth.
  double depth_seconds = 0;
};

class ReadQueue {
 public:
  // readers >= 1 threads; `unit` bytes at most in one read. Throws Error(runtime) when the system gives no thread.
  ReadQueue(std::shared_ptr<ByteSource> source, int readers, size_t unit);
  // What has not begun is dropped without a call of `done`; what has is given a moment. A read that a stalled disk
  // holds longer ends by itself; it keeps what `done` holds alive.
  ~ReadQueue();
  ReadQueue(const ReadQueue&) = delete;
  ReadQueue& operator=(const ReadQueue&) = delete;

  void submit(ReadJob job);
  // Drops speculative jobs of which no unit has begun; their `done` is called with "cancelled".
  void cancel_speculative();
  ReadStats stats() const;
  ByteSource& source() const;

 private:
  struct State;
  static void work(const std::shared_ptr<State>& state);
  std::shared_ptr<State> state_;
  std::vector<std::thread> threads_;
};

}  // namespace sr
