// All tables belong to the mutex, but for two things. Slots of a layer that was awaited are read without it: nothing
// changes what was asked for lately. And readers fill slots that are loading, which nobody else looks at.
#include "flash/neuron_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

#include "flash/waiting.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kReadBytes = 128 << 10;  // of one read at most, or one record
constexpr int kReads = 24;                // in progress or waiting for a reader
// A use counts half after so many tokens. Of a real model's traces (README.md), longer memories gain a little more;
// this one loses next to nothing where neighbouring tokens need the same neurons.
constexpr double kHalfLife = 5;
constexpr float kLargest = 1e30f;  // of what a use is worth, before all is scaled down
// What the first record of a layer is worth before anything was used: less than a use, so that a set that stays the
// same is there from its second token on. The order of records tells what was needed often.
constexpr float kPrior = 1;

enum class SlotState : uint8_t { vacant, loading, loaded };

struct Slot {
  int32_t owner = -1;  // layer * neurons + neuron
  SlotState state = SlotState::vacant;
  bool ranked = false;  // among those that may be given away; by the worth it had then, or less than now
  int64_t last = -1;    // request
};

struct Ranked {
  float worth;
  int32_t slot;
  bool operator>(const Ranked& other) const { return worth > other.worth; }
};

struct Wanted {
  uint32_t record;
  int32_t slot;
};

// Records that are read together: all from the first to the last of them.
struct Run {
  int layer;
  ReadPriority priority;
  std::vector<Wanted> wanted;  // ascending records
};

size_t chunk_bytes(size_t record) { return std::max(kReadBytes, size_t(align_up(record)) + 2 * kReadAlign); }

}  // namespace

struct NeuronPool::Shared {
  Shape shape;
  Place place;
  std::shared_ptr<void> keep;
  ReadQueue* queue = nullptr;  // not to be used once given_up

  mutable std::mutex mutex;
  std::condition_variable changed;
  std::vector<Slot> slots;
  std::vector<int32_t> slot_of, vacant;
  std::vector<float> worth;       // [layers, neurons] uses, each twice as much as one kHalfLife tokens before
  float use = 1;                  // what one is worth now
  std::vector<Ranked> ranked;     // a heap, the least first
  std::deque<std::pair<int32_t, int64_t>> newcomers;  // slots that are not ranked yet, and for which request
  std::vector<Ranked> held_back;  // room for take()
  int64_t step = 0;
  int usable = 0;                 // slots before it
  std::vector<int> loading;       // slots of each layer
  std::vector<uint8_t> missing;   // [2, neurons] of the last request for a layer of an even, of an odd number
  std::vector<int32_t> flagged[2];
  std::deque<Run> runs;
  AlignedBuffer<uint8_t> memory;
  std::vector<uint8_t*> chunks;  // free ones
  size_t chunk = 0;
  bool given_up = false;
  std::atomic<bool> bad{false};
  std::string error;
  PoolStats stats;

  void rank(int32_t s, float by) {
    slots[size_t(s)].ranked = true;
    ranked.push_back({by, s});
    std::push_heap(ranked.begin(), ranked.end(), std::greater<>());
  }
  void vacate(int32_t s) {
    Slot& slot = slots[size_t(s)];
    if (slot_of[size_t(slot.owner)] == s) slot_of[size_t(slot.owner)] = -1;
    slot.owner = -1;
    slot.state = SlotState::vacant;
    slot.last = -1;
    if (s < usable) vacant.push_back(s);
  }
  bool may_go(int32_t s) const {
    const Slot& slot = slots[size_t(s)];
    return slot.state == SlotState::loaded && slot.last <= step - shape.held;
  }
  void next_token() {
    use *= float(std::exp2(1 / kHalfLife));
    if (use < kLargest) return;
    for (float& w : worth) w /= use;
    for (Ranked& r : ranked) r.worth /= use;
    use = 1;
  }

  // What was taken for requests up to this one may be given away.
  void rank_newcomers(int64_t request) {
    while (!newcomers.empty() && newcomers.front().second <= request) {
      const int32_t s = newcomers.front().first;
      newcomers.pop_front();
      const Slot& slot = slots[size_t(s)];
      if (!slot.ranked && slot.owner >= 0) rank(s, worth[size_t(slot.owner)]);
    }
  }

