// Memory that is needed only now and then is lent to the weights: what a prompt's blocks and a context that is still
// short do not use keeps panels resident. They give way before the pass that needs it, and are read again after it.
#include <algorithm>

#include "base/memory_info.h"
#include "model/decoder.h"
#include "model/decoder_buffers.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kBuffers = 40;                  // of a block, each with a page that is begun
constexpr size_t kMargin = size_t(1) << 20;      // that the process stays below its budget
constexpr size_t kWorthwhile = 64;               // a smaller part of what is streamed is not brought back
constexpr int kMeasureEvery = 16;                // passes

}  // namespace

void Decoder::share_room(size_t room, size_t budget) {
  shared_room_ = room;
  budget_ = budget;
  room_seen_ = SIZE_MAX;
}

size_t Decoder::block_bytes(int n) const {
  if (n <= 0) return 0;
  const Block& b = *block_;
  const size_t all = b.x.bytes() + b.in.bytes() + b.att.bytes() + b.z.bytes() + b.qkv.bytes() + b.branch_o.bytes() +
                     b.branch_down.bytes() + b.rope_table.bytes() + b.rope_table_local.bytes() +
                     size_t(kMaxBlock) * size_t(config_.n_embd) * sizeof(float);  // fetched_rows_
  return all / kMaxBlock * size_t(n) + kBuffers * kPage;
}

std::string Decoder::make_room(const Pass& pass) {
  if (!shared_room_) return "";
  const bool block = pass.n > 1 || pass.one;
  if (block) {
    block_rows_ = std::max(block_rows_, pass.n);
  } else {
    give_back_block();
  }
  // The process may grow by what this library does not know of: weights give way to it as well.
  if (passes_unmeasured_++ % kMeasureEvery == 0) {
    const size_t now = resident_memory();
    if (now + kMargin > budget_) shared_room_ -= std::min(shared_room_ - 1, now + kMargin - budget_);
  }
  if (store_ && !pass.stored) store_->lend(0);
  // What a block leaves, the next one would take back, and what a token leaves is lent to single neurons.
  if (pass.stored && flash_->parked()) {
    if (lend_to_store(*pass.should_stop)) return "";
    store_->lend(0);
  }
  const std::string error = fit_room(!block && !pass.stored, *pass.should_stop);
  if (!pass.stored || !error.empty() || lend_to_store(*pass.should_stop)) return error;
  const ResidencyPlan& plan = flash_->plan();
  const size_t taken = room_taken() + plan.resident_bytes + plan.ring_bytes;
  store_->lend(shared_room_ - std::min(shared_room_, taken));
  return error;
}

// Tokens that work from single neurons stream nothing: what the ring takes is lent as well, where that gives slots
// enough. False: it does not, or what is resident has to give way first, or there was no time to end its reads.
bool Decoder::lend_to_store(const std::function<bool()>& should_stop) {
  const size_t taken = room_taken() + flash_->plan().resident_bytes;
  const size_t free = shared_room_ - std::min(shared_room_, taken);
  if (taken > shared_room_ || !store_->enough_with(free) || !flash_->park(should_stop)) return false;
  store_->lend(free);
  return true;
}

size_t Decoder::room_taken() const {
  return size_t(std::max<int64_t>(contexts_used_.load(), 0)) + block_bytes(block_rows_) + aside_;
}

void Decoder::give_back_block() {
  if (!block_rows_) return;
  Block& b = *block_;
  b.x.give_back();
  b.in.give_back();
  b.att.give_back();
  b.z.give_back();
  b.qkv.give_back();
  b.branch_o.give_back();
  b.branch_down.give_back();
  b.rope_table.give_back();
  b.rope_table_local.give_back();
  fetched_rows_.give_back();
  block_rows_ = 0;
}

// The turn is the caller's.
std::string Decoder::fit_room(bool may_grow, const std::function<bool()>& should_stop) {
  const size_t taken = room_taken();
  const size_t room = shared_room_ - std::min(shared_room_, taken);
  if (flash_->parked() && flash_->plan().resident_bytes + flash_->plan().ring_bytes <= room) {
    const std::string error = flash_->resize(ResidencyPlan(flash_->plan()), should_stop);
    if (!error.empty()) return error;
  }
  if (flash_->usable() && room == room_seen_) return "";
  const ResidencyPlan& now = flash_->plan();
  const bool fits = flash_->usable() && now.resident_bytes + now.ring_bytes <= room;
  if (fits && (!may_grow || !now.streamed_bytes)) return "";
  // Beside single neurons, panels of FFNs do not come back.
  const ResidencyPlan plan = plan_residency(fits && store_ ? std::min(room, room_without_ffn()) : room);
  const size_t saved = now.streamed_bytes - std::min(now.streamed_bytes, plan.streamed_bytes);
  if (fits && saved < now.streamed_bytes / kWorthwhile) {
    room_seen_ = room;
    return "";
  }
  const std::string error = flash_->resize(plan, should_stop);
  if (error.empty()) room_seen_ = room;
  return error;
}

void Decoder::set_aside(size_t bytes, bool for_good) {
  std::lock_guard<FairMutex> lock(turn_);
  if (!shared_room_) return;
  if (for_good) shared_room_ -= std::min(shared_room_ - 1, bytes);
  else aside_ = bytes;
  if (!bytes) return;
  if (store_) store_->lend(0);
  give_back_block();
  const std::string error = fit_room(false, [] { return false; });
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
}

}  // namespace sr
