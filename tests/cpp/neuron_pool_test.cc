// Slots of single neurons: each holds its own record while it is used, whatever is asked for, read, lost or given up.
#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "check.h"
#include "fault_source.h"
#include "flash/neuron_pool.h"

using sr::NeuronPool;
using sr::ReadPriority;
using sr::ReadQueue;
using sr_test::FaultSource;
using sr_test::MemorySource;

namespace {

// A file of records, slots to put them in, and a pool between them.
struct Rig {
  Rig(int layers, int neurons, size_t stride, size_t bytes, int more_slots, uint32_t seed)
      : data(sr_test::patterned(size_t(layers) * neurons * stride + 3 * sr::kReadAlign)),
        source(std::make_shared<FaultSource>(std::make_shared<MemorySource>(data))),
        positions(size_t(layers) * neurons) {
    std::mt19937 rng(seed);
    shape.layers = layers;
    shape.neurons = neurons;
    shape.stride = stride;
    shape.bytes = bytes;
    for (int l = 0; l < layers; l++) {
      shape.offsets.push_back(sr::kReadAlign + uint64_t(l) * neurons * stride);
      const auto begin = positions.begin() + ptrdiff_t(l) * neurons;
      for (int i = 0; i < neurons; i++) begin[i] = uint32_t(i);
      std::shuffle(begin, begin + neurons, rng);
    }
    shape.positions = positions.data();
    const int n = std::min(NeuronPool::least_slots(shape) + more_slots, layers * neurons + neurons * 3);
    memory = std::make_shared<std::vector<uint8_t>>(size_t(n) * bytes);
    pool = std::make_unique<NeuronPool>(
        std::make_shared<ReadQueue>(source, 3, 4 * sr::kReadAlign), shape, n,
        [m = memory, bytes](int slot, const uint8_t* r) { std::memcpy(m->data() + size_t(slot) * bytes, r, bytes); },
        nullptr);
  }
  // Whether a neuron's slot holds its record.
  bool right(int layer, int neuron) const {
    const size_t at = size_t(shape.offsets[size_t(layer)]) +
                      positions[size_t(layer) * size_t(shape.neurons) + size_t(neuron)] * shape.stride;
    return std::memcmp(memory->data() + size_t(pool->slot(layer, neuron)) * shape.bytes, data.data() + at,
                       shape.bytes) == 0;
  }
  std::vector<uint8_t> data;
  std::shared_ptr<FaultSource> source;
  std::vector<uint32_t> positions;
  NeuronPool::Shape shape;
  std::shared_ptr<std::vector<uint8_t>> memory;
  std::unique_ptr<NeuronPool> pool;
};

std::vector<int32_t> some_of(int neurons, double share, std::mt19937* rng) {
  std::vector<int32_t> ids;
  for (int i = 0; i < neurons; i++) {
    if ((*rng)() % 1000 < share * 1000) ids.push_back(i);
  }
  return ids;
}

const std::function<bool()> kNever = [] { return false; }, kNow = [] { return true; };

// Tokens of random lists, the next layer's asked for while `users` threads look at this one's; returns what was wrong.
int wrong_slots(Rig& rig, int tokens, double share, int users, std::mt19937* rng) {
  std::atomic<int> wrong{0};
  for (int token = 0; token < tokens; token++) {
    rig.pool->begin_token();
    std::vector<std::vector<int32_t>> lists;
    for (int l = 0; l < rig.shape.layers; l++) lists.push_back(some_of(rig.shape.neurons, share, rng));
    const auto ask = [&](int l) {
      std::vector<bool> there;
      for (int id : lists[size_t(l)]) there.push_back(rig.pool->slot(l, id) >= 0);
      rig.pool->request(l, lists[size_t(l)].data(), int(lists[size_t(l)].size()), ReadPriority::miss);
      // What was not there is told from what was; of what is on its way, either.
      for (size_t i = 0; i < there.size(); i++) wrong += !there[i] && !rig.pool->missing(l, lists[size_t(l)][i]);
    };
    ask(0);
    for (int l = 0; l < rig.shape.layers; l++) {
      for (int id : lists[size_t(l)]) wrong += !rig.pool->missing(l, id) && !rig.right(l, id);
      if (!rig.pool->await(l, &kNever)) return -1;
      std::vector<std::thread> threads;
      for (int t = 0; t < users; t++) {
        threads.emplace_back([&, t] {
          if (t == 0 && l + 1 < rig.shape.layers) ask(l + 1);
          for (int id : lists[size_t(l)]) wrong += !rig.right(l, id);
        });
      }
      for (auto& t : threads) t.join();
    }
    if (!rig.pool->end_token().empty()) return -1;
  }
  return wrong;
}

}  // namespace

