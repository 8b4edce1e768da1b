// The runtime: device memory that only kernels and copies may touch, streams whose work waits until the host asks for
// it, graphs, and the refusals of a real one: calls that a capture does not allow, streams of another device, copies
// beyond an allocation.
#include <sr_cuda_emulator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <set>
#include <vector>

namespace sr_emu {

namespace {
// The switches of whole programs: SR_EMU_DEVICES, SR_EMU_MEMORY, SR_EMU_LAUNCHES and SR_EMU_COPIES (that succeed).
Faults faults_of_environment() {
  const auto number = [](const char* name, long long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoll(text) : otherwise;
  };
  Faults f;
  f.devices = int(number("SR_EMU_DEVICES", f.devices));
  f.memory = size_t(number("SR_EMU_MEMORY", (long long)(f.memory)));
  f.fail_launch_after = int(number("SR_EMU_LAUNCHES", f.fail_launch_after));
  f.fail_copy_after = int(number("SR_EMU_COPIES", f.fail_copy_after));
  return f;
}
}  // namespace

Faults faults = faults_of_environment();
size_t allocated = 0, elsewhere = 0;
long long overlapped = 0, copied = 0;
size_t behind_wait = SIZE_MAX;

struct Graph {
  std::vector<std::function<void()>> work;
};
// Work waits until the host asks for it, as late as a GPU might do it: whoever reads too early, or changes what is
// still to be copied, gets other results.
struct Stream {
  int device = 0;
  Graph* capturing = nullptr;
  bool invalid = false;  // the capture: something was called that it does not allow
  std::deque<std::function<void()>> waiting;
};
struct Event {
  int device = 0;
  Stream* stream = nullptr;
  int recorded = 0, reached = 0;  // how often
  double at = 0;
};

// ---- device memory

namespace {

constexpr size_t kArena = size_t(64) << 30;  // addresses, not memory
char* arena = nullptr;
// An allocation ends where a page ends, and the page after it belongs to nobody.
struct Block {
  size_t bytes;       // asked for
  char* base;
  size_t accessible;  // from base
  int device;
};
std::map<const char*, Block> blocks;   // by their first byte
std::map<char*, size_t> holes;         // by address
std::map<const char*, size_t> pinned;  // host memory
int opened = 0;

size_t page() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}
size_t rounded(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

void on_fault(int signal, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  if (arena && at >= arena && at < arena + kArena) {
    broken(in_kernel() ? "an access to device memory that is not allocated" : "the host touched device memory");
  }
  std::signal(signal, SIG_DFL);  // and it happens again
}

void protect(const Block& b, bool open) { mprotect(b.base, b.accessible, open ? PROT_READ | PROT_WRITE : PROT_NONE); }
// While one lives, device memory can be touched.
class Open {
 public:
  Open() { toggle(1, true); }
  ~Open() { toggle(-1, false); }
  Open(const Open&) = delete;
  Open& operator=(const Open&) = delete;

 private:
  static void toggle(int by, bool open) {
    if (by < 0) opened--;
    if (opened == 0)
      for (const auto& b : blocks) protect(b.second, open);
    if (by > 0) opened++;
  }
};

void* take(size_t bytes, int device) {
  if (!arena) {
    void* p = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) broken("there are no addresses for device memory");
    arena = static_cast<char*>(p);
    device_begin = reinterpret_cast<uintptr_t>(p);
    device_end = device_begin + kArena;
    holes[arena] = kArena;
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
  }
  const size_t used = rounded(std::max<size_t>(bytes, 1), 256), accessible = rounded(used, page());
  for (auto hole = holes.begin(); hole != holes.end(); ++hole) {
    if (hole->second < accessible + page()) continue;
    const Block b = {bytes, hole->first, accessible, device};
    const size_t left = hole->second - accessible - page();
    holes.erase(hole);
    if (left) holes[b.base + accessible + page()] = left;
    protect(b, true);
    poison(b.base, accessible);
    if (!opened) protect(b, false);
    char* p = b.base + accessible - used;
    blocks[p] = b;
    return p;
  }
  return nullptr;
}

// Returns the bytes that were asked for.
size_t give_back(void* p) {
  const auto at = blocks.find(static_cast<char*>(p));
  if (at == blocks.end()) broken("memory is given back that was not allocated");
  const Block b = at->second;
  blocks.erase(at);
  madvise(b.base, b.accessible, MADV_DONTNEED);
  protect(b, false);
  auto hole = holes.emplace(b.base, b.accessible + page()).first;
  const auto after = std::next(hole);
  if (after != holes.end() && hole->first + hole->second == after->first) {
    hole->second += after->second;
    holes.erase(after);
  }
  if (hole != holes.begin()) {
    const auto before = std::prev(hole);
    if (before->first + before->second == hole->first) {
      before->second += hole->second;
      holes.erase(hole);
    }
  }
  if (b.device) elsewhere -= b.bytes;
  return b.bytes;
}

// Whether [p, p + bytes) lies in one allocation.
bool on_device(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  const auto next = blocks.upper_bound(at);
  if (next == blocks.begin()) return false;
  const auto block = std::prev(next);
  return at + bytes <= block->first + block->second.bytes;
}
bool is_pinned(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  const auto next = pinned.upper_bound(at);
  if (next == pinned.begin()) return false;
  const auto range = std::prev(next);
  return at + bytes <= range->first + range->second;
}

}  // namespace

