// Threads for one forward pass at a time: a fork and join per pass, barriers inside it, sleep when nothing is to do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace sr {

// A counter that threads wait on: they spin for a while, then yield for a while, then sleep in the kernel.
class WaitWord {
 public:
  uint32_t value(std::memory_order order = std::memory_order_acquire) const { return word_.load(order); }
  // Changes the value and wakes whoever sleeps.
  void advance();
  // Returns the new value once it differs from `old`; `spins` looks before yielding.
  uint32_t wait(uint32_t old, int spins);

 private:
  std::atomic<uint32_t> word_{0};
  std::atomic<uint32_t> sleepers_{0};
#if !defined(__linux__)
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

class ThreadPool {
 public:
  // `threads` in all: the caller of run is one of them. Throws Error(runtime) when the system gives none.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // fn(tid) for every tid in [0, size) at once; the caller is tid 0; returns when all have returned. fn must not throw.
  // One run at a time: whoever shares a pool holds a lock around run.
  template <class F>
  void run(F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run_raw([](void* f, int tid) { (*static_cast<Fn*>(f))(tid); }, const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Inside run only: returns when every thread of the pool has come here; what each wrote before, all see after.
  void barrier() {
    if (size_ > 1) meet();
  }

 private:
  void run_raw(void (*fn)(void*, int), void* arg);
  void meet();
  void work(int tid);

  const int size_;
  int spins_ = 0;
  long owner_process_ = 0;
  void (*fn_)(void*, int) = nullptr;
  void* arg_ = nullptr;
  bool stop_ = false;
  // Each on its own cache line: arriving threads must not disturb those that wait.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) WaitWord generation_;
  alignas(64) WaitWord epoch_;
  alignas(64) std::vector<std::thread> workers_;
};

// Hands out 0, 1, 2 ... to whichever thread asks next. Reset it only where a barrier separates it from every take.
class WorkCounter {
 public:
  void reset() { next_.store(0, std::memory_order_relaxed); }
  int take() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> next_{0};
};

// A mutex that serves in the order of arrival, so that a long prompt of one session cannot starve another's decoding.
class FairMutex {
 public:
  void lock();
  void unlock();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_ticket_ = 0, serving_ = 0;
};

}  // namespace sr
