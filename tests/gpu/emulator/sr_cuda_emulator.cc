// Fibers, barriers, warp exchanges and a runtime whose device memory is the heap.
#include <sr_cuda_emulator.h>
#include <ucontext.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
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

Place here;
Faults faults = faults_of_environment();
size_t allocated = 0;
long long launches = 0, overlapped = 0;
size_t behind_wait = SIZE_MAX;

struct Graph {
  std::vector<std::function<void()>> work;
};
// Work waits until the host asks for it, as late as a GPU might do it: whoever reads too early, or changes what is
// still to be copied, gets other results.
struct Stream {
  Graph* capturing = nullptr;
  std::deque<std::function<void()>> waiting;
};
struct Event {
  Stream* stream = nullptr;
  int recorded = 0, reached = 0;  // how often
  double at = 0;
};

namespace {

constexpr size_t kStack = 128 << 10;
constexpr size_t kSharedLimit = 48 << 10;

#if defined(__x86_64__)
// swapcontext asks the kernel for the signal mask each time; this only keeps what the calling convention wants kept.
struct Context {
  void* sp = nullptr;
};
extern "C" void sr_emu_switch(void** save, void* to);
asm(R"(
.text
.globl sr_emu_switch
.hidden sr_emu_switch
.type sr_emu_switch,@function
sr_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sr_emu_switch,.-sr_emu_switch
)");
void start(Context* c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t(15)));
  *--top = nullptr;                             // the return address that entry() believes to have
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;  // rbp, rbx, r12..r15
  c->sp = top;
}
void switch_to(Context* from, Context* to) { sr_emu_switch(&from->sp, to->sp); }
#else
struct Context {
  ucontext_t u;
};
void start(Context* c, char* stack, void (*entry)()) {
  getcontext(&c->u);
  c->u.uc_stack.ss_sp = stack;
  c->u.uc_stack.ss_size = kStack;
  c->u.uc_link = nullptr;
  makecontext(&c->u, entry, 0);
}
void switch_to(Context* from, Context* to) { swapcontext(&from->u, &to->u); }
#endif

enum class State { ready, at_barrier, at_warp, done };

struct Fiber {
  Context context;
  uint3 thread;
  State state = State::ready;
  const char* what = "";
  uint64_t value = 0;
  bool began = false;  // has called after_previous
};

Order order = Order::forward;
std::mt19937 rng(1);
const char* kernel_name = "";
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Fiber> fibers;
std::vector<uint64_t> exchanged;  // [fibers]
size_t current = 0;
Context scheduler;
const std::function<void()>* body = nullptr;
std::map<const void*, std::vector<double>> shared_blocks;
std::vector<double> dynamic_block;
size_t shared_used = 0;

// NaN, -1, and an index far out of range.
void poison(void* p, size_t bytes) {
  if (bytes) std::memset(p, 0xff, bytes);
}

void fiber_main() {
  (*body)();
  if (!fibers[current].began) broken("a thread that never called after_previous");
  fibers[current].state = State::done;
  switch_to(&fibers[current].context, &scheduler);
  std::abort();
}

void pause(State state, const char* what, uint64_t value) {
  Fiber& f = fibers[current];
  f.state = state;
  f.what = what;
  f.value = value;
  switch_to(&f.context, &scheduler);
}

std::vector<size_t> turns(size_t n) {
  std::vector<size_t> t(n);
  std::iota(t.begin(), t.end(), size_t(0));
  if (order == Order::backward) std::reverse(t.begin(), t.end());
  if (order == Order::shuffled) std::shuffle(t.begin(), t.end(), rng);
  return t;
}

// Lets the warps that are complete go on. Returns whether there were any.
bool release_warps() {
  bool any = false;
  for (size_t w = 0; w < fibers.size(); w += 32) {
    if (fibers[w].state != State::at_warp) continue;
    if (w + 32 > fibers.size()) broken("a warp operation in a block that is not a multiple of 32 threads");
    bool all = true;
    for (size_t i = w; i < w + 32; i++) all = all && fibers[i].state == State::at_warp;
    if (!all) continue;
    for (size_t i = w; i < w + 32; i++) {
      if (std::strcmp(fibers[i].what, fibers[w].what)) broken("threads of a warp met in different warp operations");
      exchanged[i] = fibers[i].value;
    }
    for (size_t i = w; i < w + 32; i++) fibers[i].state = State::ready;
    any = true;
  }
  return any;
}

void run_block(size_t threads) {
  shared_used = 0;
  for (auto& s : shared_blocks) s.second.clear();
  poison(dynamic_block.data(), dynamic_block.size() * sizeof(double));
  fibers.resize(threads);
  exchanged.resize(threads);
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
  for (size_t i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.state = State::ready;
    f.began = false;
    f.thread = {unsigned(i) % here.block_dim.x, unsigned(i) / here.block_dim.x % here.block_dim.y,
                unsigned(i) / (here.block_dim.x * here.block_dim.y)};
    start(&f.context, stacks[i].get(), fiber_main);
  }
  while (true) {
    bool ran = false;
    for (size_t i : turns(threads)) {
      if (fibers[i].state != State::ready) continue;
      current = i;
      here.thread = fibers[i].thread;
      switch_to(&scheduler, &fibers[i].context);
      ran = true;
    }
    if (release_warps()) continue;
    size_t done = 0, waiting = 0;
    for (const Fiber& f : fibers) {
      done += f.state == State::done;
      waiting += f.state == State::at_barrier;
    }
    if (done == threads) return;
    if (waiting == threads) {
      for (Fiber& f : fibers) f.state = State::ready;
      continue;
    }
    if (!ran) broken(waiting ? "some threads wait at __syncthreads that others never reach"
                             : "some threads of a warp wait for others that never come");
  }
}

}  // namespace

