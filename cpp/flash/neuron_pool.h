// Single neurons of all layers in memory: slots that are filled from records of a file as tokens need them, and given
// to others by how often they were needed lately.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "flash/read_queue.h"

namespace sr {

struct PoolStats {
  int64_t tokens = 0;
  int64_t hits = 0;         // neurons that were asked for and in memory, or on their way there
  int64_t misses = 0;       // neurons that had to be read
  double wait_seconds = 0;  // of the calling thread
};

class NeuronPool {
 public:
  struct Shape {
    int layers = 0, neurons = 0;    // of each layer
    size_t stride = 0;              // bytes from a record to the next one
    size_t bytes = 0;               // of a record
    std::vector<uint64_t> offsets;  // of the file, by layer: where its first record begins
    // [layers, neurons] which record of its layer a neuron is; lives as long as readers
    const uint32_t* positions = nullptr;
    // Layers whose neurons stay, the last one asked for included: 2 where it is asked for while one is computed.
    int held = 2;
    size_t gap = size_t(16) << 10;  // bytes that nobody asked for and that are read through at most
  };
  // Puts a record into a slot; called by readers, for slots that nobody else looks at. Must keep alive what it writes
  // to.
  using Place = std::function<void(int slot, const uint8_t* record)>;

  // slots >= least_slots: all neurons of the layers that are held, and what an earlier token that was given up has left
  // in progress.
  NeuronPool(std::shared_ptr<ReadQueue> queue, const Shape& shape, int slots, Place place, std::shared_ptr<void> keep);
  ~NeuronPool();
  NeuronPool(const NeuronPool&) = delete;
  NeuronPool& operator=(const NeuronPool&) = delete;

  static int least_slots(const Shape& shape);
  // Bytes that the pool takes beside its slots: tables, and room for reads in progress.
  static size_t table_bytes(const Shape& shape, int64_t slots);

  int slots() const;
  // Between tokens: slots [0, n) are used, at least least_slots() of them while a token is; the memory of the others is
  // the caller's, but for what is being read into them after a token that was given up.
  void limit(int n);
  int limit() const;
  // Fills free slots with the first records of every layer, in long reads. Returns why that failed, or the empty text;
  // "cancelled" when should_stop, asked every 20 ms with the bytes done and to do, says so.
  std::string fill(const std::function<bool(size_t done, size_t total)>& should_stop);

  // From one thread: a token begins; then the layers in order, each once. What was asked for since the last Shape::held
  // layers began stays.
  void begin_token();
  void begin_layer(int layer);
  // From every thread, each neuron once: what the layer needs (ids null: the first n neurons) is on its way when this
  // returns true; false: a read of this token has failed before, and nothing was asked for.
  bool add(int layer, const int32_t* ids, int n, ReadPriority priority);
  void request(int layer, const int32_t* ids, int n, ReadPriority priority) {
    begin_layer(layer);
    add(layer, ids, n, priority);
  }
  // Whether a neuron that was requested was not in memory then.
  bool missing(int layer, int neuron) const {
    return missing_[size_t(layer % 2) * size_t(neurons_) + size_t(neuron)] != 0;
  }
  // From every thread: waits until what it has seen asked for is in memory; false: a read has failed, or should_stop
  // (or null) said so, and nothing of this token is of use.
  bool await(int layer, const std::function<bool()>* should_stop);
  // The slot of a neuron that was requested and awaited.
  int slot(int layer, int neuron) const { return slot_of_[size_t(layer) * size_t(neurons_) + size_t(neuron)]; }
  bool failed() const;  // or stopped
  // The token is over, whole or not. Returns why it failed, or the empty text.
  std::string end_token();
  PoolStats stats() const;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
  std::shared_ptr<ReadQueue> queue_;
  int neurons_;
  const int32_t* slot_of_;
  const uint8_t* missing_;
};

}  // namespace sr
