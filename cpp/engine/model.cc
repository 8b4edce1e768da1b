// The public model handle: a packed model and the decoder that runs it, shared by all sessions.
#include <string>

#include "base/aligned_buffer.h"
#include "base/cpu_info.h"
#include "base/log.h"
#include "base/memory_info.h"
#include "engine/model_impl.h"
#include "kernels/table.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int kMaxThreads = 1024;

int checked_threads(int threads) {
  if (threads < 0 || threads > kMaxThreads) {
    throw Error(ErrorCode::usage, "threads must be from 1 to " + std::to_string(kMaxThreads) +
                                      ", or 0 for the default, got " + std::to_string(threads));
  }
  return threads ? threads : default_threads();
}

// Copying, like reading ahead, is a gain only for a model that fits into memory with room to spare.
bool fits_memory(size_t bytes) { return bytes < available_memory() / 2; }

bool wants_copy(const ModelOptions& options) {
  if (options.memory != WeightMemory::automatic) return options.memory == WeightMemory::copied;
  if (options.device != "cpu") return false;  // read once, on the way to the device
  return fits_memory(PackedModel::weight_file_bytes(options.path));
}

PackedModel open_packed(const ModelOptions& options, const std::shared_ptr<ByteSource>& source) {
  return source ? PackedModel(options.path, source) : PackedModel(options.path, wants_copy(options));
}

// "auto" made into one of the two; what cannot be had is reported before anything is opened.
ModelOptions with_device(ModelOptions options) {
  const std::string wanted = options.device;
  if (wanted != "cpu" && wanted != "cuda" && wanted != "auto") {
    throw Error(ErrorCode::usage, "unknown device '" + options.device + "': it is cpu, cuda or auto");
  }
  if (options.device == "cuda") need_device();
  if (options.device == "auto" && !device_problem().empty()) options.device = "cpu";
  if (wanted == "cpu" && options.device_memory) {
    throw Error(ErrorCode::usage, "a device memory budget is for a GPU: leave it out, or use --device cuda");
  }
  if (options.device != "cpu" && options.memory_budget) {
    throw Error(ErrorCode::usage, "a memory budget is kept by the CPU only: leave it out, or use --device cpu");
  }
  return options;
}

std::unique_ptr<DevicePass> device_for(const ModelOptions& options, const PackedModel& packed) {
  if (options.device == "cpu") return nullptr;
  try {
    DeviceOptions device;
    device.memory = options.device_memory;
    device.n_ctx = options.n_ctx;
    device.threads = checked_threads(options.threads);
    return open_device(packed, device);
  } catch (const Error& e) {
    if (options.device == "cuda") throw;
    log_message(LogLevel::warning, std::string("the CPU runs the model: ") + e.what());
    return nullptr;
  }
}

}  // namespace

Model::Impl::Impl(const ModelOptions& options)
    : source(options.memory_budget ? open_direct(PackedModel::weight_file(options.path)) : nullptr),
      allocated_before(allocated_bytes()),
      packed(open_packed(options, source)),
      decoder(packed, checked_threads(options.threads)),
      device(device_for(options, packed)) {
  if (options.memory_budget) open_within_budget(options);
}

Model::Model(const ModelOptions& wanted) {
  kernels();  // a forced instruction set that cannot be had is reported before anything is opened
  const ModelOptions options = with_device(wanted);
  impl_ = std::make_shared<Impl>(options);
  const MappedFile& file = impl_->packed.weights().file();
  const bool budget = options.memory_budget > 0;
  if (!budget && fits_memory(file.size())) file.will_need(0, file.size());
  log_message(LogLevel::info, options.path + ": " + std::to_string(file.size() / 1000000) + " MB " +
                                  (copied() ? "in memory, " : budget ? "of weights under a budget, " : "mapped, ") +
                                  std::to_string(threads()) + " threads, instruction set " + isa() +
                                  (impl_->device ? ", run by " + device() : ""));
}

const std::string& Model::config_json() const { return impl_->packed.config_text(); }
int Model::threads() const { return impl_->decoder.threads(); }
std::string Model::isa() const { return kernels().name; }
std::string Model::device() const { return impl_->device ? impl_->device->name() : "cpu"; }
int Model::n_vocab() const { return impl_->decoder.config().n_vocab; }
int Model::n_layers() const { return impl_->decoder.config().n_layers; }
int Model::n_embd() const { return impl_->decoder.config().n_embd; }
int Model::n_ctx_train() const { return impl_->decoder.config().n_ctx_train; }
size_t Model::weight_bytes() const { return impl_->packed.tensor_bytes(); }
DeviceMemory Model::device_memory() const {
  if (!impl_->device) return {};
  const DeviceStats s = impl_->device->stats();
  return {s.budget, s.floor, s.weights, s.cpu_weights, s.cpu_layers, s.hot_share};
}
MemoryStats Model::memory() const { return impl_->memory(); }
void Model::set_break_even(const std::string& site, float break_even) {
  if (site != "N" && site != "G") {
    throw Error(ErrorCode::usage, "break-evens of a model are of the sites N and G, not of '" + site + "'");
  }
  if (!(break_even >= 0 && break_even <= 1)) {
    throw Error(ErrorCode::usage, "break_even must be from 0 to 1, got " + std::to_string(break_even));
  }
  impl_->decoder.set_break_even(site == "N" ? Site::N : Site::G, break_even);
}

void Model::set_aside(size_t bytes, bool for_good) {
  if (!impl_->planned.budget) return;
  if (!bytes) give_back_freed_memory();
  impl_->decoder.set_aside(bytes, for_good);
}
std::string gpu_problem() { return device_problem(); }
GpuInfo gpu_info() {
  const DeviceInfo d = device_info();
  return {d.built, d.toolkit,    d.architectures, d.driver_cuda,     d.devices,
          d.name,  d.capability, d.code,          d.multiprocessors, d.memory, d.free_memory};
}
bool Model::copied() const { return impl_->packed.weights().file().in_memory(); }
size_t Model::bytes_per_token() const { return impl_->decoder.bytes_per_token(); }

}  // namespace sr
