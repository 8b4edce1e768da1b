// A budget's part for single neurons: what decoding with sets or a predictor keeps in memory instead of whole FFNs.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

#include "engine/model_impl.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kReaders = 4;
constexpr size_t kReadUnit = size_t(1) << 20;

}  // namespace

void Model::Impl::prepare_neurons(const ModelOptions& options) {
  if (!(options.neuron_share > 0)) return;
  MemoryStats& m = planned;
  const std::string path = NeuronFile::path_in(packed.directory());
  m.no_neurons = decoder.store_refusal();
  if (m.no_neurons.empty() && !std::ifstream(path).good()) {
    m.no_neurons = "there is no " + path + ": convert the model with --order";
  }
  if (m.no_neurons.empty()) decoder.make_store(packed, open_direct(path));
}

// As many slots as the neurons that are needed, or as fit beside attention and head, which no FFN should drive out.
int Model::Impl::plan_neurons(const ModelOptions& options, size_t room) {
  MemoryStats& m = planned;
  m.neurons = 0;
  const NeuronStore* store = decoder.store();
  if (!store) return 0;
  const size_t rest = decoder.room_without_ffn(), most = room > rest ? room - rest : 0;
  const int64_t all = std::max<int64_t>(store->all_neurons(), store->least_slots());
  const double share = std::min(options.neuron_share, 1.0);
  // A list that is complete in memory while the one after it is read.
  const int64_t wanted = std::min(all, int64_t(std::ceil(share * double(store->all_neurons()))) + store->least_slots());
  int64_t low = 0, high = wanted;  // the most that fit
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (store->bytes(middle) <= most) low = middle;
    else high = middle - 1;
  }
  if (low < store->least_slots()) {
    m.no_neurons = "the budget leaves room for " + std::to_string(low) + " of them beside attention and head, " +
                   std::to_string(store->least_slots()) + " are the fewest";
    decoder.drop_store();
    return 0;
  }
  m.neurons = store->bytes(low);
  m.neuron_slots = low;
  return int(low);
}

void Model::Impl::open_neurons(const ModelOptions& options, int slots) {
  if (slots) decoder.open_store(slots, kReaders, kReadUnit, options.progress);
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
  m->neuron_tokens += pool.tokens;
  m->neuron_hits += pool.hits;
  m->neuron_misses += pool.misses;
  if (m->disk_rate == 0) m->disk_rate = store->load_bytes_per_second();
}

}  // namespace sr