TEST_CASE("every slot holds its neuron's record while it is used, for any size of records, slots and lists") {
  std::mt19937 rng(5);
  for (int round = 0; round < 14; round++) {
    const size_t bytes = round % 3 == 0 ? 4096 : 64 * (1 + rng() % 70),
                 stride = (bytes + 63) / 64 * 64 + (round % 2) * 64;
    const int layers = 1 + round % 4, neurons = 32 + int(rng() % 60);
    Rig rig(layers, neurons, stride, bytes, int(rng() % 100), uint32_t(round));
    rig.source->halve = round % 4 == 1;
    if (round % 2) CHECK(rig.pool->fill(nullptr).empty());
    for (double share : {0.1, 0.5, 1.0, 0.0, 0.3}) CHECK_EQ(wrong_slots(rig, 4, share, 2, &rng), 0);
  }
}

TEST_CASE(
    "threads may ask for parts of a layer while others compute, with slots for one layer and what is in progress") {
  std::mt19937 rng(6);
  Rig two(5, 128, 1024, 1000, 0, 3);
  sr::NeuronPool::Shape shape = two.shape;
  shape.held = 1;
  shape.gap = 0;
  const int slots = NeuronPool::least_slots(shape);
  CHECK(slots < two.pool->slots());
  auto memory = std::make_shared<std::vector<uint8_t>>(size_t(slots) * shape.bytes);
  NeuronPool pool(
      std::make_shared<ReadQueue>(two.source, 3, 4 * sr::kReadAlign), shape, slots,
      [memory, bytes = shape.bytes](int slot, const uint8_t* r) {
        std::memcpy(memory->data() + size_t(slot) * bytes, r, bytes);
      },
      nullptr);
  std::atomic<int> wrong{0};
  for (int token = 0; token < 12; token++) {
    const double share = token % 3 == 0 ? 1 : 0.3;
    pool.begin_token();
    for (int l = 0; l < shape.layers; l++) {
      const auto ids = some_of(shape.neurons, share, &rng);
      pool.begin_layer(l);
      std::vector<std::thread> threads;
      for (int t = 0; t < 3; t++) {
        threads.emplace_back([&, t] {
          const int begin = int(ids.size()) * t / 3, end = int(ids.size()) * (t + 1) / 3, middle = (begin + end) / 2;
          pool.add(l, ids.data() + begin, middle - begin, ReadPriority::miss);
          pool.add(l, ids.data() + middle, end - middle, ReadPriority::miss);
          const auto look = [&](bool missing) {
            for (int i = begin; i < end; i++) {
              if (pool.missing(l, ids[size_t(i)]) != missing) continue;
              const size_t at =
                  size_t(shape.offsets[size_t(l)]) +
                  shape.positions[size_t(l) * size_t(shape.neurons) + size_t(ids[size_t(i)])] * shape.stride;
              const uint8_t* slot = memory->data() + size_t(pool.slot(l, ids[size_t(i)])) * shape.bytes;
              wrong += std::memcmp(slot, two.data.data() + at, shape.bytes) != 0;
            }
          };
          look(false);
          wrong += !pool.await(l, t == 0 ? &kNever : nullptr);
          look(true);
        });
      }
      for (auto& t : threads) t.join();
    }
    CHECK_EQ(pool.end_token(), std::string());
  }
  CHECK_EQ(wrong, 0);
}

