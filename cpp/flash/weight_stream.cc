// Units are numbered through all passes: unit u of pass p is p * n + u. One may be read as soon as all earlier ones
// whose place in the ring it takes are released and none of them is still being read.
#include "flash/weight_stream.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "flash/waiting.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;

enum class UnitState : uint8_t { absent, loading, loaded, failed };

struct Unit {
  uint64_t offset = 0;  // of the file, aligned
  size_t bytes = 0;     // aligned
  size_t skip = 0;      // from the aligned beginning to the unit's first byte
  size_t used = 0;      // bytes of the unit itself
  int count = 1;        // pieces, each of bytes / count
  size_t stride = 0;    // of the file, from one to the next
  int pieces_left = 0;  // that are being read
  bool broken = false;  // one of them was not read
  size_t place = 0;     // in the ring
  int64_t distance = 0; // to the last earlier unit that shares memory with it, itself one pass before included
  UnitState state = UnitState::absent;
  int64_t sequence = -1;  // which state is about
  int users_left = 0;
  bool released = false;
};

size_t aligned_bytes(const StreamUnit& u) {
  if (u.count > 1) return size_t(u.count) * u.bytes;
  return size_t(align_up(u.offset + u.bytes) - align_down(u.offset));
}

}  // namespace

struct WeightStream::Shared {
  ReadQueue* queue = nullptr;  // not to be used once given_up: a reader may keep this longer than the queue lives
  int users = 1;
  AlignedBuffer<uint8_t> memory;
  uint8_t* ring = nullptr;  // aligned inside memory
  size_t ring_bytes = 0;

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::vector<Unit> units;
  int64_t pass = -1;
  int64_t next_load = 0;   // sequence numbers before it are loading, loaded or skipped
  int64_t released = 0;    // all before it are released
  bool in_pass = false, given_up = false;
  std::atomic<bool> bad{false};  // the pass has failed or was stopped
  std::string error;
  StreamStats stats;

  int64_t count() const { return int64_t(units.size()); }
  int64_t base() const { return pass * count(); }
  bool overlaps(const Unit& a, const Unit& b) const {
    return a.place < b.place + b.bytes && b.place < a.place + a.bytes;
  }
};

size_t WeightStream::ring_floor(const std::vector<StreamUnit>& units) {
  size_t most = 0;
  for (const StreamUnit& u : units) most = std::max(most, aligned_bytes(u));
  return most;
}

WeightStream::WeightStream(std::shared_ptr<ReadQueue> queue, std::vector<StreamUnit> units, size_t ring_bytes,
                           int users)
    : shared_(std::make_shared<Shared>()), queue_(std::move(queue)) {
  Shared& s = *shared_;
  SR_CHECK(!units.empty() && ring_bytes >= ring_floor(units));
  s.queue = queue_.get();
  s.users = users;
  s.ring_bytes = ring_bytes;
  // One block more to align, one more for what kernels ask for beyond the end.
  s.memory.reset(ring_bytes + 2 * kReadAlign, "the weights that are read ahead");
  prefer_huge_pages(s.memory.data(), s.memory.size());
  s.ring = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(s.memory.data())));
  size_t at = 0;
  for (const StreamUnit& from : units) {
    Unit u;
    u.offset = align_down(from.offset);
    u.bytes = aligned_bytes(from);
    u.skip = size_t(from.offset - u.offset);
    u.used = from.bytes * size_t(from.count);
    u.count = from.count;
    u.stride = from.stride;
    SR_CHECK(u.count == 1 || (!u.skip && from.bytes % kReadAlign == 0 && from.stride % kReadAlign == 0));
    if (at + u.bytes > ring_bytes) at = 0;
    u.place = at;
    at += u.bytes;
    bytes_per_pass_ += u.used;
    s.units.push_back(u);
  }
  const int64_t n = s.count();
  for (int64_t i = 0; i < n; i++) {
    int64_t d = 1;
    while (d < n && !s.overlaps(s.units[size_t(i)], s.units[size_t((i - d + n) % n)])) d++;
    s.units[size_t(i)].distance = d;
  }
}

WeightStream::~WeightStream() {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  shared_->given_up = true;
}

const uint8_t* WeightStream::address(int unit) const {
  const Unit& u = shared_->units[size_t(unit)];
  return shared_->ring + u.place + u.skip;
}

size_t WeightStream::ring_bytes() const { return shared_->ring_bytes; }

