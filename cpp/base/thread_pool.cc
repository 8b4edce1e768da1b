// Central barrier with a generation counter. Whoever waits spins, then yields, then sleeps. A wake-up costs 50 us and
// more in a virtual machine, and a thread that wakes late sends the others to sleep at the next barrier: with 60 us of
// spinning alone a 135M model fell from 230 to 60 tokens/s and stayed there. So sleep comes last: after 15 us of
// spinning (next to none when there are more threads than cores) and 3 ms of yielding to whoever else wants the core.
#include "base/thread_pool.h"

#include <chrono>
#include <system_error>

#include "base/cpu_info.h"
#include "sparse_run/error.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace sr {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` returns at once on most cores; isb waits about as long as x86's pause
#endif
}

// Looks (load and pause) that take about one microsecond here; pause is 4 to 40 ns, depending on the processor.
double looks_per_us() {
  static const double rate = [] {
    std::atomic<uint32_t> word{0};
    double best = 0;
    for (int trial = 0; trial < 3; trial++) {  // the best of three: an interruption only makes it look slower
      const auto t0 = std::chrono::steady_clock::now();
      for (int i = 0; i < 500; i++) {
        if (word.load(std::memory_order_acquire)) break;
        pause_cpu();
      }
      const double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - t0).count();
      if (us > 0 && 500 / us > best) best = 500 / us;
    }
    return best > 0 ? best : 50;
  }();
  return rate;
}

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return long(getpid());
#else
  return 0;
#endif
}

}  // namespace

void WaitWord::advance() {
  // Sequential consistency on both sides (here and in wait): either this thread sees the sleeper, or the sleeper sees
  // the new value before it sleeps.
  word_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#else
  std::lock_guard<std::mutex> lock(mutex_);
  changed_.notify_all();
#endif
}

uint32_t WaitWord::wait(uint32_t old, int spins) {
  for (int i = 0; i < spins; i++) {
    const uint32_t now = word_.load(std::memory_order_acquire);
    if (now != old) return now;
    pause_cpu();
  }
  const auto asleep_at = std::chrono::steady_clock::now() + std::chrono::milliseconds(3);
  do {
    const uint32_t now = word_.load(std::memory_order_acquire);
    if (now != old) return now;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < asleep_at);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  uint32_t now;
#if defined(__linux__)
  static_assert(sizeof(std::atomic<uint32_t>) == 4, "the kernel waits on the atomic's own four bytes");
  while ((now = word_.load(std::memory_order_seq_cst)) == old) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
#else
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return (now = word_.load(std::memory_order_seq_cst)) != old; });
  }
#endif
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return now;
}

ThreadPool::ThreadPool(int threads) : size_(threads < 1 ? 1 : threads), owner_process_(process_id()) {
  if (size_ == 1) return;
  const bool crowded = size_ > cpu_info().allowed_cores;
  spins_ = int(looks_per_us() * (crowded ? 1 : 15));
  workers_.reserve(size_t(size_ - 1));
  try {
    for (int tid = 1; tid < size_; tid++) workers_.emplace_back([this, tid] { work(tid); });
  } catch (const std::system_error& e) {
    stop_ = true;
    epoch_.advance();
    for (std::thread& t : workers_) t.join();
    throw Error(ErrorCode::runtime, "cannot start " + std::to_string(size_) + " threads: " + e.what() +
                                        "; use fewer (--threads)");
  }
}

ThreadPool::~ThreadPool() {
  if (process_id() != owner_process_) {  // a fork copies the object but not its threads: there is nobody to join
    for (std::thread& t : workers_) t.detach();
    return;
  }
  if (workers_.empty()) return;
  stop_ = true;
  epoch_.advance();
  for (std::thread& t : workers_) t.join();
}

void ThreadPool::run_raw(void (*fn)(void*, int), void* arg) {
  if (size_ == 1) {
    fn(arg, 0);
    return;
  }
  if (process_id() != owner_process_) {
    throw Error(ErrorCode::runtime, "a model cannot be used in a forked process: load it again there");
  }
  fn_ = fn;
  arg_ = arg;
  epoch_.advance();
  fn(arg, 0);
  meet();
}

void ThreadPool::meet() {
  const uint32_t generation = generation_.value(std::memory_order_relaxed);  // cannot change before all have arrived
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.advance();
  } else {
    generation_.wait(generation, spins_);
  }
}

void ThreadPool::work(int tid) {
  uint32_t epoch = 0;
  for (;;) {
    // Runs cannot overtake each other: each ends with a barrier of all, so epoch moves by one between two waits.
    epoch = epoch_.wait(epoch, spins_);
    if (stop_) return;
    fn_(arg_, tid);
    meet();
  }
}

void FairMutex::lock() {
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t ticket = next_ticket_++;
  changed_.wait(lock, [&] { return serving_ == ticket; });
}

void FairMutex::unlock() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    serving_++;
  }
  changed_.notify_all();
}

}  // namespace sr