  // A slot for something new: the one whose neuron is worth least goes. What is worth more by now than when it was
  // ranked is ranked anew. What has come for this layer or the last one is not looked at before it may go: newcomers
  // are worth least.
  int32_t take() {
    rank_newcomers(step - shape.held);
    if (vacant.empty()) {
      int32_t out = -1;
      while (out < 0 && !ranked.empty()) {
        std::pop_heap(ranked.begin(), ranked.end(), std::greater<>());
        const Ranked least = ranked.back();
        ranked.pop_back();
        Slot& slot = slots[size_t(least.slot)];
        slot.ranked = false;
        if (slot.owner < 0) continue;
        const float now = worth[size_t(slot.owner)];
        if (now > least.worth) rank(least.slot, now);
        else if (may_go(least.slot)) out = least.slot;
        else held_back.push_back({now, least.slot});
      }
      for (const Ranked& r : held_back) rank(r.slot, r.worth);
      held_back.clear();
      for (int32_t s = 0; out < 0 && s < usable; s++) {
        if (may_go(s)) out = s;
      }
      if (out < 0) return -1;
      vacate(out);
    }
    const int32_t s = vacant.back();
    vacant.pop_back();
    return s;
  }

  int32_t begin_loading(int layer, int neuron) {
    const int32_t s = take();
    if (s < 0) return s;
    Slot& slot = slots[size_t(s)];
    slot.owner = layer * shape.neurons + neuron;
    slot.state = SlotState::loading;
    slot.last = step;
    slot_of[size_t(slot.owner)] = s;
    newcomers.emplace_back(s, step);
    loading[size_t(layer)]++;
    return s;
  }

  void loaded(const Run& run, bool good) {
    for (const Wanted& w : run.wanted) {
      if (good && w.slot < usable) slots[size_t(w.slot)].state = SlotState::loaded;
      else vacate(w.slot);
    }
    loading[size_t(run.layer)] -= int(run.wanted.size());
  }

  // Cuts what is wanted of a layer, ascending, into reads.
  void add_runs(int layer, const std::vector<Wanted>& wanted, ReadPriority priority) {
    for (size_t i = 0; i < wanted.size(); i++) {
      bool alone = i == 0;
      if (!alone) {
        const Run& last = runs.back();
        const size_t gap = size_t(wanted[i].record - last.wanted.back().record - 1) * shape.stride;
        const size_t whole = size_t(wanted[i].record - last.wanted.front().record) * shape.stride + shape.bytes;
        alone = gap > shape.gap || whole + 2 * kReadAlign > chunk;
      }
      if (alone) runs.push_back({layer, priority, {}});
      runs.back().wanted.push_back(wanted[i]);
    }
  }
};

namespace {

// With the lock held: hands runs to the readers while there is room for what they read.
template <class Shared>
void pump(const std::shared_ptr<Shared>& shared) {
  Shared& s = *shared;
  while (!s.given_up && !s.runs.empty() && !s.chunks.empty()) {
    Run run = std::move(s.runs.front());
    s.runs.pop_front();
    uint8_t* to = s.chunks.back();
    s.chunks.pop_back();
    const uint64_t base = s.shape.offsets[size_t(run.layer)];
    const uint64_t begin = base + uint64_t(run.wanted.front().record) * s.shape.stride;
    const uint64_t end = base + uint64_t(run.wanted.back().record) * s.shape.stride + s.shape.bytes;
    ReadJob job;
    job.offset = align_down(begin);
    job.bytes = size_t(align_up(end) - job.offset);
    job.to = to;
    job.priority = run.priority;
    // The lock order is this object's mutex, then the queue's; a reader calls `done` without the queue's.
    job.done = [shared, to, run = std::move(run), skip = size_t(begin - job.offset)](const std::string& error) {
      const auto& shape = shared->shape;
      for (const Wanted& w : run.wanted) {
        if (!error.empty()) break;
        shared->place(w.slot, to + skip + size_t(w.record - run.wanted.front().record) * shape.stride);
      }
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->loaded(run, error.empty());
      shared->chunks.push_back(to);
      if (!error.empty()) {
        if (!shared->bad.load(std::memory_order_relaxed)) shared->error = error;
        shared->bad = true;
      }
      pump(shared);
      // Each wake takes a processor from those who compute.
      if (shared->loading[size_t(run.layer)] == 0 || !error.empty()) shared->changed.notify_all();
    };
    s.queue->submit(std::move(job));
  }
}

}  // namespace

