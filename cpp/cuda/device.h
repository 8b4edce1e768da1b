// The GPU as the engine sees it, whether or not this build has one: no CUDA header is included here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/decoder.h"

namespace sr {

class PackedModel;

// What a model may take of a device.
struct DeviceOptions {
  size_t memory = 0;  // bytes; 0: what is free less a reserve
  int n_ctx = 0;      // tokens for whose keys and values room is kept; 0: 4096, or what the model was trained for
  int threads = 1;    // of the CPU, for what does not fit
};

// What the memory of a device holds of a model, in bytes.
struct DeviceStats {
  size_t budget = 0;       // that weights, working memory and contexts may take there
  size_t floor = 0;        // the smallest budget: no neuron there
  size_t weights = 0;      // there
  size_t cpu_weights = 0;  // of the FFNs' neurons that did not fit: the CPU computes them
  int cpu_layers = 0;      // that have such neurons
  double hot_share = 1;    // of all neurons, those on the device
};

constexpr int kDeviceTop = 256;
// The likeliest tokens, kDeviceTop or all, as engine.h's TopTokens has them; no ids: unknown.
struct DeviceTop {
  std::vector<float> logits;
  std::vector<int32_t> ids;
  double total = 0;
};

// Keys and values of one session in device memory.
class DeviceCache {
 public:
  virtual ~DeviceCache() = default;
  virtual size_t bytes(int n) const = 0;  // that n positions fill
};

// A model's forward pass on the device.
class DevicePass {
 public:
  virtual ~DevicePass() = default;
  virtual const std::string& name() const = 0;  // the device's own
  virtual DeviceStats stats() const = 0;
  // Throws Error(budget) where there is no room.
  virtual std::unique_ptr<DeviceCache> make_cache(int n_ctx) = 0;
  // As Decoder::forward, with a cache made here. best: of one token, receives the most likely next one, the lowest id
  // on ties; logits may then be null, and `logits` fetches them as long as no other token was decoded with the cache.
  virtual bool forward(const int32_t* tokens, int n, int pos, DeviceCache* cache, Logits which, float* logits,
                       const std::function<bool()>& should_stop, const Skipping& skipping, int32_t* best) = 0;
  virtual void logits(DeviceCache* cache, float* out) = 0;
  // The same, of the likeliest tokens only: some 2 KB.
  virtual void top(DeviceCache* cache, DeviceTop* out) = 0;
};

// What is known of the first GPU and of this build's code for it.
struct DeviceInfo {
  bool built = false;         // with CUDA
  std::string toolkit;        // that it was built with; empty: unknown
  std::string architectures;  // compute capabilities that it was compiled for, as CMake has them
  std::string driver_cuda;    // the newest CUDA that the driver knows; empty: no driver
  int devices = 0;            // the rest is the first one's
  std::string name, capability;
  std::string code;           // compute capability of the machine code that runs there; empty: none does
  int multiprocessors = 0;
  size_t memory = 0, free_memory = 0;
};
DeviceInfo device_info();

// Why no GPU can be used, in one line with the remedy; empty where one can.
std::string device_problem();

// Throws Error(usage) on a build without CUDA, Error(runtime) without a driver or a GPU that can be used.
void need_device();

// Copies the model's weights to the first GPU, and those neurons for which it has no room to memory of the CPU's.
// Throws as need_device, Error(budget) where the GPU's memory is too small even so, Error(unsupported) naming what of
// the model it lacks.
std::unique_ptr<DevicePass> open_device(const PackedModel& model, const DeviceOptions& options);

}  // namespace sr
