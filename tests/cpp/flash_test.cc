// Reading weights from flash, piece by piece: whole reads out of broken ones, the queue's order and its end, the ring
// in which nothing is overwritten while it is used, and what stays in memory.
#include <cstdlib>
#include <random>
#include <thread>

#include "check.h"
#include "fault_source.h"
#include "flash/read_queue.h"
#include "flash/residency.h"
#include "flash/weight_stream.h"
#include "tiny_model.h"

using sr::ReadJob;
using sr::ReadPriority;
using sr::ReadQueue;
using sr::StreamUnit;
using sr::WeightStream;
using sr_test::FaultSource;
using sr_test::MemorySource;

namespace {

constexpr size_t kBlock = sr::kReadAlign;

std::shared_ptr<FaultSource> faulty(const std::vector<uint8_t>& data) {
  return std::make_shared<FaultSource>(std::make_shared<MemorySource>(data));
}

// Memory aligned as reads need it.
struct Aligned {
  explicit Aligned(size_t n) : memory(n + kBlock) {
    data = reinterpret_cast<uint8_t*>(sr::align_up(reinterpret_cast<uintptr_t>(memory.data())));
  }
  std::vector<uint8_t> memory;
  uint8_t* data;
};

// Counts jobs that ended and keeps their texts.
struct Ended {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::pair<int, std::string>> list;
  std::function<void(const std::string&)> note(int id) {
    return [this, id](const std::string& error) {
      std::lock_guard<std::mutex> lock(mutex);
      list.push_back({id, error});
      changed.notify_all();
    };
  }
  bool wait(size_t n) {
    std::unique_lock<std::mutex> lock(mutex);
    return changed.wait_for(lock, std::chrono::seconds(20), [&] { return list.size() >= n; });
  }
};

ReadJob job_of(uint64_t offset, size_t bytes, uint8_t* to, std::function<void(const std::string&)> done,
               ReadPriority priority = ReadPriority::miss) {
  ReadJob job;
  job.offset = offset;
  job.bytes = bytes;
  job.to = to;
  job.priority = priority;
  job.done = std::move(done);
  return job;
}

}  // namespace

TEST_CASE("a read goes on after short reads and interruptions, and ends with the file") {
  const auto data = sr_test::patterned(10 * kBlock + 100);
  auto source = faulty(data);
  source->halve = true;
  source->interrupt = 5;
  Aligned to(11 * kBlock);
  CHECK_EQ(sr::read_fully(*source, to.data, 11 * kBlock, 0), "");
  CHECK(std::equal(data.begin(), data.end(), to.data));
  CHECK(source->reads > 8);
  Aligned tail(2 * kBlock);
  CHECK_EQ(sr::read_fully(*source, tail.data, 2 * kBlock, 9 * kBlock), "");
  CHECK(std::equal(data.begin() + 9 * kBlock, data.end(), tail.data));
}

TEST_CASE("a failed read names the file and the reason; a shorter file is told from its end") {
  auto source = faulty(sr_test::patterned(4 * kBlock));
  Aligned to(4 * kBlock);
  source->fail_with = EIO;
  const std::string error = sr::read_fully(*source, to.data, 4 * kBlock, 0);
  CHECK(error.find("cannot read memory: ") == 0);
  CHECK(error.find(std::strerror(EIO)) != std::string::npos);
  source->fail_with = 0;
  source->gone = true;
  CHECK(sr::read_fully(*source, to.data, 4 * kBlock, 0).find("has become shorter") != std::string::npos);
}