void set_order(Order o, unsigned seed) {
  order = o;
  rng.seed(seed);
}

void broken(const char* what) {
  std::fprintf(stderr, "emulated GPU, kernel %s, block %u %u %u: %s\n", kernel_name, here.block.x, here.block.y,
               here.block.z, what);
  std::abort();
}

void* shared(const void* tag, size_t bytes) {
  std::vector<double>& block = shared_blocks[tag];
  if (block.empty()) {
    block.resize((bytes + 63) / 8 + 1);
    poison(block.data(), block.size() * sizeof(double));
    shared_used += bytes;
    if (shared_used + dynamic_block.size() * 8 > kSharedLimit + 64) broken("more than 48 KiB of shared memory");
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block.data()) + 31) & ~uintptr_t(31));
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic_block.data()) + 31) & ~uintptr_t(31));
}

void after_previous() {
  if (fibers[current].began) broken("after_previous, called twice");
  fibers[current].began = true;
}

void barrier(const char* what) { pause(State::at_barrier, what, 0); }

const uint64_t* warp_exchange(const char* what, uint64_t mine) {
  pause(State::at_warp, what, mine);
  return exchanged.data() + current / 32 * 32;
}

void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  kernel_name = name;
  launches++;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024) broken("a block must have 1 to 1024 threads");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) broken("an impossible grid");
  if (shared_bytes > kSharedLimit) broken("more than 48 KiB of shared memory");
  here.block_dim = block;
  here.grid_dim = grid;
  dynamic_block.assign(shared_bytes ? (shared_bytes + 39) / 8 : 0, 0.0);
  body = &thread;
  for (size_t i : turns(size_t(grid.x) * grid.y * grid.z)) {
    here.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(threads);
  }
}

namespace {

std::vector<Stream*> streams;

void later(Stream* stream, std::function<void()> work) {
  if (stream && stream->capturing) stream->capturing->work.push_back(std::move(work));
  else if (stream) stream->waiting.push_back(std::move(work));
  else work();
}

void work_one(Stream* stream) {
  const std::function<void()> work = std::move(stream->waiting.front());
  stream->waiting.pop_front();
  if (!faults.failed) work();
}

void finish(Stream* stream) {
  while (stream && !stream->waiting.empty()) work_one(stream);
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
    if (!used_up(&faults.fail_copy_after)) std::memcpy(to, from, bytes);
  };
}

}  // namespace

int submit(Stream* stream, std::function<void()> work) {
  if (faults.failed) return cudaErrorLaunchFailure;
  const bool now = !(stream && stream->capturing);
  if (now && used_up(&faults.fail_launch_after)) return cudaErrorLaunchFailure;
  later(stream, std::move(work));
  return cudaSuccess;
}

namespace {
cudaError_t state() { return faults.failed ? cudaErrorLaunchFailure : cudaSuccess; }
std::map<void*, size_t> sizes;
cudaError_t last_error = cudaSuccess;
cudaError_t keep(cudaError_t e) { return last_error = e; }
}  // namespace

void prefetch(const void* p) {
  const auto next = sizes.upper_bound(const_cast<void*>(p));
  if (next != sizes.begin()) {
    const auto at = std::prev(next);
    if (static_cast<const char*>(p) < static_cast<const char*>(at->first) + at->second) return;
  }
  broken("a prefetch of what is no device memory");
}

}  // namespace sr_emu

using namespace sr_emu;

const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaSuccess: return "no error";
    default: return "invalid argument";
  }
}
cudaError_t cudaGetDeviceCount(int* n) {
  if (faults.driver < 12000) return keep(cudaErrorInsufficientDriver);
  *n = faults.devices;
  return faults.devices ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int) { return state(); }
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
  if (allocated + bytes > faults.memory) return keep(cudaErrorMemoryAllocation);
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  poison(*p, (bytes + 255) / 256 * 256);
  sizes[*p] = bytes;
  allocated += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  for (Stream* stream : streams) finish(stream);
  if (p) allocated -= sizes[p];
  sizes.erase(p);
  std::free(p);
  return state();
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  *p = std::malloc(bytes);
  return state();
}
cudaError_t cudaFreeHost(void* p) {
  for (Stream* stream : streams) finish(stream);
  std::free(p);
  return state();
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (faults.failed) return cudaErrorLaunchFailure;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t s) {
  if (faults.failed) return cudaErrorLaunchFailure;
  later(s, copy_of(to, from, bytes));
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t s) {
  if (faults.failed) return cudaErrorLaunchFailure;
  later(s, [=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
  *s = new Stream;
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
  if (!(s && s->capturing)) finish(s);
  return state();
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  if (faults.failed || s->capturing) return cudaErrorLaunchFailure;
  s->capturing = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
  *graph = s->capturing;
  s->capturing = nullptr;
  return state();
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new Graph(*graph);
  return state();
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
  if (faults.failed || used_up(&faults.fail_launch_after)) return cudaErrorLaunchFailure;
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
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  if (faults.no_image) return keep(cudaErrorNoKernelImageForDevice);
  a->ptxVersion = a->binaryVersion = 75;
  return state();
}

namespace {
double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace
cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = new Event;
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
  e->stream = s;
  const int number = ++e->recorded;
  later(s, [=] {
    e->reached = number;
    e->at = seconds();
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  while (e->reached != e->recorded && e->stream && !e->stream->waiting.empty()) work_one(e->stream);
  behind_wait = std::min(behind_wait, e->stream ? e->stream->waiting.size() : 0);
  return state();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = float((b->at - a->at) * 1e3);
  return state();
}
