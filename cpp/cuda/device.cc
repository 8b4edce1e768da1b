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
  Cache(const DecoderConfig& config, int n_ctx) : kv(config, n_ctx) {}
  size_t bytes(int n) const override { return kv.bytes(n); }
  cuda::DeviceKv kv;
};

class Pass : public DevicePass {
 public:
  explicit Pass(const PackedModel& model) : decoder_(model) {}
  const std::string& name() const override { return decoder_.device_name(); }
  size_t weight_bytes() const override { return decoder_.device_bytes(); }
  std::unique_ptr<DeviceCache> make_cache(int n_ctx) override { return std::make_unique<Cache>(decoder_.config(), n_ctx); }
  bool forward(const int32_t* tokens, int n, int pos, DeviceCache* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping) override {
    return decoder_.forward(tokens, n, pos, &static_cast<Cache*>(cache)->kv, which, logits, should_stop, skipping);
  }

 private:
  cuda::DeviceDecoder decoder_;
};

}  // namespace

std::string device_problem() {
  int n = 0;
  const cudaError_t found = cudaGetDeviceCount(&n);
  if (found == cudaErrorInsufficientDriver) return "no NVIDIA driver, or one too old for this build: install it, or use --device cpu";
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

std::unique_ptr<DevicePass> open_device(const PackedModel& model) {
  need_device();
  return std::make_unique<Pass>(model);
}

#else

namespace {
constexpr const char* kNotBuilt =
    "this build has no CUDA: build with -DSPARSE_RUN_CUDA=ON where the CUDA toolkit is installed, or use --device cpu";
}

std::string device_problem() { return kNotBuilt; }

void need_device() { throw Error(ErrorCode::usage, kNotBuilt); }

std::unique_ptr<DevicePass> open_device(const PackedModel&) { throw Error(ErrorCode::usage, kNotBuilt); }

#endif

}  // namespace sr