TEST_CASE("a file is read directly with its bytes, and its changes are seen") {
  sr_test::TemporaryFolder folder;
  const auto data = sr_test::patterned(5 * kBlock);
  const std::string path = folder.write("weights", std::string(data.begin(), data.end()));
  auto source = sr::open_direct(path);
  CHECK_EQ(source->size(), uint64_t(5 * kBlock));
  Aligned to(2 * kBlock);
  CHECK_EQ(sr::read_fully(*source, to.data, 2 * kBlock, 2 * kBlock), "");
  CHECK(std::equal(data.begin() + 2 * kBlock, data.begin() + 4 * kBlock, to.data));
  CHECK_EQ(source->changed(), "");
  CHECK(truncate(path.c_str(), kBlock) == 0);
  CHECK_EQ(source->changed(), "has become shorter");
  CHECK(sr::read_fully(*source, to.data, 2 * kBlock, 2 * kBlock).find("has become shorter") != std::string::npos);
  CHECK(truncate(path.c_str(), 6 * kBlock) == 0);
  CHECK_EQ(source->changed(), "has been written to");
}

TEST_CASE("what cannot be opened is refused with its name") {
  sr_test::TemporaryFolder folder;
  CHECK_THROWS(sr::open_direct(folder.path() + "/absent"), sr::Error, "absent");
  CHECK_THROWS(sr::open_direct(folder.path()), sr::Error, folder.path().c_str());
  CHECK_THROWS(sr::open_direct(folder.write("empty", "")), sr::Error, "empty");
}

TEST_CASE("several readers bring every byte of long and short jobs") {
  const auto data = sr_test::patterned(300 * kBlock);
  auto source = faulty(data);
  source->halve = true;
  ReadQueue queue(source, 4, 8 * kBlock);
  Ended ended;
  std::mt19937 rng(3);
  struct Want {
    size_t at, n;
    std::unique_ptr<Aligned> to;
  };
  std::vector<Want> wants;
  for (int i = 0; i < 60; i++) {
    const size_t at = rng() % 250, n = 1 + rng() % 50;
    wants.push_back({at * kBlock, n * kBlock, std::make_unique<Aligned>(n * kBlock)});
    queue.submit(job_of(wants.back().at, wants.back().n, wants.back().to->data, ended.note(i),
                        i % 2 ? ReadPriority::miss : ReadPriority::speculative));
  }
  CHECK(ended.wait(60));
  for (const auto& e : ended.list) CHECK_EQ(e.second, "");
  size_t total = 0;
  for (const Want& w : wants) {
    CHECK(std::memcmp(w.to->data, data.data() + w.at, w.n) == 0);
    total += w.n;
  }
  const sr::ReadStats stats = queue.stats();
  CHECK_EQ(stats.jobs, 60);
  CHECK_EQ(stats.bytes, int64_t(total));
  CHECK_EQ(stats.failed, 0);
  CHECK(stats.reads > 60);
  CHECK(stats.depth_seconds >= stats.busy_seconds * 0.999);
}

TEST_CASE("misses are read before what is speculative, which can be given up") {
  auto source = faulty(sr_test::patterned(64 * kBlock));
  std::mutex mutex;
  std::vector<uint64_t> order;
  source->on_read = [&](uint64_t offset, size_t) {
    std::lock_guard<std::mutex> lock(mutex);
    order.push_back(offset / kBlock);
  };
  source->stall();
  Ended ended;
  Aligned to(8 * kBlock);
  ReadQueue queue(source, 1, kBlock);
  queue.submit(job_of(0, kBlock, to.data, ended.note(0)));
  while (source->reads == 0) std::this_thread::yield();  // the reader is busy with it
  queue.submit(job_of(1 * kBlock, kBlock, to.data + 1 * kBlock, ended.note(1), ReadPriority::speculative));
  queue.submit(job_of(2 * kBlock, kBlock, to.data + 2 * kBlock, ended.note(2), ReadPriority::speculative));
  queue.submit(job_of(3 * kBlock, kBlock, to.data + 3 * kBlock, ended.note(3)));
  source->go_on();
  CHECK(ended.wait(4));
  CHECK(order == (std::vector<uint64_t>{0, 3, 1, 2}));

  source->stall();
  const int64_t before = source->reads;
  queue.submit(job_of(0, kBlock, to.data, ended.note(4)));
  while (source->reads == before) std::this_thread::yield();
  queue.submit(job_of(5 * kBlock, kBlock, to.data + 5 * kBlock, ended.note(5), ReadPriority::speculative));
  queue.cancel_speculative();
  CHECK_EQ(ended.list.back().first, 5);
  CHECK_EQ(ended.list.back().second, "cancelled");
  source->go_on();
  CHECK(ended.wait(6));
  CHECK_EQ(source->reads.load(), before + 1);
}