NeuronPool::NeuronPool(std::shared_ptr<ReadQueue> queue, const Shape& shape, int slots, Place place,
                       std::shared_ptr<void> keep)
    : shared_(std::make_shared<Shared>()), queue_(std::move(queue)), neurons_(shape.neurons) {
  SR_CHECK(slots >= least_slots(shape));
  Shared& s = *shared_;
  s.shape = shape;
  s.place = std::move(place);
  s.keep = std::move(keep);
  s.queue = queue_.get();
  s.slots.resize(size_t(slots));
  s.slot_of.assign(size_t(shape.layers) * size_t(shape.neurons), -1);
  slot_of_ = s.slot_of.data();
  s.usable = slots;
  for (int i = slots; i-- > 0;) s.vacant.push_back(i);
  s.loading.assign(size_t(shape.layers), 0);
  s.worth.resize(s.slot_of.size());
  for (size_t i = 0; i < s.worth.size(); i++) {
    const float rest = 1 - float(shape.positions[i]) / float(shape.neurons);
    s.worth[i] = kPrior * rest * rest;
  }
  s.ranked.reserve(size_t(slots) + 1);
  s.missing.assign(2 * size_t(shape.neurons), 0);
  missing_ = s.missing.data();
  s.chunk = chunk_bytes(shape.bytes);
  s.memory.reset(s.chunk * kReads + kReadAlign, "neurons that are being read");
  uint8_t* at = reinterpret_cast<uint8_t*>(align_up(reinterpret_cast<uintptr_t>(s.memory.data())));
  for (int i = 0; i < kReads; i++) s.chunks.push_back(at + size_t(i) * s.chunk);
}

NeuronPool::~NeuronPool() {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  shared_->given_up = true;
}

int NeuronPool::least_slots(const Shape& shape) {
  const size_t in_progress = size_t(kReads) * (chunk_bytes(shape.bytes) / shape.stride + 1);
  const int most = shape.held * shape.neurons;
  return most + int(std::min(in_progress, size_t(most)));
}

size_t NeuronPool::table_bytes(const Shape& shape, int64_t slots) {
  const size_t neurons = size_t(shape.layers) * size_t(shape.neurons);
  // Lists of records are dozens of bytes for each of those being read, at most a layer's.
  return size_t(slots) * (sizeof(Slot) + sizeof(Ranked) + sizeof(int32_t)) +
         neurons * (sizeof(int32_t) + sizeof(float)) + chunk_bytes(shape.bytes) * kReads + kReadAlign +
         size_t(shape.neurons) * 64;
}

int NeuronPool::slots() const { return int(shared_->slots.size()); }

int NeuronPool::limit() const {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return shared_->usable;
}

void NeuronPool::limit(int n) {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  n = std::min(n, int(s.slots.size()));
  const int before = std::exchange(s.usable, n);
  if (n < before) {
    s.vacant.erase(std::remove_if(s.vacant.begin(), s.vacant.end(), [n](int32_t v) { return v >= n; }), s.vacant.end());
    for (int i = n; i < before; i++) {
      const Slot& slot = s.slots[size_t(i)];
      if (slot.state == SlotState::loaded) s.vacate(i);
      // A read that a token has left behind: whoever needs the neuron asks for it anew.
      else if (slot.state == SlotState::loading) s.slot_of[size_t(slot.owner)] = -1;
    }
  }
  for (int i = n; i-- > before;) {
    if (s.slots[size_t(i)].state == SlotState::vacant) s.vacant.push_back(i);
  }
}

