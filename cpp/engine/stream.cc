// The machine's own read rate: what decode, which reads every weight once a token, is measured against.
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "kernels/table.h"
#include "sparse_run/engine.h"
#include "sparse_run/error.h"

namespace sr {

std::vector<double> stream_gb_per_s(int threads, int megabytes, int repetitions) {
  if (threads < 1 || threads > 1024) {
    throw Error(ErrorCode::usage, "threads must be from 1 to 1024, got " + std::to_string(threads));
  }
  if (megabytes < 1 || megabytes > 1 << 20) {
    throw Error(ErrorCode::usage, "megabytes must be from 1 to 1048576, got " + std::to_string(megabytes));
  }
  if (repetitions < 1 || repetitions > 10000) {
    throw Error(ErrorCode::usage, "repetitions must be from 1 to 10000, got " + std::to_string(repetitions));
  }
  const size_t bytes = size_t(megabytes) * 1000000 / 4096 * 4096;
  AlignedBuffer<uint8_t> buffer(bytes, "the stream test");
  prefer_huge_pages(buffer.data(), bytes);
  ThreadPool pool(threads);
  const auto slice = [&](int tid) { return bytes / 64 * size_t(tid) / size_t(threads) * 64; };
  // Written by the thread that reads it: untouched pages would all be one page of zeros in the cache.
  pool.run([&](int tid) { std::memset(buffer.data() + slice(tid), tid + 1, slice(tid + 1) - slice(tid)); });

  std::vector<double> rates;
  std::atomic<uint64_t> sum{0};
  for (int i = 0; i < repetitions; i++) {
    const auto t0 = std::chrono::steady_clock::now();
    pool.run([&](int tid) {
      sum += kernels().read_sum(buffer.data() + slice(tid), slice(tid + 1) - slice(tid));
    });
    rates.push_back(double(bytes) / 1e9 / std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count());
  }
  return rates;
}

}  // namespace sr