TEST_CASE("what was asked for stays: a list that fits is read once, and one that does not mostly stays") {
  std::mt19937 rng(9);
  Rig rig(4, 128, 4096, 4096, 0, 3);  // slots for two lists and what may be in progress
  const int slots = rig.pool->slots();
  CHECK(slots >= 256);
  const auto token = [&](int each) {
    rig.pool->begin_token();
    const auto before = rig.pool->stats();
    for (int l = 0; l < 4; l++) {
      rig.pool->request(l, nullptr, each, ReadPriority::miss);
      CHECK(rig.pool->await(l, &kNever));
    }
    CHECK(rig.pool->end_token().empty());
    return rig.pool->stats().misses - before.misses;
  };
  const int fits = slots / 4;
  CHECK_EQ(token(fits), 4 * fits);
  for (int i = 0; i < 3; i++) CHECK_EQ(token(fits), 0);
  const auto reads = rig.source->reads.load();
  CHECK_EQ(token(fits), 0);
  CHECK_EQ(rig.source->reads.load(), reads);
  // A quarter more than fits: not all of it is read again for every token, as it would be if the oldest went first.
  const int more = std::min(128, fits * 5 / 4);
  for (int i = 0; i < 4; i++) token(more);
  CHECK(token(more) <= 4 * (more - fits) + 3 * more);
  CHECK_EQ(rig.pool->stats().tokens, 10);
}

TEST_CASE("slots that are lent come and go between tokens, and hold what they should while they are there") {
  std::mt19937 rng(8);
  Rig rig(4, 96, 1024, 1000, 120, 3);
  const int all = rig.pool->slots(), least = NeuronPool::least_slots(rig.shape);
  CHECK(all > least);
  CHECK(rig.pool->fill(nullptr).empty());
  for (int round = 0; round < 8; round++) {
    const int n = round % 3 == 0 ? least : round % 3 == 1 ? all : least + int(rng() % uint32_t(all - least));
    rig.pool->limit(n);
    CHECK_EQ(rig.pool->limit(), n);
    CHECK_EQ(wrong_slots(rig, 3, 0.6, 2, &rng), 0);
    for (int l = 0; l < 4; l++) {
      for (int i = 0; i < 96; i++) CHECK(rig.pool->slot(l, i) < n);
    }
  }
  // None between two tokens, as a prompt's block wants it.
  rig.pool->limit(0);
  for (int i = 0; i < 96; i++) CHECK_EQ(rig.pool->slot(1, i), -1);
  rig.pool->limit(all);
  CHECK_EQ(wrong_slots(rig, 3, 1.0, 2, &rng), 0);
}

TEST_CASE("the hot beginning of the file is there from the start, by few long reads") {
  Rig rig(3, 128, 1024, 1000, 0, 3);
  const int64_t before = rig.source->reads;
  size_t last = 0, total = 0;
  CHECK(rig.pool->fill([&](size_t done, size_t all) {
    last = done;
    total = all;
    return false;
  }).empty());
  CHECK(last <= total);
  const int each = rig.pool->slots() / 3;
  CHECK(rig.source->reads - before <= 3 * (each * 1024 / (4 * int(sr::kReadAlign)) + 2));
  rig.pool->begin_token();
  std::vector<int32_t> hot;
  for (int i = 0; i < 128; i++) {
    if (int(rig.positions[size_t(i)]) < std::min(each, 128)) hot.push_back(i);
  }
  rig.pool->request(0, hot.data(), int(hot.size()), ReadPriority::miss);
  CHECK(rig.pool->await(0, &kNever));
  CHECK_EQ(rig.pool->stats().misses, 0);
  CHECK_EQ(rig.pool->stats().hits, int64_t(hot.size()));
  for (int id : hot) CHECK(rig.right(0, id));
  CHECK_EQ(rig.pool->end_token(), std::string());
}

TEST_CASE("a token that cannot be read fails with the file's name, and the next one is whole") {
  std::mt19937 rng(2);
  Rig rig(3, 96, 512, 500, 20, 3);
  for (int round = 0; round < 6; round++) {
    rig.source->fail_with = EIO;
    rig.pool->begin_token();
    const auto ids = some_of(96, 0.9, &rng);
    bool good = true;
    for (int l = 0; good && l < 3; l++) {
      rig.pool->request(l, ids.data(), int(ids.size()), ReadPriority::miss);
      good = rig.pool->await(l, &kNever);
    }
    const int more = 7;
    CHECK(rig.pool->add(2, &more, 0, ReadPriority::miss) == good);  // nothing is asked for any more, and that is said
    const std::string error = rig.pool->end_token();
    CHECK(good == error.empty());
    if (round == 0) CHECK(error.find("cannot read") == 0);
    rig.source->fail_with = 0;
    if (round % 2) CHECK_EQ(wrong_slots(rig, 3, 0.4, 2, &rng), 0);
  }
}