namespace {

// With the lock held: asks for all units that may be read now.
template <class Shared>
void pump(const std::shared_ptr<Shared>& shared) {
  Shared& s = *shared;
  if (s.given_up || s.bad.load(std::memory_order_relaxed)) return;
  const int64_t n = s.count();
  for (;; s.next_load++) {
    // Never two passes ahead: a unit has one state.
    if (s.next_load >= s.base() + 2 * n) return;
    Unit& u = s.units[size_t(s.next_load % n)];
    if (s.released <= s.next_load - u.distance || u.state == UnitState::loading) return;
    for (const Unit& other : s.units) {
      if (other.state == UnitState::loading && s.overlaps(u, other)) return;
    }
    u.state = UnitState::loading;
    u.sequence = s.next_load;
    u.users_left = s.users;
    u.released = false;
    u.pieces_left = u.count;
    u.broken = false;
    // The lock order is this object's mutex, then the queue's; a reader calls `done` without the queue's.
    const auto done = [shared, index = size_t(s.next_load % n)](const std::string& error) {
      std::lock_guard<std::mutex> lock(shared->mutex);
      Unit& unit = shared->units[index];
      if (!error.empty()) {
        unit.broken = true;
        // Of a unit that is read ahead for a later pass nobody hears: that pass reads it again.
        const bool wanted = shared->in_pass && unit.sequence >= shared->base() &&
                            unit.sequence < shared->base() + shared->count();
        if (wanted && !shared->bad.load(std::memory_order_relaxed)) {
          shared->error = error;
          shared->bad = true;
          shared->changed.notify_all();
        }
      }
      if (--unit.pieces_left > 0) return;
      unit.state = unit.broken ? UnitState::failed : UnitState::loaded;
      pump(shared);
      shared->changed.notify_all();
    };
    for (int i = 0; i < u.count; i++) {
      ReadJob job;
      job.bytes = u.bytes / size_t(u.count);
      job.offset = u.offset + uint64_t(i) * u.stride;
      job.to = s.ring + u.place + size_t(i) * job.bytes;
      job.done = done;
      s.queue->submit(std::move(job));
    }
  }
}

}  // namespace

void WeightStream::begin_pass() {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  s.pass++;
  s.in_pass = true;
  s.bad = false;
  s.error.clear();
  s.released = std::max(s.released, s.base());
  s.next_load = std::max(s.next_load, s.base());
  // What failed while it was read ahead, and all after it, is read again.
  const int64_t n = s.count();
  for (int64_t q = s.base(); q < s.next_load; q++) {
    if (s.units[size_t(q % n)].state == UnitState::failed) s.next_load = q;
  }
  pump(shared_);
}

bool WeightStream::await(int unit, const std::function<bool()>* should_stop) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> lock(s.mutex);
  Unit& u = s.units[size_t(unit)];
  const int64_t wanted = s.base() + unit;
  const auto there = [&] { return u.state == UnitState::loaded && u.sequence == wanted; };
  const auto settled = [&] { return s.bad.load(std::memory_order_relaxed) || there(); };
  if (should_stop) {
    s.stats.ready += there();
    s.stats.waited += !there();
  }
  if (!settled()) {
    const Clock::time_point t0 = Clock::now();
    if (!wait_settled(lock, s.changed, settled, should_stop)) {
      s.bad = true;
      s.changed.notify_all();
    }
    if (should_stop) s.stats.wait_seconds += std::chrono::duration<double>(Clock::now() - t0).count();
  }
  if (s.bad.load(std::memory_order_relaxed)) return false;
  if (should_stop) s.stats.bytes += int64_t(u.used);
  return true;
}

void WeightStream::done(int unit) {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.bad.load(std::memory_order_relaxed)) return;
  Unit& u = s.units[size_t(unit)];
  if (--u.users_left > 0) return;
  u.released = true;
  const int64_t n = s.count(), end = s.base() + n;
  while (s.released < end) {
    const Unit& first = s.units[size_t(s.released % n)];
    if (first.sequence != s.released || !first.released) break;
    s.released++;
  }
  pump(shared_);
}

std::string WeightStream::end_pass() {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  s.in_pass = false;
  const bool bad = s.bad.load(std::memory_order_relaxed);
  s.released = s.base() + s.count();
  s.next_load = std::max(s.next_load, s.released);
  s.bad = false;
  if (!bad) {
    s.stats.passes++;
    pump(shared_);
  }
  return s.error;
}

bool WeightStream::failed() const { return shared_->bad.load(std::memory_order_acquire); }

bool WeightStream::settle(const std::function<bool()>& should_stop) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> lock(s.mutex);
  s.given_up = true;
  const auto settled = [&] {
    return std::none_of(s.units.begin(), s.units.end(), [](const Unit& u) { return u.state == UnitState::loading; });
  };
  if (wait_settled(lock, s.changed, settled, &should_stop)) return true;
  s.given_up = false;
  return false;
}

StreamStats WeightStream::stats() const {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return shared_->stats;
}

}  // namespace sr