uintptr_t device_begin = 0, device_end = 0;

void prefetch(const void* p) {
  if (!on_device(p, 1)) broken("a prefetch of what is no device memory");
}

// ---- streams

namespace {

std::vector<Stream*> streams;
thread_local int current_device = 0;
thread_local Stream* captured_here = nullptr;  // by a capture that this thread began

cudaError_t last_error = cudaSuccess;
cudaError_t keep(cudaError_t e) { return last_error = e; }
cudaError_t state() { return faults.failed ? cudaErrorLaunchFailure : cudaSuccess; }

// What a thread that captures must not call, as it could wait for the device: the capture is lost.
bool refused() {
  if (!captured_here) return false;
  captured_here->invalid = true;
  keep(cudaErrorStreamCaptureUnsupported);
  return true;
}

void later(Stream* stream, std::function<void()> work) {
  if (stream && stream->capturing) {
    stream->capturing->work.push_back(std::move(work));
  } else if (stream) {
    stream->waiting.push_back(std::move(work));
  } else {
    const Open open;
    work();
  }
}

void work_one(Stream* stream) {
  const std::function<void()> work = std::move(stream->waiting.front());
  stream->waiting.pop_front();
  if (!faults.failed) work();
}

void finish(Stream* stream) {
  if (!stream || stream->waiting.empty()) return;
  const Open open;
  while (!stream->waiting.empty()) work_one(stream);
}

// Counts one of those that still succeed; whether this one fails.
bool used_up(int* left) {
  if (*left > 0) --*left;
  else if (*left == 0) return faults.failed = true;
  return false;
}

// A failed copy shows where the host next asks.
std::function<void()> copy_of(void* to, const void* from, size_t bytes) {
  return [=] {
    if (used_up(&faults.fail_copy_after)) return;
    std::memcpy(to, from, bytes);
    copied += (long long)(bytes);
  };
}

bool possible(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind, bool async) {
  const bool to_device = kind != cudaMemcpyDeviceToHost, from_device = kind != cudaMemcpyHostToDevice;
  if (to_device && !on_device(to, bytes)) return false;
  if (from_device && !on_device(from, bytes)) return false;
  const void* host = to_device ? (from_device ? nullptr : from) : to;
  if (host && on_device(host, 1)) return false;
  // A GPU does it, but the host waits for it, and a graph would keep memory that it does not own.
  if (host && async && !is_pinned(host, bytes)) broken("an asynchronous copy of host memory that is not pinned");
  return true;
}

bool wrong_device(const Stream* s) { return s && s->device != current_device; }

}  // namespace

namespace {
std::set<const void*> loaded;  // kernels
}  // namespace

void load(const void* kernel, const char* name) {
  if (!loaded.insert(kernel).second || !captured_here) return;
  std::fprintf(stderr, "emulated GPU: kernel %s is loaded in a capture\n", name);
  std::abort();
}

int submit(Stream* stream, std::function<void()> work) {
  if (faults.failed) return cudaErrorLaunchFailure;
  if (wrong_device(stream)) return keep(cudaErrorInvalidResourceHandle);
  const bool now = !(stream && stream->capturing);
  if (now && used_up(&faults.fail_launch_after)) return cudaErrorLaunchFailure;
  later(stream, std::move(work));
  return cudaSuccess;
}

}  // namespace sr_emu

using namespace sr_emu;