TEST_CASE("an error ends its job once and no other") {
  const auto data = sr_test::patterned(64 * kBlock);
  auto source = faulty(data);
  source->fail_with = EIO;
  Ended ended;
  Aligned to(64 * kBlock);
  ReadQueue queue(source, 3, kBlock);
  queue.submit(job_of(0, 40 * kBlock, to.data, ended.note(0)));
  CHECK(ended.wait(1));
  CHECK(ended.list[0].second.find("cannot read") == 0);
  source->fail_with = 0;
  queue.submit(job_of(0, 40 * kBlock, to.data, ended.note(1)));
  CHECK(ended.wait(2));
  CHECK_EQ(ended.list.size(), size_t(2));
  CHECK_EQ(ended.list[1].second, "");
  CHECK(std::memcmp(to.data, data.data(), 40 * kBlock) == 0);
  CHECK_EQ(queue.stats().failed, 1);
}

TEST_CASE("a queue ends although a read hangs") {
  auto source = faulty(sr_test::patterned(8 * kBlock));
  source->stall();
  auto to = std::make_shared<Aligned>(8 * kBlock);
  const auto t0 = std::chrono::steady_clock::now();
  {
    ReadQueue queue(source, 2, kBlock);
    queue.submit(job_of(0, 8 * kBlock, to->data, [to](const std::string&) {}));
    while (source->reads < 2) std::this_thread::yield();
  }
  CHECK(std::chrono::steady_clock::now() - t0 < std::chrono::seconds(10));
  source->go_on();  // the readers end now, and nothing they use is gone
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
}

namespace {

// Units of odd sizes at odd offsets.
std::vector<StreamUnit> odd_units(std::mt19937* rng, int n, size_t file) {
  std::vector<StreamUnit> units;
  for (int i = 0; i < n; i++) {
    const size_t bytes = 1 + (*rng)() % (6 * kBlock);
    units.push_back({(*rng)() % (file - bytes), bytes});
  }
  return units;
}

struct Walk {
  int passes = 6;
  int leave_at = -1;  // every second pass is given up there
};

// `users` threads use the units of some passes; returns how many times they saw wrong bytes.
int wrong_bytes(WeightStream& stream, const std::vector<StreamUnit>& units, const std::vector<uint8_t>& data, int users,
                const Walk& walk, uint32_t seed) {
  std::atomic<int> wrong{0};
  const std::function<bool()> never = [] { return false; };
  for (int pass = 0; pass < walk.passes; pass++) {
    stream.begin_pass();
    const int end = walk.leave_at >= 0 && pass % 2 == 0 ? walk.leave_at : int(units.size());
    std::vector<std::thread> threads;
    for (int t = 0; t < users; t++) {
      threads.emplace_back([&, t] {
        std::mt19937 rng(seed + uint32_t(100 * pass + t));
        for (int u = 0; u < end; u++) {
          if (!stream.await(u, t == 0 ? &never : nullptr)) wrong++;
          const StreamUnit& unit = units[size_t(u)];
          if (rng() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(rng() % 300));
          for (int piece = 0; piece < unit.count; piece++) {
            const uint8_t* at = stream.address(u) + size_t(piece) * unit.bytes;
            wrong += std::memcmp(at, data.data() + unit.offset + size_t(piece) * unit.stride, unit.bytes) != 0;
          }
          stream.done(u);
        }
      });
    }
    for (std::thread& t : threads) t.join();
    wrong += !stream.end_pass().empty();
  }
  return wrong;
}

}  // namespace

