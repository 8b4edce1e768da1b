// The GPU as the engine sees it, whether or not this build has one: no CUDA header is included here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "model/decoder.h"

namespace sr {

class PackedModel;

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
  virtual size_t weight_bytes() const = 0;      // in device memory
  // Throws Error(budget) where there is no room.
  virtual std::unique_ptr<DeviceCache> make_cache(int n_ctx) = 0;
  // As Decoder::forward, with a cache made here.
  virtual bool forward(const int32_t* tokens, int n, int pos, DeviceCache* cache, Logits which, float* logits,
                       const std::function<bool()>& should_stop, const Skipping& skipping) = 0;
};

// Why no GPU can be used, in one line with the remedy; empty where one can.
std::string device_problem();

// Throws Error(usage) on a build without CUDA, Error(runtime) without a driver or a GPU that can be used.
void need_device();

// Copies the model's weights to the first GPU. Throws as need_device, Error(budget) where the GPU's memory is too small,
// Error(unsupported) naming what of the model it lacks.
std::unique_ptr<DevicePass> open_device(const PackedModel& model);

}  // namespace sr
