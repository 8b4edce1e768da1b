// Which neurons to keep: a trace of a real model (trace_neurons.py) through the pool's own policy and through others.
// Usage: replay_neurons TRACE SLOTS%...   compile with -Icpp -Icpp/include -Itests/cpp against libsr_core.a
//
//   pool     flash/neuron_pool itself, over a file in memory    static   those that were needed most while calibrating
//   lru      by last use                                        lfu      by how often, the newcomer always in
//   admit    by how often, a newcomer only in place of one needed less often
//   decay h  by how often, where a use counts half after h tokens
//   window k what the last k tokens used stays, of the rest what is needed most; where the window alone is more than
//            fits, newcomers are read and not kept
//   belady   what is needed latest goes, or is not kept: no policy that reads what it needs does better
// All begin with the neurons of each layer that were needed most while calibrating; hit rate: of neurons needed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <queue>
#include <string>
#include <vector>

#include "fault_source.h"
#include "flash/neuron_pool.h"

namespace {

constexpr uint32_t kMagic = 0x52545253;
constexpr size_t kRecord = 64;
constexpr double kCalibrated = 512;  // tokens, as trace_neurons.py takes

struct Trace {
  int layers = 0, neurons = 0, tokens = 0;
  std::vector<uint32_t> often;             // [layers, neurons] while calibrating
  std::vector<std::vector<int32_t>> need;  // by token, layer: neurons
  int all() const { return layers * neurons; }
};

Trace read_trace(const char* path) {
  std::ifstream file(path, std::ios::binary);
  uint32_t head[4] = {};
  file.read(reinterpret_cast<char*>(head), sizeof head);
  Trace t;
  if (!file || head[0] != kMagic) {
    std::fprintf(stderr, "%s is no trace of neurons\n", path);
    std::exit(1);
  }
  t.layers = int(head[1]), t.neurons = int(head[2]), t.tokens = int(head[3]);
  t.often.resize(size_t(t.all()));
  file.read(reinterpret_cast<char*>(t.often.data()), std::streamsize(t.often.size() * 4));
  std::vector<uint8_t> bits(size_t(t.neurons + 7) / 8);
  for (int i = 0; i < t.tokens * t.layers; i++) {
    file.read(reinterpret_cast<char*>(bits.data()), std::streamsize(bits.size()));
    t.need.emplace_back();
    for (int k = 0; k < t.neurons; k++) {
      if (bits[size_t(k) / 8] >> (k % 8) & 1) t.need.back().push_back(k);
    }
  }
  if (!file) {
    std::fprintf(stderr, "%s ends too early\n", path);
    std::exit(1);
  }
  return t;
}

// [layers, neurons] the place of a neuron in its layer's file: by how often it was needed.
std::vector<uint32_t> order(const Trace& t) {
  std::vector<uint32_t> position(size_t(t.all()));
  std::vector<int32_t> ids(size_t(t.neurons));
  for (int l = 0; l < t.layers; l++) {
    for (int i = 0; i < t.neurons; i++) ids[size_t(i)] = i;
    const uint32_t* often = t.often.data() + size_t(l) * t.neurons;
    std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return often[a] > often[b]; });
    for (int i = 0; i < t.neurons; i++) position[size_t(l) * t.neurons + size_t(ids[size_t(i)])] = uint32_t(i);
  }
  return position;
}

