// The pool joins, its barriers separate phases, and more threads than cores only cost time.
#include "base/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <ctime>
#include <numeric>
#include <string>

#include "check.h"
#include "sparse_run/error.h"

using sr::ThreadPool;

namespace {

// Each phase, every thread writes its number into its slot and then reads all slots of the phase.
int torn_phases(int threads, int runs, int phases) {
  ThreadPool pool(threads);
  std::vector<int> slots(size_t(threads) * 2, -1);
  std::atomic<int> wrong{0};
  for (int r = 0; r < runs; r++) {
    pool.run([&](int tid) {
      for (int p = 0; p < phases; p++) {
        int* now = slots.data() + (p & 1) * threads;
        now[tid] = r * phases + p;
        pool.barrier();
        for (int i = 0; i < threads; i++) wrong += now[i] != r * phases + p;
      }
      pool.barrier();
    });
  }
  return wrong;
}

double cpu_seconds() { return double(std::clock()) / CLOCKS_PER_SEC; }

}  // namespace

TEST_CASE("pool: every thread runs once, the caller is thread 0") {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    std::vector<int> ran(size_t(threads), 0);
    const auto caller = std::this_thread::get_id();
    bool zero_is_caller = false;
    for (int i = 0; i < 100; i++) {
      pool.run([&](int tid) {
        ran[size_t(tid)]++;
        if (tid == 0) zero_is_caller = std::this_thread::get_id() == caller;
      });
    }
    for (int n : ran) CHECK_EQ(n, 100);
    CHECK(zero_is_caller);
  }
}

TEST_CASE("barrier: what is written before it is seen by all after it") {
  CHECK_EQ(torn_phases(1, 10, 100), 0);
  CHECK_EQ(torn_phases(2, 200, 500), 0);
  CHECK_EQ(torn_phases(3, 50, 100), 0);
}

TEST_CASE("barrier: many more threads than cores stay correct and finish soon") {
  const auto t0 = std::chrono::steady_clock::now();
  CHECK_EQ(torn_phases(24, 5, 50), 0);
  CHECK(std::chrono::steady_clock::now() - t0 < std::chrono::seconds(60));
}

TEST_CASE("pool: workers sleep between runs instead of burning the processor") {
  ThreadPool pool(4);
  pool.run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(cpu_seconds() - before < 0.1);
  int sum = 0;
  std::atomic<int> ran{0};
  pool.run([&](int) { ran++; });  // and wake again
  sum = ran;
  CHECK_EQ(sum, 4);
}

TEST_CASE("work counter: items are handed out once each, phase after phase") {
  constexpr int kThreads = 5, kItems = 1000, kPhases = 50;
  ThreadPool pool(kThreads);
  sr::WorkCounter counter[2];
  std::vector<std::vector<int>> taken(kPhases, std::vector<int>(kItems, 0));
  pool.run([&](int tid) {
    for (int p = 0; p < kPhases; p++) {
      if (tid == 0) counter[(p + 1) & 1].reset();
      for (int i = counter[p & 1].take(); i < kItems; i = counter[p & 1].take()) taken[size_t(p)][size_t(i)]++;
      pool.barrier();
    }
  });
  for (const auto& phase : taken) {
    for (int n : phase) CHECK_EQ(n, 1);
  }
}

TEST_CASE("fair mutex: two threads that lock again at once take turns") {
  sr::FairMutex mutex;
  std::atomic<bool> stop{false};
  long count[2] = {0, 0};
  const auto body = [&](int i) {
    while (!stop) {
      mutex.lock();
      count[i]++;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      mutex.unlock();
    }
  };
  std::thread a(body, 0), b(body, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  stop = true;
  a.join();
  b.join();
  CHECK(count[0] > 10);
  CHECK(std::labs(count[0] - count[1]) < count[0] / 2 + 5);
}

TEST_CASE("pool: a forked child gets an error instead of waiting for threads it does not have") {
  ThreadPool pool(2);
  pool.run([](int) {});
  const pid_t child = fork();
  if (child == 0) {
    int status = 1;
    try {
      pool.run([](int) {});
    } catch (const sr::Error& e) {
      status = std::string(e.what()).find("forked") != std::string::npos ? 0 : 2;
    }
    _exit(status);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  std::atomic<int> ran{0};
  pool.run([&](int) { ran++; });
  CHECK_EQ(ran.load(), 2);
}
