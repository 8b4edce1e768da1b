// A budget's part for single neurons: what decoding with sets or a predictor keeps in memory instead of whole FFNs.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

#include "engine/model_impl.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

// Of all neurons: what is worth a slot where gates choose. Below it a slot saves reads of its own, beyond it the same
// memory saves more as gate rows, of which long reads are made (README.md).
constexpr double kSurvivors = 0.25;

}  // namespace

void Model::Impl::prepare_neurons(const ModelOptions& options) {
  const bool by_gate = options.by_gate && !(options.neuron_share > 0);
  if (!(options.neuron_share > 0) && !by_gate) return;
  MemoryStats& m = planned;
  const std::string path = NeuronFile::path_in(packed.directory());
  m.no_neurons = decoder.store_refusal();
  if (m.no_neurons.empty() && !std::ifstream(path).good()) {
    m.no_neurons = "there is no " + path + ": convert the model with --order";
  }
  if (!m.no_neurons.empty()) return;
  const NeuronStore* store = decoder.make_store(packed, open_direct(path), by_gate);
  if (store->gates()) m.no_neurons = store->gates()->refusal();
  if (!m.no_neurons.empty()) decoder.drop_store();
}

// As many slots as the neurons that are needed, or as fit beside attention and head, which no FFN should drive out.
// Where gates choose: slots for what one token is likely to need, because reading neurons one by one costs most; then
// gate rows, which every token needs; then more slots.
int Model::Impl::plan_neurons(const ModelOptions& options, size_t room, size_t block, size_t contexts) {
  MemoryStats& m = planned;
  const NeuronStore* store = decoder.store();
  if (!store) return 0;
  if (store->gates() && !decoder.plan_residency(room).streamed_bytes) {  // all weights stay
    decoder.drop_store();
    return 0;
  }
  const size_t rest = decoder.room_without_ffn();
  const GateRows* gates = store->gates();
  const int64_t least = store->least_slots(), all = std::max<int64_t>(store->all_neurons(), least);
  const double share = gates ? kSurvivors : std::min(options.neuron_share, 1.0);
  // A list that is complete in memory while the one after it is read.
  const int64_t wanted = std::min(all, int64_t(std::ceil(share * double(store->all_neurons()))) + least);
  // While a token is decoded, what a prompt's block, contexts and the ring would take.
  const size_t ring = decoder.plan_residency(rest).ring_bytes;
  const size_t idle = kDiscardsPages ? (block + contexts + ring) / store->slot_bytes() : 0;
  const int64_t lent = std::min(int64_t(idle), wanted), tables = int64_t(store->idle_slot_bytes()) * lent;
  const size_t taken = rest + size_t(tables), most = room > taken ? room - taken : 0;
  // The most of low .. high that fit.
  const auto most_of = [](int64_t low, int64_t high, const auto& fits) {
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (fits(middle)) low = middle;
      else high = middle - 1;
    }
    return low;
  };
  const auto slots_beside = [&](int64_t high, int64_t blocks) {
    const size_t taken = gates ? gates->bytes(blocks) : 0;
    return most_of(0, high, [&](int64_t n) { return store->bytes(n) + taken <= most; });
  };
  int64_t slots = slots_beside(gates ? wanted - lent : wanted, 0);
  // What only a prompt's block takes is there for every token.
  const size_t spare = std::min(block, NeuronStore::kLendSpare);
  const int64_t in_block = int64_t((block - spare) / store->slot_bytes()) / kNeuronBlock * kNeuronBlock;
  const bool fit = store->bytes(slots) + (gates ? gates->bytes(0) : 0) <= most;  // not even none may fit
  const int64_t sure = fit ? slots + std::min(lent / kNeuronBlock * kNeuronBlock, in_block) : 0;
  if (sure < least) {
    m.no_neurons = "the budget leaves room for " + std::to_string(sure) + " of them beside attention and head, " +
                   std::to_string(least) + " are the fewest";
    decoder.drop_store();
    return 0;
  }
  if (gates) {
    const auto fits = [&](int64_t n) { return store->bytes(slots) + gates->bytes(n) <= most; };
    const int64_t blocks = gates->all_blocks();
    gate_blocks = fits(blocks) ? blocks : most_of(0, blocks - 1, fits);  // all of them need no ring
    if (gate_blocks == gates->all_blocks()) slots = slots_beside(all, gate_blocks);
    m.gates = gates->bytes(gate_blocks);
    m.gates_streamed = gates->streamed_bytes(gate_blocks);
  }
  lent_slots = int(std::max<int64_t>(0, std::min(lent, (gates ? all : wanted) - slots)));
  m.neurons = store->bytes(slots) + size_t(tables) + m.gates;
  m.neuron_slots = slots + lent_slots;
  return int(slots);
}

void Model::Impl::open_neurons(const ModelOptions& options, int slots) {
  if (decoder.store()) decoder.open_store(slots, lent_slots, gate_blocks, kNeuronReaders, kReadUnit, options.progress);
}

void Model::Impl::count_neurons(MemoryStats* m) const {
  const NeuronStore* store = decoder.store();
  if (!store) return;
  const ReadStats reads = store->read_stats();
  const PoolStats pool = store->pool().stats();
  m->passes += pool.tokens;
  m->read_bytes += reads.bytes;
  m->reads += reads.reads;
  m->read_seconds += reads.busy_seconds;
  m->queue_depth += reads.depth_seconds;
  m->wait_seconds += pool.wait_seconds;
  if (store->gates()) {
    const StreamStats gates = store->gates()->stats();
    m->wait_seconds += gates.wait_seconds;
    m->hits += gates.ready;
    m->misses += gates.waited;
  }
  if (pool.tokens) m->neuron_slots = store->pool().limit();
  m->neuron_tokens += pool.tokens;
  m->neuron_hits += pool.hits;
  m->neuron_misses += pool.misses;
  if (m->disk_rate == 0) m->disk_rate = store->load_bytes_per_second();
}

}  // namespace sr