double by_pool(const Trace& t, int slots, const std::vector<uint32_t>& positions) {
  sr::NeuronPool::Shape shape;
  shape.layers = t.layers, shape.neurons = t.neurons, shape.stride = shape.bytes = kRecord, shape.held = 1;
  for (int l = 0; l < t.layers; l++) shape.offsets.push_back(uint64_t(l) * t.neurons * kRecord);
  shape.positions = positions.data();
  slots = std::max(slots, sr::NeuronPool::least_slots(shape));
  const size_t bytes = size_t(sr::align_up(size_t(t.all()) * kRecord)) + sr::kReadAlign;
  auto source = std::make_shared<sr_test::MemorySource>(std::vector<uint8_t>(bytes));
  auto queue = std::make_shared<sr::ReadQueue>(source, 1, size_t(1) << 20);
  sr::NeuronPool pool(queue, shape, slots, [](int, const uint8_t*) {}, nullptr);
  pool.fill([](size_t, size_t) { return false; });
  const std::function<bool()> never = [] { return false; };
  for (int token = 0; token < t.tokens; token++) {
    pool.begin_token();
    for (int l = 0; l < t.layers; l++) {
      const auto& ids = t.need[size_t(token) * t.layers + l];
      pool.request(l, ids.data(), int(ids.size()), sr::ReadPriority::miss);
      pool.await(l, &never);
    }
    pool.end_token();
  }
  const sr::PoolStats s = pool.stats();
  return double(s.hits) / double(s.hits + s.misses);
}

// Of the neurons that may go, the one of the lowest worth, which changes upwards only while it is among them.
struct Lowest {
  std::priority_queue<std::pair<int64_t, int>, std::vector<std::pair<int64_t, int>>, std::greater<>> heap;
  void add(int64_t worth, int id) { heap.emplace(worth, id); }
  // worth(id): what it is now, or less than 0 where it is none of them any more.
  template <class Worth>
  int peek(const Worth& worth) {
    while (!heap.empty()) {
      const auto [was, id] = heap.top();
      const int64_t now = worth(id);
      if (now == was) return id;
      heap.pop();
      if (now >= 0) heap.emplace(now, id);
    }
    return -1;
  }
};

enum class Rule { none, lru, lfu, admit, window, decay };

double by_rule(const Trace& t, int slots, const std::vector<uint32_t>& positions, Rule rule, double k) {
  std::vector<uint8_t> here(size_t(t.all())), waiting(size_t(t.all()));
  std::vector<int64_t> often(t.often.begin(), t.often.end()), last(size_t(t.all()), -1);
  Lowest lowest;
  std::vector<double> score(size_t(t.all()));  // decay: binary logarithm of the sum of 2^(token / k) of its uses
  for (int id = 0; id < t.all(); id++) {
    score[size_t(id)] = std::log2((t.often[size_t(id)] + 0.1) / kCalibrated * k);
  }
  const auto worth = [&](int id) -> int64_t {
    const size_t i = size_t(id);
    if (!here[i]) return -1;
    if (rule == Rule::decay) return int64_t(1e6 * (score[i] + 200));
    return rule == Rule::lru ? last[i] + 1 : often[i];
  };
  int held = 0;
  const int each = slots / t.layers;
  for (int id = 0; id < t.all(); id++) {
    if (positions[size_t(id)] >= uint32_t(each)) continue;
    here[size_t(id)] = 1, held++;
    lowest.add(worth(id), id);
  }
  int64_t hits = 0, needed = 0, step = 0;
  std::vector<int> used;            // window: by this token
  std::vector<std::vector<int>> of_tokens;
  for (int token = 0; token < t.tokens; token++) {
    // What leaves the window may go from now on.
    if (rule == Rule::window && token > k) {
      for (int id : of_tokens[size_t(token - int(k) - 1)]) {
        if (here[size_t(id)] && last[size_t(id)] == token - int(k) - 1) lowest.add(often[size_t(id)], id);
      }
    }
    const auto outside = [&](int id) -> int64_t {
      const bool in_window = last[size_t(id)] >= 0 && last[size_t(id)] >= token - int(k);
      return in_window ? -1 : worth(id);
    };
    used.clear();
    for (int l = 0; l < t.layers; l++, step++) {
      for (int n : t.need[size_t(token) * t.layers + l]) {
        const int id = l * t.neurons + n;
        needed++;
        often[size_t(id)]++;
        if (rule == Rule::decay) score[size_t(id)] = std::log2(std::exp2(score[size_t(id)]) + std::exp2(token / k));
        last[size_t(id)] = rule == Rule::window ? token : step;
        used.push_back(id);
        if (here[size_t(id)]) {
          hits++;
          continue;
        }
        if (rule == Rule::none) continue;
        if (held >= slots) {
          const int out = rule == Rule::window ? lowest.peek(outside) : lowest.peek(worth);
          if (out < 0) continue;
          if (rule == Rule::admit && often[size_t(out)] >= often[size_t(id)]) continue;
          here[size_t(out)] = 0;
          held--;
        }
        here[size_t(id)] = 1, held++;
        if (rule != Rule::window) lowest.add(worth(id), id);
      }
    }
    of_tokens.push_back(used);
  }
  return double(hits) / double(needed);
}