TEST_CASE("the ring holds each unit's own bytes while it is used, for any size of ring, users and early ends") {
  std::mt19937 rng(17);
  const auto data = sr_test::patterned(80 * kBlock);
  for (int round = 0; round < 24; round++) {
    auto source = faulty(data);
    source->halve = round % 2 == 0;
    auto queue = std::make_shared<ReadQueue>(source, 1 + round % 4, 2 * kBlock);
    const int n = round == 0 ? 1 : 2 + int(rng() % 20), users = 1 + round % 3;
    auto units = odd_units(&rng, n, data.size());
    if (round % 2) units.push_back({rng() % 8 * kBlock, (1 + rng() % 3) * kBlock, 5, 5 * kBlock});
    const size_t ring = WeightStream::ring_floor(units) * (1 + rng() % 4) + rng() % 2 * kBlock;
    WeightStream stream(queue, units, ring, users);
    Walk walk;
    if (round % 3 == 0) walk.leave_at = n / 2;
    CHECK_EQ(wrong_bytes(stream, units, data, users, walk, uint32_t(round)), 0);
    CHECK_EQ(stream.stats().passes, walk.passes);
  }
}

TEST_CASE("reading goes on while nothing is asked for, and no unit is read twice in a pass") {
  const auto data = sr_test::patterned(64 * kBlock);
  auto source = faulty(data);
  auto queue = std::make_shared<ReadQueue>(source, 2, 64 * kBlock);
  std::vector<StreamUnit> units;
  for (int i = 0; i < 10; i++) units.push_back({uint64_t(i) * 4 * kBlock, 4 * kBlock});
  WeightStream stream(queue, units, 16 * kBlock, 1);
  CHECK_EQ(wrong_bytes(stream, units, data, 1, {5, -1}, 1), 0);
  // Five passes, and the first four units of the sixth, for which the ring has room.
  for (int i = 0; i < 2000 && source->reads < 54; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_EQ(source->reads.load(), 54);
  CHECK_EQ(stream.stats().ready + stream.stats().waited, 50);
}

TEST_CASE("a pass that cannot be read fails, and the next one is whole") {
  const auto data = sr_test::patterned(64 * kBlock);
  for (int at = 0; at < 8; at++) {
    auto source = faulty(data);
    auto queue = std::make_shared<ReadQueue>(source, 2, kBlock);
    std::vector<StreamUnit> units;
    // One piece, or two with as much between them.
    for (int i = 0; i < 8; i++) {
      if (at % 2) units.push_back({uint64_t(i) * 8 * kBlock, 2 * kBlock, 2, 4 * kBlock});
      else units.push_back({uint64_t(i) * 8 * kBlock, 8 * kBlock});
    }
    WeightStream stream(queue, units, (at % 2 ? 8 : 16) * kBlock, 1);
    const std::function<bool()> never = [] { return false; };
    stream.begin_pass();
    bool good = true;
    for (int u = 0; u < 8; u++) {
      if (u == at) source->fail_with = EIO;
      good = stream.await(u, &never) && good;
      stream.done(u);
    }
    const std::string error = stream.end_pass();
    // What was ahead in the ring when the disk broke may still carry the pass to its end.
    CHECK(good == error.empty());
    if (at < 4) CHECK(error.find("cannot read") == 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the first units of the next pass fail, unheard
    source->fail_with = 0;
    CHECK_EQ(wrong_bytes(stream, units, data, 1, {2, -1}, 1), 0);
  }
}

TEST_CASE("waiting for a stalled disk can be stopped, and what was read meanwhile harms nobody") {
  const auto data = sr_test::patterned(64 * kBlock);
  auto source = faulty(data);
  auto queue = std::make_shared<ReadQueue>(source, 2, kBlock);
  std::vector<StreamUnit> units;
  for (int i = 0; i < 8; i++) units.push_back({uint64_t(i) * 8 * kBlock, 8 * kBlock});
  WeightStream stream(queue, units, 16 * kBlock, 2);
  source->stall();
  stream.begin_pass();
  int asked = 0;
  const std::function<bool()> third = [&] { return ++asked == 3; };
  std::thread other([&] {
    CHECK(!stream.await(0, nullptr));
    stream.done(0);
  });
  CHECK(!stream.await(0, &third));
  stream.done(0);
  other.join();
  CHECK(stream.failed());
  CHECK_EQ(stream.end_pass(), "");  // stopped, not broken
  stream.begin_pass();              // its first unit waits for the reads that still hang
  CHECK(!stream.failed());
  source->go_on();
  stream.end_pass();
  CHECK_EQ(wrong_bytes(stream, units, data, 2, {4, -1}, 1), 0);
}

TEST_CASE("what stays in memory never exceeds the room, grows with it, and is spread over the layers") {
  std::mt19937 rng(5);
  for (int round = 0; round < 50; round++) {
    const int layers = 1 + int(rng() % 30);
    std::vector<sr::ResidencyItem> items;
    size_t total = 0;
    const auto add = [&](sr::WeightRank rank, int layer) {
      sr::ResidencyItem item;
      item.rank = rank;
      item.layer = layer;
      const size_t panels = 1 + rng() % 9, bytes = 1000 + rng() % 3000000;
      for (size_t i = 0; i < panels; i++) item.panels.push_back(bytes);
      total += panels * bytes;
      items.push_back(item);
    };
    for (int l = 0; l < layers; l++) {
      add(sr::WeightRank::attention, l);
      add(sr::WeightRank::ffn, l);
      add(sr::WeightRank::ffn, l);
    }
    add(sr::WeightRank::head, 0);
    if (round % 2) add(sr::WeightRank::embedding, 0);
    const sr::ResidencyPlan all = sr::plan_residency(items, total);
    CHECK_EQ(all.resident_bytes, total);
    CHECK_EQ(all.streamed_bytes, size_t(0));
    CHECK_EQ(all.ring_bytes, size_t(0));
    const sr::ResidencyPlan none = sr::plan_residency(items, 0);
    CHECK_EQ(none.resident_bytes, size_t(0));
    CHECK(none.ring_bytes > 0);
    size_t before = 0;
    for (int step = 0; step < 20; step++) {
      const size_t room = none.ring_bytes * 2 + total * size_t(step) / 20;
      const sr::ResidencyPlan plan = sr::plan_residency(items, room);
      CHECK(plan.resident_bytes + plan.ring_bytes <= room);
      CHECK(plan.resident_bytes + (32u << 20) >= before);  // a larger ring may cost a little
      before = plan.resident_bytes;
      size_t largest = 0;
      std::vector<double> share(static_cast<size_t>(layers));
      bool attention_streamed = false, ffn_left = false;
      for (size_t i = 0; i < items.size(); i++) {
        CHECK(plan.resident[i] >= 0 && plan.resident[i] <= int(items[i].panels.size()));
        const bool streamed = plan.resident[i] < int(items[i].panels.size());
        if (streamed && items[i].rank != sr::WeightRank::embedding) largest = std::max(largest, items[i].panels[0]);
        if (items[i].rank == sr::WeightRank::attention) attention_streamed = attention_streamed || streamed;
        if (items[i].rank == sr::WeightRank::ffn) ffn_left = ffn_left || plan.resident[i] > 0;
      }
      CHECK(plan.unit_bytes >= largest);
      CHECK(plan.ring_bytes >= 2 * plan.unit_bytes || !plan.streamed_bytes);
      CHECK(!attention_streamed || !ffn_left);
    }
  }
}

TEST_CASE("equal layers are streamed equally, and every part of them if not") {
  std::vector<sr::ResidencyItem> items(25);
  for (int l = 0; l < 25; l++) {
    items[size_t(l)].layer = l;
    items[size_t(l)].panels.assign(8, 2 << 20);
  }
  const sr::ResidencyPlan plan = sr::plan_residency(items, size_t(230) << 20);
  int least = 8, most = 0, first = 0;
  for (int l = 0; l < 25; l++) {
    least = std::min(least, plan.resident[size_t(l)]);
    most = std::max(most, plan.resident[size_t(l)]);
    if (l < 12) first += plan.resident[size_t(l)];
  }
  CHECK(most - least <= 1);
  int sum = 0;
  for (int r : plan.resident) sum += r;
  CHECK_NEAR(first, sum * 12 / 25.0, 3);
}
