// The seam between the engine and the device decoder; on a build without CUDA, the line that says so.
#include "cuda/device.h"

#include "sparse_run/error.h"

#ifdef SR_HAVE_CUDA
#include <algorithm>

#include "cuda/decoder.h"
#endif

namespace sr {

#ifdef SR_HAVE_CUDA

namespace {

constexpr int kOldestCapability = 75;

// The first GPU is the calling thread's current one while this lives; then what the caller had is again: other code in
// the process may have chosen another GPU for a thread of its own. Every call from outside has one.
class OnDevice {
 public:
  OnDevice() {
    const cudaError_t set = take();
    if (set != cudaSuccess) cuda::check(set, "taking the first GPU");
  }
  enum class Failing { survives };
  // Where a failure shows in what follows, or where there is nobody to tell.
  explicit OnDevice(Failing) {
    if (take() != cudaSuccess) cudaGetLastError();
  }
  ~OnDevice() {
    if (before_ > 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  cudaError_t take() {
    int now = 0;
    const cudaError_t got = cudaGetDevice(&now);
    if (got != cudaSuccess || now == 0) return got;
    const cudaError_t set = cudaSetDevice(0);
    if (set == cudaSuccess) before_ = now;
    return set;
  }
  int before_ = 0;
};

class Cache : public DeviceCache {
 public:
  Cache(const cuda::DeviceDecoder& d, int n_ctx) : kv_(new cuda::DeviceKv(d.config(), n_ctx, d.room())) {}
  ~Cache() override {
    const OnDevice here(OnDevice::Failing::survives);
    kv_.reset();
  }
  size_t bytes(int n) const override { return kv_->bytes(n); }
  cuda::DeviceKv* kv() const { return kv_.get(); }

 private:
  std::unique_ptr<cuda::DeviceKv> kv_;
};

class Pass : public DevicePass {
 public:
  Pass(const PackedModel& model, const DeviceOptions& options) : decoder_(new cuda::DeviceDecoder(model, options)) {}
  ~Pass() override {
    const OnDevice here(OnDevice::Failing::survives);
    decoder_.reset();
  }
  const std::string& name() const override { return decoder_->device_name(); }
  DeviceStats stats() const override { return decoder_->stats(); }
  std::unique_ptr<DeviceCache> make_cache(int n_ctx) override {
    const OnDevice here;
    return std::make_unique<Cache>(*decoder_, n_ctx);
  }
  bool forward(const int32_t* tokens, int n, int pos, DeviceCache* cache, Logits which, float* logits,
               const std::function<bool()>& should_stop, const Skipping& skipping, int32_t* best) override {
    const OnDevice here;
    return decoder_->forward(tokens, n, pos, kv(cache), which, logits, should_stop, skipping, best);
  }
  void logits(DeviceCache* cache, float* out) override {
    const OnDevice here;
    decoder_->logits(*kv(cache), out);
  }
  void top(DeviceCache* cache, DeviceTop* out) override {
    static_assert(cuda::kTop == kDeviceTop, "what sessions count on");
    const OnDevice here;
    cuda::Top top;
    decoder_->top(*kv(cache), &top);
    const int n = std::max(top.n, 0);
    out->logits.assign(top.logit, top.logit + n);
    out->ids.assign(top.id, top.id + n);
    out->total = top.total;
  }

 private:
  static cuda::DeviceKv* kv(DeviceCache* cache) { return static_cast<Cache*>(cache)->kv(); }
  std::unique_ptr<cuda::DeviceDecoder> decoder_;
};

#ifdef SR_CUDA_ARCHITECTURES
constexpr const char* kCompiledFor = SR_CUDA_ARCHITECTURES;
#else
constexpr const char* kCompiledFor = "";
#endif

std::string version_text(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }
std::string capability_text(int c) { return std::to_string(c / 10) + "." + std::to_string(c % 10); }

// Whether a failure to load a kernel is the build's, which has no code that this GPU and its driver can run, and not
// the GPU's.
bool is_of_code(cudaError_t e) {
  switch (e) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:       // there is PTX, and nothing that translates it
    case cudaErrorJitCompilationDisabled: return true;
    default: return false;
  }
}

std::string no_answer(cudaError_t e) {
  return std::string("the GPU does not answer (") + cudaGetErrorString(e) + "): use --device cpu";
}

}  // namespace

DeviceInfo device_info() {
  DeviceInfo info;
  info.built = true;
  info.architectures = kCompiledFor;
  int driver = 0, runtime = 0, n = 0;
  if (cudaRuntimeGetVersion(&runtime) == cudaSuccess) info.toolkit = version_text(runtime);
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver) info.driver_cuda = version_text(driver);
  cudaDeviceProp device;
  if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0 || cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    cudaGetLastError();
    return info;
  }
  const OnDevice here(OnDevice::Failing::survives);
  info.devices = n;
  info.name = device.name;
  info.capability = capability_text(device.major * 10 + device.minor);
  info.multiprocessors = device.multiProcessorCount;
  info.memory = device.totalGlobalMem;
  size_t free_bytes = 0, total = 0;
  if (cudaMemGetInfo(&free_bytes, &total) == cudaSuccess) info.free_memory = free_bytes;
  int machine = 0, ptx = 0;
  if (cuda::code_for_device(&machine, &ptx) == cudaSuccess && machine) info.code = capability_text(machine);
  cudaGetLastError();
  return info;
}

