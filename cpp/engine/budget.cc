// A model within a memory budget: everything that is not weights is counted or measured first, weights take what is
// left, and what contexts and prompts do not use yet.
#include <algorithm>
#include <cstdio>
#include <string>

#include "base/aligned_buffer.h"
#include "base/memory_info.h"
#include "engine/model_impl.h"
#include "model/attention.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
// What no counter sees: the heap of a running program, stacks, page tables, memory that the kernel holds for us.
constexpr size_t kReserve = size_t(3) << 20;
constexpr size_t kReserveShare = 1000;  // and this part of the budget
constexpr int kUsualContext = 4096, kContextStep = 256;
constexpr size_t kContextShare = 8;    // of the budget, at most, for a context that nobody asked for
constexpr size_t kUnknownProcess = size_t(96) << 20;  // where the system does not tell the resident size

std::string megabytes(size_t bytes) {
  char text[40];
  if (bytes >= size_t(10000000000)) std::snprintf(text, sizeof text, "%.1f GB", double(bytes) / 1e9);
  else std::snprintf(text, sizeof text, "%.1f MB", double(bytes) / 1e6);
  return text;
}

// Rounded up, as it would be given to --memory-budget.
std::string budget_text(size_t bytes) { return std::to_string((bytes + 999999) / 1000000) + "M"; }

size_t context_bytes(const Decoder& decoder, int n_ctx) { return decoder.context_bytes(n_ctx) + kHugePage; }

int usual_context(const Decoder& decoder, size_t budget) {
  int most = std::min(kUsualContext, decoder.config().n_ctx_train);
  if (decoder.position_limit()) most = std::min(most, decoder.position_limit());
  int n = most;
  while (n > kContextStep && context_bytes(decoder, n) > budget / kContextShare) {
    n = std::max(kContextStep, (n - 1) / kContextStep * kContextStep);
  }
  return std::min(n, most);
}

}  // namespace

void Model::Impl::open_within_budget(const ModelOptions& options) {
  MemoryStats& m = planned;
  m.budget = options.memory_budget;
  const size_t total = total_memory();
  if (total && m.budget > total) {
    throw Error(ErrorCode::budget, "a memory budget of " + megabytes(m.budget) + " is more than the " +
                                       megabytes(total) + " that this machine, or its container, has; use less");
  }
  m.n_ctx = options.n_ctx ? options.n_ctx : usual_context(decoder, m.budget);
  prepare_neurons(options);
  give_back_freed_memory();  // of the tokenizer's files, mostly
  const size_t now = resident_memory();
  m.process = now ? now : kUnknownProcess;
  const size_t block = decoder.block_bytes(kMaxBlock);
  const size_t allocated = allocated_bytes() - allocated_before;
  m.working = allocated - std::min(allocated, block) + options.extra_bytes + kReserve + m.budget / kReserveShare;
  m.contexts = context_bytes(decoder, m.n_ctx);
  const size_t fixed = m.process + m.working, most = fixed + m.contexts + std::max(block, options.aside_bytes);
  const size_t room = m.budget > most ? m.budget - most : 0;
  const int slots = plan_neurons(options, room, most - fixed - m.contexts, m.contexts);
  ResidencyPlan plan = decoder.plan_residency(room - m.neurons);
  m.floor = most + decoder.plan_residency(0).ring_bytes;
  if (most + plan.resident_bytes + plan.ring_bytes > m.budget) {
    const size_t floor = most + plan.resident_bytes + plan.ring_bytes;
    throw Error(ErrorCode::budget,
                "a memory budget of " + megabytes(m.budget) + " is below this model's floor of " + megabytes(floor) +
                    " (program and tokenizer " + megabytes(m.process) + ", buffers " +
                    megabytes(most - m.process - m.contexts) +
                    ", context of " + std::to_string(m.n_ctx) + " tokens " + megabytes(m.contexts) +
                    ", weights read ahead " + megabytes(plan.ring_bytes) + "): use --memory-budget " +
                    budget_text(floor) + " or more" +
                    (m.n_ctx > kContextStep ? ", or a smaller context (--ctx-size)" : ""));
  }
  if (kDiscardsPages) {
    const size_t shared = m.budget - fixed - m.neurons;
    decoder.share_room(shared, m.budget);
    // Single neurons stand for the FFNs: those would come back for nothing.
    if (!decoder.store())
      plan = decoder.plan_residency(shared - context_bytes(decoder, std::min(m.n_ctx, kAttentionChunk)));
  }
  auto queue = std::make_shared<ReadQueue>(source, kReaders, kReadUnit);
  decoder.load_resident(packed, plan, queue, options.progress);
  const FlashWeights& flash = *decoder.flash();
  open_neurons(options, slots);
  m.disk_rate = flash.load_bytes_per_second();
  m.direct = source->direct();
  count(&m);
  context_room = int64_t(m.contexts);
}

void Model::Impl::count(MemoryStats* m) const {
  const ReadStats reads = decoder.flash()->read_stats();
  const StreamStats stream = decoder.flash()->stream_stats();
  m->passes = stream.passes;
  m->read_bytes = reads.bytes;
  m->reads = reads.reads;
  m->read_seconds = reads.busy_seconds;
  m->queue_depth = reads.depth_seconds;
  m->hits = stream.ready;
  m->misses = stream.waited;
  m->wait_seconds = stream.wait_seconds;
  m->neuron_tokens = m->neuron_hits = m->neuron_misses = 0;
  count_neurons(m);
}

MemoryStats Model::Impl::memory() const {
  MemoryStats m = planned;
  const FlashWeights* flash = decoder.flash();
  if (!flash) return m;
  const FlashWeights::Sizes sizes = flash->sizes();
  m.contexts = size_t(std::max<int64_t>(decoder.used_for_contexts(), 0));
  m.resident = sizes.resident;
  m.ring = sizes.ring;
  m.streamed = sizes.streamed;
  count(&m);
  m.passes -= planned.passes;
  m.read_bytes -= planned.read_bytes;
  m.reads -= planned.reads;
  m.read_seconds -= planned.read_seconds;
  m.queue_depth = m.read_seconds > 0 ? (m.queue_depth - planned.queue_depth) / m.read_seconds : 0;
  m.hits -= planned.hits;
  m.misses -= planned.misses;
  m.wait_seconds -= planned.wait_seconds;
  return m;
}

Model::Impl::ContextRoom::ContextRoom(Impl* model, int n_ctx) : model_(model) {
  if (!model->planned.budget) return;
  bytes_ = int64_t(context_bytes(model->decoder, n_ctx));
  int64_t room = model->context_room.load();
  do {
    if (bytes_ > room) {
      const int64_t needed = bytes_;
      bytes_ = 0;
      throw Error(ErrorCode::budget,
                  "a context of " + std::to_string(n_ctx) + " tokens takes " + megabytes(size_t(needed)) +
                      ", and the memory budget of " + megabytes(model->planned.budget) + " was divided so that " +
                      megabytes(size_t(std::max<int64_t>(room, 0))) + " are left for it: load the model with a " +
                      "larger ctx_size (--ctx-size), or close another session first");
    }
  } while (!model->context_room.compare_exchange_weak(room, room - bytes_));
}

void Model::Impl::ContextRoom::use(int n) {
  if (!bytes_) return;
  const int64_t now = n ? int64_t(context_bytes(model_->decoder, n)) : 0;
  model_->decoder.use_for_contexts(now - used_);
  used_ = now;
}

Model::Impl::ContextRoom::~ContextRoom() {
  use(0);
  if (bytes_) model_->context_room.fetch_add(bytes_);
}

}  // namespace sr
