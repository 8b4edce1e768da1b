// Readers take units from the oldest job of the higher priority. What they share outlives the queue, so that a read
// that hangs in the kernel cannot keep the program from ending.
#include "flash/read_queue.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <utility>

#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::seconds(1);  // for reads in progress when the queue is given up

struct Work {
  ReadJob job;
  size_t begun = 0;     // bytes handed out
  int in_progress = 0;  // units
  std::string error;
};

}  // namespace

struct ReadQueue::State {
  std::shared_ptr<ByteSource> source;
  size_t unit = 0;

  std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<std::shared_ptr<Work>> waiting[2];  // by priority; those with bytes left to hand out
  std::atomic<bool> stop{false};
  int alive = 0;
  ReadStats stats;
  int in_progress = 0;
  Clock::time_point since;

  // With the lock held, before the number of reads in progress changes.
  void account() {
    const Clock::time_point now = Clock::now();
    if (in_progress) {
      const double seconds = std::chrono::duration<double>(now - since).count();
      stats.busy_seconds += seconds;
      stats.depth_seconds += seconds * in_progress;
    }
    since = now;
  }
};

ReadQueue::ReadQueue(std::shared_ptr<ByteSource> source, int readers, size_t unit) : state_(new State) {
  state_->source = std::move(source);
  state_->unit = std::max(size_t(align_down(unit)), kReadAlign);
  try {
    for (int i = 0; i < readers; i++) {
      {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->alive++;
      }
      threads_.emplace_back([state = state_] { work(state); });
    }
  } catch (const std::system_error& e) {
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      state_->alive--;  // the one that never began
      if (!threads_.empty()) return;
    }
    throw Error(ErrorCode::runtime, std::string("cannot start a thread that reads weights: ") + e.what());
  }
}

ReadQueue::~ReadQueue() {
  bool all_ended;
  {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->stop = true;
    for (auto& queue : state_->waiting) queue.clear();
    state_->wake.notify_all();
    all_ended = state_->ended.wait_for(lock, kPatience, [&] { return state_->alive == 0; });
  }
  for (std::thread& t : threads_) {
    if (all_ended) t.join();
    else t.detach();
  }
}

ByteSource& ReadQueue::source() const { return *state_->source; }

void ReadQueue::submit(ReadJob job) {
  auto work = std::make_shared<Work>();
  work->job = std::move(job);
  const bool shared = work->job.bytes > state_->unit;
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->stop) return;
  state_->waiting[size_t(work->job.priority)].push_back(std::move(work));
  // Each wake takes a processor from those who compute: one reader for one read.
  if (shared) state_->wake.notify_all();
  else state_->wake.notify_one();
}

void ReadQueue::cancel_speculative() {
  std::vector<std::shared_ptr<Work>> dropped;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    auto& queue = state_->waiting[size_t(ReadPriority::speculative)];
    const auto begun = std::stable_partition(queue.begin(), queue.end(), [](const auto& w) { return w->begun > 0; });
    dropped.assign(begun, queue.end());
    queue.erase(begun, queue.end());
  }
  for (const auto& w : dropped) {
    if (w->job.done) w->job.done("cancelled");
  }
}

ReadStats ReadQueue::stats() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->account();
  return state_->stats;
}

void ReadQueue::work(const std::shared_ptr<State>& state) {
  State& s = *state;
  std::unique_lock<std::mutex> lock(s.mutex);
  while (!s.stop) {
    auto* queue = !s.waiting[0].empty() ? &s.waiting[0] : !s.waiting[1].empty() ? &s.waiting[1] : nullptr;
    if (!queue) {
      s.wake.wait(lock);
      continue;
    }
    const std::shared_ptr<Work> w = queue->front();
    const size_t at = w->begun, bytes = std::min(s.unit, w->job.bytes - at);
    w->begun += bytes;
    if (w->begun == w->job.bytes) queue->pop_front();
    w->in_progress++;
    s.account();
    s.in_progress++;
    lock.unlock();

    std::string error = read_fully(*s.source, w->job.to + at, bytes, w->job.offset + at, &s.stop);

    lock.lock();
    s.account();
    s.in_progress--;
    s.stats.reads++;
    w->in_progress--;
    if (error.empty()) {
      s.stats.bytes += int64_t(bytes);
    } else {
      if (w->error.empty()) w->error = std::move(error);
      if (w->begun < w->job.bytes) {  // the rest is of no use
        w->begun = w->job.bytes;
        for (auto& q : s.waiting) q.erase(std::remove(q.begin(), q.end(), w), q.end());
      }
    }
    if (w->begun < w->job.bytes || w->in_progress || s.stop) continue;
    s.stats.jobs++;
    s.stats.failed += !w->error.empty();
    if (w->job.done) {
      lock.unlock();
      w->job.done(w->error);
      lock.lock();
    }
  }
  s.alive--;
  s.ended.notify_all();
}

}  // namespace sr
