// Waiting for what readers bring, while somebody may say that it is not wanted any more.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace sr {

constexpr auto kPollInterval = std::chrono::milliseconds(20);

// Waits until `settled`, which is asked with the lock held. should_stop (or null) is asked every 20 ms, and whenever
// something has changed, without the lock; false: it said so, and what is waited for is not there.
template <class Settled>
bool wait_settled(std::unique_lock<std::mutex>& lock, std::condition_variable& changed, const Settled& settled,
                  const std::function<bool()>* should_stop) {
  while (!settled()) {
    if (!should_stop) {
      changed.wait(lock);
      continue;
    }
    changed.wait_for(lock, kPollInterval);
    if (settled()) break;
    lock.unlock();
    const bool stop = (*should_stop)();
    lock.lock();
    if (stop) return settled();
  }
  return true;
}

}  // namespace sr
