// Several reads that are waited for together. Readers may outlive the one that waits.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "flash/read_queue.h"

namespace sr {

class ReadGroup {
 public:
  explicit ReadGroup(ReadQueue* queue);
  // `keep` lives until the read has ended.
  void submit(uint64_t offset, size_t bytes, uint8_t* to, std::shared_ptr<void> keep);
  // Waits for all of them. Returns why one failed, "cancelled" when should_stop, asked every 20 ms, said so, or the
  // empty text.
  std::string wait(const std::function<bool()>& should_stop);

 private:
  struct State;
  ReadQueue* queue_;
  std::shared_ptr<State> state_;
};

}  // namespace sr