std::string device_problem() {
  int n = 0;
  const cudaError_t found = cudaGetDeviceCount(&n);
  cudaGetLastError();  // or the first kernel would be blamed for it
  if (found == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || !driver)
      return "no NVIDIA driver was found: install it, or use --device cpu";
    cudaRuntimeGetVersion(&runtime);
    return "the NVIDIA driver is for CUDA " + version_text(driver) + ", this build for " + version_text(runtime) +
           ": update the driver, build with an older toolkit, or use --device cpu";
  }
  if (found != cudaSuccess && found != cudaErrorNoDevice) return no_answer(found);
  if (n == 0) return "no NVIDIA GPU was found: use --device cpu";
  cudaDeviceProp device;
  const cudaError_t known = cudaGetDeviceProperties(&device, 0);
  if (known != cudaSuccess) {
    cudaGetLastError();
    return no_answer(known);
  }
  const int capability = device.major * 10 + device.minor;
  if (capability < kOldestCapability) {
    return std::string(device.name) + " has compute capability " + capability_text(capability) +
           ", 7.5 is needed: use --device cpu";
  }
  const OnDevice here(OnDevice::Failing::survives);
  int machine = 0, ptx = 0;
  const cudaError_t code = cuda::code_for_device(&machine, &ptx);
  cudaGetLastError();
  if (code == cudaSuccess) return "";
  if (!is_of_code(code)) return no_answer(code);
  const std::string why = cudaGetErrorString(code), compiled = kCompiledFor;
  return "this build has no code for " + std::string(device.name) + ", compute capability " +
         capability_text(capability) + " (" + why + (compiled.empty() ? "" : "; built for " + compiled) +
         "): build with -DCMAKE_CUDA_ARCHITECTURES=native there, update the driver, or use --device cpu";
}

void need_device() {
  const std::string problem = device_problem();
  if (!problem.empty()) throw Error(ErrorCode::runtime, problem);
}

std::unique_ptr<DevicePass> open_device(const PackedModel& model, const DeviceOptions& options) {
  need_device();
  const OnDevice here;
  return std::make_unique<Pass>(model, options);
}

#else

namespace {
constexpr const char* kNotBuilt =
    "this build has no CUDA: build with -DSPARSE_RUN_CUDA=ON where the CUDA toolkit is installed, or use --device cpu";
}

std::string device_problem() { return kNotBuilt; }

DeviceInfo device_info() { return {}; }

void need_device() { throw Error(ErrorCode::usage, kNotBuilt); }

std::unique_ptr<DevicePass> open_device(const PackedModel&, const DeviceOptions&) {
  throw Error(ErrorCode::usage, kNotBuilt);
}

#endif

}  // namespace sr