double by_belady(const Trace& t, int slots, const std::vector<uint32_t>& positions) {
  const int64_t never = int64_t(t.tokens) * t.layers;
  std::vector<std::vector<int64_t>> uses(size_t(t.all()));  // latest first
  for (int64_t step = never; step-- > 0;) {
    for (int n : t.need[size_t(step)]) uses[size_t(step % t.layers) * t.neurons + size_t(n)].push_back(step);
  }
  const auto next = [&](int id) { return uses[size_t(id)].empty() ? never : uses[size_t(id)].back(); };
  std::vector<uint8_t> here(size_t(t.all()));
  std::priority_queue<std::pair<int64_t, int>> latest;
  int held = 0;
  for (int id = 0; id < t.all(); id++) {
    if (positions[size_t(id)] >= uint32_t(slots / t.layers)) continue;
    here[size_t(id)] = 1, held++;
    latest.emplace(next(id), id);
  }
  int64_t hits = 0, needed = 0;
  for (int64_t step = 0; step < never; step++) {
    for (int n : t.need[size_t(step)]) {
      const int id = int(step % t.layers) * t.neurons + n;
      needed++;
      uses[size_t(id)].pop_back();
      hits += here[size_t(id)];
      if (!here[size_t(id)]) {
        if (held >= slots) {
          while (!here[size_t(latest.top().second)] || next(latest.top().second) != latest.top().first) latest.pop();
          if (latest.top().first <= next(id)) continue;
          here[size_t(latest.top().second)] = 0, held--;
          latest.pop();
        }
        here[size_t(id)] = 1, held++;
      }
      latest.emplace(next(id), id);
    }
  }
  return double(hits) / double(needed);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: replay_neurons TRACE SLOTS%%...\n");
    return 2;
  }
  const Trace t = read_trace(argv[1]);
  const std::vector<uint32_t> positions = order(t);
  size_t needed = 0;
  for (const auto& ids : t.need) needed += ids.size();
  std::printf("%d layers of %d neurons, %d tokens that need %.1f%%\n", t.layers, t.neurons, t.tokens,
              100.0 * double(needed) / (double(t.all()) * t.tokens));
  for (int i = 2; i < argc; i++) {
    const int slots = int(double(t.all()) * std::atof(argv[i]) / 100);
    const auto tell = [](const char* name, double rate) {
      std::printf("  %s %.1f", name, 100 * rate);
      std::fflush(stdout);
    };
    std::printf("slots %s%%:", argv[i]);
    tell("pool", by_pool(t, slots, positions));
    tell("static", by_rule(t, slots, positions, Rule::none, 0));
    tell("lru", by_rule(t, slots, positions, Rule::lru, 0));
    tell("lfu", by_rule(t, slots, positions, Rule::lfu, 0));
    tell("admit", by_rule(t, slots, positions, Rule::admit, 0));
    for (int k : {1, 2, 4}) {
      tell(("window " + std::to_string(k)).c_str(), by_rule(t, slots, positions, Rule::window, k));
    }
    for (int h : {4, 16, 64}) {
      tell(("decay " + std::to_string(h)).c_str(), by_rule(t, slots, positions, Rule::decay, h));
    }
    tell("belady", by_belady(t, slots, positions));
    std::printf("\n");
  }
  return 0;
}
