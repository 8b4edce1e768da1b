// Sources of bytes that misbehave on command: in memory for units, around a real file for whole models.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/direct_file.h"

namespace sr_test {

// Bytes that tell where they stand in the file.
inline std::vector<uint8_t> patterned(size_t n) {
  std::vector<uint8_t> out(n);
  uint32_t v = 1;
  for (size_t i = 0; i < n; i++) {
    v = v * 1664525u + 1013904223u;
    out[i] = uint8_t(v >> 24);
  }
  return out;
}

class MemorySource : public sr::ByteSource {
 public:
  explicit MemorySource(std::vector<uint8_t> data) : data_(std::move(data)) {}
  int64_t read(void* to, size_t bytes, uint64_t offset) override {
    if (offset >= data_.size()) return 0;
    const size_t n = std::min(bytes, data_.size() - size_t(offset));
    std::memcpy(to, data_.data() + offset, n);
    return int64_t(n);
  }
  uint64_t size() const override { return data_.size(); }
  const std::string& path() const override { return path_; }
  bool direct() const override { return true; }
  std::string changed() const override { return ""; }

 private:
  std::vector<uint8_t> data_;
  std::string path_ = "memory";
};

// Passes reads on unless told otherwise.
class FaultSource : public sr::ByteSource {
 public:
  explicit FaultSource(std::shared_ptr<sr::ByteSource> inner) : inner_(std::move(inner)) {}

  std::atomic<int> fail_with{0};       // errno of every read, 0 = none
  std::atomic<int> interrupt{0};       // so many reads are interrupted
  std::atomic<bool> halve{false};      // short reads: half of the blocks asked for
  std::atomic<bool> gone{false};       // every read is at the end of the file
  std::atomic<int64_t> reads{0};
  std::function<void(uint64_t offset, size_t bytes)> on_read;  // set before the first read

  // Reads wait until the disk goes on.
  void stall() {
    std::lock_guard<std::mutex> lock(mutex_);
    stalled_ = true;
  }
  void go_on() {
    std::lock_guard<std::mutex> lock(mutex_);
    stalled_ = false;
    changed_.notify_all();
  }

  int64_t read(void* to, size_t bytes, uint64_t offset) override {
    reads++;
    if (on_read) on_read(offset, bytes);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !stalled_; });
    }
    if (fail_with) return -fail_with;
    if (gone) return 0;
    if (interrupt > 0 && interrupt-- > 0) return -EINTR;
    if (halve && bytes > sr::kReadAlign) bytes = size_t(sr::align_up(bytes / 2));
    return inner_->read(to, bytes, offset);
  }
  uint64_t size() const override { return inner_->size(); }
  const std::string& path() const override { return inner_->path(); }
  bool direct() const override { return inner_->direct(); }
  std::string changed() const override { return inner_->changed(); }

 private:
  std::shared_ptr<sr::ByteSource> inner_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stalled_ = false;
};

}  // namespace sr_test