TEST_CASE("waiting for a stalled disk can be stopped, tokens after it are whole, and the pool may go meanwhile") {
  std::mt19937 rng(2);
  {
    Rig rig(3, 96, 4096, 4000, 5, 3);
    for (int round = 0; round < 4; round++) {
      rig.source->stall();
      rig.pool->begin_token();
      const auto ids = some_of(96, 1, &rng);
      for (int l = 0; l < 3; l++) {
        rig.pool->request(l, ids.data(), int(ids.size()), ReadPriority::miss);
        std::atomic<int> asked{0};
        const std::function<bool()> soon = [&] { return ++asked > 1; };
        std::thread other([&] { rig.pool->await(l, nullptr); });
        const bool good = rig.pool->await(l, &soon);
        other.join();
        if (!good) break;
      }
      CHECK_EQ(rig.pool->end_token(), std::string());
      rig.source->go_on();
      CHECK_EQ(wrong_slots(rig, 3, 0.6, 2, &rng), 0);
    }
  }
  Rig rig(2, 96, 4096, 4000, 5, 3);
  rig.source->stall();
  rig.pool->begin_token();
  rig.pool->request(0, nullptr, 96, ReadPriority::miss);
  while (rig.source->reads < 2) std::this_thread::yield();
  rig.pool.reset();
  rig.source->go_on();  // the readers end now, and nothing they use is gone
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
}

TEST_CASE("what every token needs stays, however much else is needed in turn") {
  std::mt19937 rng(6);
  constexpr int kNeurons = 192, kHot = 40, kOthers = 60, kTokens = 40;
  Rig rig(8, kNeurons, 4096, 4000, 0, 5);
  CHECK(rig.pool->slots() < 8 * (kHot + kOthers));  // by last use alone, nothing would be there when it is needed again
  int hot_misses = 0, changes = 0;
  for (int token = 0; token < kTokens; token++) {
    const int hot = token < kTokens / 2 ? 0 : kNeurons - kHot;  // a text that changes
    rig.pool->begin_token();
    for (int l = 0; l < 8; l++) {
      std::vector<int32_t> ids;
      for (int i = 0; i < kHot; i++) ids.push_back(hot + i);
      while (int(ids.size()) < kHot + kOthers) {
        const int32_t id = int32_t(kHot + rng() % (kNeurons - 2 * kHot));
        if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
      }
      rig.pool->request(l, ids.data(), int(ids.size()), ReadPriority::miss);
      const bool settled = token % (kTokens / 2) >= kTokens / 4;
      for (int i = 0; i < kHot; i++) (settled ? hot_misses : changes) += rig.pool->missing(l, ids[size_t(i)]);
      CHECK(rig.pool->await(l, &kNever));
    }
    CHECK_EQ(rig.pool->end_token(), std::string());
  }
  CHECK_EQ(hot_misses, 0);
  CHECK(changes >= 8 * kHot);  // all of the second ones, at least
}

TEST_CASE("neurons that a token left behind in slots which are then taken away are read anew") {
  std::mt19937 rng(4);
  Rig rig(8, 96, 4096, 4000, 150, 3);
  const int all = rig.pool->slots(), least = NeuronPool::least_slots(rig.shape);
  int left_behind = 0;
  for (int round = 0; round < 12; round++) {
    const int layer = round % 8;  // not one that is needed more than others: all of it would be there
    rig.pool->limit(all);
    CHECK_EQ(wrong_slots(rig, 2, 0.5, 2, &rng), 0);  // the next ones go anywhere
    rig.source->stall();
    rig.pool->begin_token();
    const auto ids = some_of(96, 1, &rng);
    rig.pool->request(layer, ids.data(), int(ids.size()), ReadPriority::miss);
    CHECK(!rig.pool->await(layer, &kNow));
    rig.pool->end_token();
    for (int id : ids) left_behind += rig.pool->slot(layer, id) >= least && rig.pool->missing(layer, id);
    rig.pool->limit(least);
    rig.pool->begin_token();
    rig.pool->request(layer, ids.data(), int(ids.size()), ReadPriority::miss);
    rig.source->go_on();
    CHECK(rig.pool->await(layer, &kNever));
    for (int id : ids) CHECK(rig.pool->slot(layer, id) >= 0 && rig.right(layer, id));
    CHECK_EQ(rig.pool->end_token(), std::string());
  }
  CHECK(left_behind > 0);
}
