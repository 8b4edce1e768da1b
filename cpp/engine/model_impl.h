// What stands behind the public model handle.
#pragma once

#include <atomic>
#include <memory>

#include "cuda/device.h"
#include "flash/read_queue.h"
#include "format/packed_model.h"
#include "model/decoder.h"
#include "sparse_run/engine.h"

namespace sr {

// Under a memory budget: readers of a file, and bytes that one of them reads at once.
constexpr int kReaders = 4;
constexpr int kNeuronReaders = 8;  // whose reads are short: what they wait for is mostly the disk's answer
constexpr size_t kReadUnit = size_t(1) << 20;

struct Model::Impl {
  // A session's part of a budget's memory for contexts; nothing without a budget.
  class ContextRoom {
   public:
    // Throws Error(budget) where n_ctx tokens do not fit any more.
    ContextRoom(Impl* model, int n_ctx);
    ~ContextRoom();
    // The context is about to hold n tokens.
    void use(int n);
    ContextRoom(const ContextRoom&) = delete;
    ContextRoom& operator=(const ContextRoom&) = delete;

   private:
    Impl* model_;
    int64_t bytes_ = 0;  // that it may come to take
    int64_t used_ = 0;   // that it takes
  };

  explicit Impl(const ModelOptions& options);
  MemoryStats memory() const;

  // With a budget: what weights are read from. Before all that uses it.
  std::shared_ptr<ByteSource> source;
  size_t allocated_before = 0;
  PackedModel packed;
  Decoder decoder;
  // Null: the CPU runs the model. Else the decoder above runs single layers for calibration only.
  std::unique_ptr<DevicePass> device;
  MemoryStats planned;                    // of a budget; its counters are those at the start
  std::atomic<int64_t> context_room{-1};  // bytes left for contexts, below 0: no limit

 private:
  void open_within_budget(const ModelOptions& options);
  void count(MemoryStats* m) const;  // what reads have come to; queue_depth is the sum, not the mean
  // Single neurons (neurons.cc): whether there can be any; how many, with so many bytes for all weights; and their part
  // of the statistics.
  void prepare_neurons(const ModelOptions& options);
  // Beside `room`: bytes of a prompt's block, or what else a token leaves free, and of contexts.
  int plan_neurons(const ModelOptions& options, size_t room, size_t block, size_t contexts);
  void open_neurons(const ModelOptions& options, int slots);
  void count_neurons(MemoryStats* m) const;
  int64_t gate_blocks = 0;  // of 64 gate rows, that stay
  int lent_slots = 0;       // beside those that are always there
};

}  // namespace sr