const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorDevicesUnavailable: return "CUDA-capable device(s) is/are busy or unavailable";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorUnsupportedPtxVersion: return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorSystemNotReady: return "system not yet initialized";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaSuccess: return "no error";
    default: return "invalid argument";
  }
}
cudaError_t cudaGetDeviceCount(int* n) {
  if (faults.driver < 12000) return keep(cudaErrorInsufficientDriver);
  if (faults.count != cudaSuccess) return keep(faults.count);
  *n = faults.devices;
  return faults.devices ? cudaSuccess : keep(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= faults.devices) return keep(cudaErrorInvalidDevice);
  current_device = device;
  return state();
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::snprintf(p->name, sizeof p->name, "emulated GPU");
  p->totalGlobalMem = faults.memory;
  p->major = faults.capability / 10;
  p->minor = faults.capability % 10;
  p->multiProcessorCount = 4;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *total = faults.memory;
  *available = faults.memory > allocated ? faults.memory - allocated : 0;
  return state();
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (faults.failed) return cudaErrorLaunchFailure;
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  if (allocated + bytes > faults.memory || !(*p = take(bytes, current_device))) return keep(cudaErrorMemoryAllocation);
  allocated += bytes;
  if (current_device) elsewhere += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  for (Stream* stream : streams) finish(stream);
  if (p) allocated -= give_back(p);
  return state();
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  *p = std::malloc(bytes);
  poison(*p, bytes);
  pinned[static_cast<char*>(*p)] = bytes;
  return state();
}
cudaError_t cudaFreeHost(void* p) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  for (Stream* stream : streams) finish(stream);
  if (p && !pinned.erase(static_cast<char*>(p))) broken("host memory is given back that was not pinned");
  std::free(p);
  return state();
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (faults.failed) return cudaErrorLaunchFailure;
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  if (!possible(to, from, bytes, kind, false)) return keep(cudaErrorInvalidValue);
  const Open open;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t s) {
  if (faults.failed) return cudaErrorLaunchFailure;
  if (!possible(to, from, bytes, kind, true)) return keep(cudaErrorInvalidValue);
  later(s, copy_of(to, from, bytes));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t s) {
  if (faults.failed) return cudaErrorLaunchFailure;
  if (!on_device(to, bytes)) return keep(cudaErrorInvalidValue);
  later(s, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  *s = new Stream;
  (*s)->device = current_device;
  streams.push_back(*s);
  return state();
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  finish(s);
  streams.erase(std::find(streams.begin(), streams.end(), s));
  delete s;
  return state();
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (s && s->capturing) {
    s->invalid = true;
    return keep(cudaErrorStreamCaptureUnsupported);
  }
  finish(s);
  return state();
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  if (faults.failed || s->capturing) return cudaErrorLaunchFailure;
  if (captured_here) broken("two captures in one thread");
  s->capturing = new Graph;
  captured_here = s;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  *graph = s->capturing;
  s->capturing = nullptr;
  captured_here = nullptr;
  if (!*graph) return keep(cudaErrorInvalidValue);
  if (!s->invalid) return state();
  s->invalid = false;
  delete *graph;
  *graph = nullptr;
  return keep(cudaErrorStreamCaptureInvalidated);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new Graph(*graph);
  return state();
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  if (faults.failed || used_up(&faults.fail_launch_after)) return cudaErrorLaunchFailure;
  if (wrong_device(s)) return keep(cudaErrorInvalidResourceHandle);
  if (s->capturing) {
    s->invalid = true;
    return keep(cudaErrorStreamCaptureUnsupported);
  }
  for (const auto& work : exec->work) later(s, work);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete g;
  return state();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) {
  delete g;
  return state();
}
// The last failure of any call, once; a launch that asks for it is blamed for what failed before.
cudaError_t cudaGetLastError() {
  const cudaError_t e = faults.failed ? cudaErrorLaunchFailure : last_error;
  last_error = cudaSuccess;
  return e;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = faults.driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* kernel) {
  if (faults.code != cudaSuccess) return keep(faults.code);
  load(kernel, "asked for its attributes");
  a->binaryVersion = faults.capability;
  a->ptxVersion = faults.ptx ? faults.ptx : faults.capability;
  return state();
}

namespace {
double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace
cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = new Event;
  (*e)->device = current_device;
  return state();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  finish(e->stream);  // which may still have to reach it
  delete e;
  return state();
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  if (faults.failed || (s && s->capturing)) return cudaErrorLaunchFailure;
  if (s && s->device != e->device) return keep(cudaErrorInvalidResourceHandle);
  e->stream = s;
  const int number = ++e->recorded;
  later(s, [=] {
    e->reached = number;
    e->at = seconds();
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  const Open open;
  while (e->reached != e->recorded && e->stream && !e->stream->waiting.empty()) work_one(e->stream);
  behind_wait = std::min(behind_wait, e->stream ? e->stream->waiting.size() : 0);
  return state();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = float((b->at - a->at) * 1e3);
  return state();
}
