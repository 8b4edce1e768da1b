// What waits and the readers share a count of the reads that are left.
#include "flash/read_group.h"

#include <condition_variable>
#include <mutex>
#include <utility>

#include "flash/waiting.h"

namespace sr {

struct ReadGroup::State {
  std::mutex mutex;
  std::condition_variable changed;
  int left = 0;
  std::string error;
};

ReadGroup::ReadGroup(ReadQueue* queue) : queue_(queue), state_(std::make_shared<State>()) {}

void ReadGroup::submit(uint64_t offset, size_t bytes, uint8_t* to, std::shared_ptr<void> keep) {
  ReadJob job;
  job.offset = offset;
  job.bytes = bytes;
  job.to = to;
  job.done = [state = state_, keep = std::move(keep)](const std::string& error) {
    std::lock_guard<std::mutex> lock(state->mutex);
    if (state->error.empty()) state->error = error;
    state->left--;
    state->changed.notify_all();
  };
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->left++;
  }
  queue_->submit(std::move(job));
}

std::string ReadGroup::wait(const std::function<bool()>& should_stop) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  if (!wait_settled(lock, state_->changed, [&] { return state_->left == 0; }, &should_stop)) return "cancelled";
  return state_->error;
}

}  // namespace sr
