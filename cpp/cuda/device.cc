// The seam between the engine and the device decoder; on a build without CUDA, the line that says so.
#include "cuda/device.h"

#include "sparse_run/error.h"

#ifdef SR_HAVE_CUDA
#include "cuda/decoder.h"
#endif

namespace sr {

#ifdef SR_HAVE_CUDA

namespace {

constexpr int kOldestCapability = 75;

class Cache : public DeviceCache {
 public:
  Cache(const cuda::DeviceDecoder& d, int n_ctx) : kv(d.config(), n_ctx, d.room()) {}
  size_t bytes(int n) const override { return kv.bytes(n); }
  cuda::DeviceKv kv;
};

class Pass : public DevicePass {
 public:
  Pass(const PackedModel& model, const DeviceOptions& options) : decoder_(model, options) {}
  const std::string& name() const override { return decoder_.device_name(); }
  DeviceStats stats() const override { return decoder_.stats(); }
  std::unique_ptr<DeviceCache> make_cache(int n_ctx) override { return std::make_unique<Cache>(decoder_, n_ctx); }
  bool forward(const int32_t* tokens, int n, int pos, DeviceCache* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping, int32_t* best) override {
    cuda::DeviceKv* kv = &static_cast<Cache*>(cache)->kv;
    return decoder_.forward(tokens, n, pos, kv, which, logits, should_stop, skipping, best);
  }
  void logits(DeviceCache* cache, float* out) override { decoder_.logits(static_cast<Cache*>(cache)->kv, out); }

 private:
  cuda::DeviceDecoder decoder_;
};

}  // namespace

std::string device_problem() {
  int n = 0;
  const cudaError_t found = cudaGetDeviceCount(&n);
  if (found == cudaErrorInsufficientDriver)
    return "no NVIDIA driver, or one too old for this build: install it, or use --device cpu";
  if (found != cudaSuccess || n == 0) return "no NVIDIA GPU was found: use --device cpu";
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return "the GPU does not answer: use --device cpu";
  if (device.major * 10 + device.minor < kOldestCapability) {
    return std::string(device.name) + " has compute capability " + std::to_string(device.major) + "." +
           std::to_string(device.minor) + ", 7.5 is needed: use --device cpu";
  }
  return "";
}

void need_device() {
  const std::string problem = device_problem();
  if (!problem.empty()) throw Error(ErrorCode::runtime, problem);
}

std::unique_ptr<DevicePass> open_device(const PackedModel& model, const DeviceOptions& options) {
  need_device();
  return std::make_unique<Pass>(model, options);
}

#else

namespace {
constexpr const char* kNotBuilt =
    "this build has no CUDA: build with -DSPARSE_RUN_CUDA=ON where the CUDA toolkit is installed, or use --device cpu";
}

std::string device_problem() { return kNotBuilt; }

void need_device() { throw Error(ErrorCode::usage, kNotBuilt); }

std::unique_ptr<DevicePass> open_device(const PackedModel&, const DeviceOptions&) {
  throw Error(ErrorCode::usage, kNotBuilt);
}

#endif

}  // namespace sr