std::string NeuronPool::fill(const std::function<bool(size_t done, size_t total)>& should_stop) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> lock(s.mutex);
  const size_t each = std::min(size_t(s.shape.neurons), s.vacant.size() / size_t(s.shape.layers));
  std::vector<int32_t> neuron_at(size_t(s.shape.neurons));
  for (int l = 0; l < s.shape.layers; l++) {
    const uint32_t* position = s.shape.positions + size_t(l) * size_t(s.shape.neurons);
    for (int i = 0; i < s.shape.neurons; i++) neuron_at[position[i]] = i;
    std::vector<Wanted> wanted;
    for (uint32_t r = 0; r < each; r++) wanted.push_back({r, s.begin_loading(l, neuron_at[r])});
    s.add_runs(l, wanted, ReadPriority::miss);
    s.rank_newcomers(s.step);
  }
  s.step += s.shape.layers + 1;  // long ago
  const size_t total = s.runs.size();
  pump(shared_);
  const auto left = [&] {
    int n = 0;
    for (int l : s.loading) n += l;
    return n;
  };
  const size_t bytes = each * size_t(s.shape.layers) * s.shape.stride;
  const std::function<bool()> stops = [&] {
    if (!should_stop) return false;
    std::unique_lock<std::mutex> counting(s.mutex);
    const size_t done = bytes - size_t(left()) * s.shape.stride;
    counting.unlock();
    return should_stop(done, bytes);
  };
  const auto settled = [&] { return !total || left() == 0 || s.bad.load(std::memory_order_relaxed); };
  return wait_settled(lock, s.changed, settled, &stops) ? s.error : "cancelled";
}

void NeuronPool::begin_token() {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  s.bad = false;
  s.error.clear();
  s.next_token();
}

void NeuronPool::begin_layer(int layer) {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.bad.load(std::memory_order_relaxed)) return;
  s.step++;
  uint8_t* missing = s.missing.data() + size_t(layer % 2) * size_t(s.shape.neurons);
  for (int32_t id : s.flagged[layer % 2]) missing[id] = 0;
  s.flagged[layer % 2].clear();
}

bool NeuronPool::add(int layer, const int32_t* ids, int n, ReadPriority priority) {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.bad.load(std::memory_order_relaxed)) return false;
  const size_t base = size_t(layer) * size_t(s.shape.neurons);
  std::vector<Wanted> wanted;
  uint8_t* missing = s.missing.data() + size_t(layer % 2) * size_t(s.shape.neurons);
  std::vector<int32_t>& flagged = s.flagged[layer % 2];
  // What is there is held before anything is taken.
  for (int i = 0; i < n; i++) {
    const int id = ids ? ids[i] : i;
    const int32_t slot = s.slot_of[base + size_t(id)];
    s.worth[base + size_t(id)] += s.use;
    if (slot >= 0) s.slots[size_t(slot)].last = s.step;
    else wanted.push_back({uint32_t(id), 0});
    if (slot >= 0 && s.slots[size_t(slot)].state == SlotState::loaded) continue;
    missing[id] = 1;
    flagged.push_back(id);
  }
  s.stats.hits += n - int64_t(wanted.size());
  s.stats.misses += int64_t(wanted.size());
  if (wanted.empty()) return true;
  for (Wanted& w : wanted) {
    w.slot = s.begin_loading(layer, int(w.record));
    SR_CHECK(w.slot >= 0);
    w.record = s.shape.positions[base + w.record];
  }
  std::sort(wanted.begin(), wanted.end(), [](const Wanted& a, const Wanted& b) { return a.record < b.record; });
  s.add_runs(layer, wanted, priority);
  pump(shared_);
  return true;
}

bool NeuronPool::await(int layer, const std::function<bool()>* should_stop) {
  Shared& s = *shared_;
  std::unique_lock<std::mutex> lock(s.mutex);
  const auto settled = [&] { return s.bad.load(std::memory_order_relaxed) || s.loading[size_t(layer)] == 0; };
  if (!settled()) {
    const Clock::time_point t0 = Clock::now();
    if (!wait_settled(lock, s.changed, settled, should_stop)) {
      s.bad = true;
      s.changed.notify_all();
    }
    if (should_stop) s.stats.wait_seconds += std::chrono::duration<double>(Clock::now() - t0).count();
  }
  return !s.bad.load(std::memory_order_relaxed);
}

bool NeuronPool::failed() const { return shared_->bad.load(std::memory_order_acquire); }

std::string NeuronPool::end_token() {
  Shared& s = *shared_;
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.bad.load(std::memory_order_relaxed)) {
    s.stats.tokens++;
    return "";
  }
  // What no reader has begun is asked for again by whoever needs it.
  for (const Run& run : s.runs) s.loaded(run, false);
  s.runs.clear();
  s.bad = false;
  return s.error;
}

PoolStats NeuronPool::stats() const {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return shared_->stats;
}

}  // namespace sr
