// Fibers, barriers and warp exchanges: how a grid of threads runs.
#include <sr_cuda_emulator.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace sr_emu {

Place here;
long long launches = 0;

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

// SR_EMU_ORDER: the order in which whole programs run.
Order usual_order() {
  const char* text = std::getenv("SR_EMU_ORDER");
  const std::string name = text ? text : "";
  return name == "backward" ? Order::backward : name == "shuffled" ? Order::shuffled : Order::forward;
}

Order order = usual_order();
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

// NaN, -1, and an index far out of range.
void poison(void* p, size_t bytes) {
  if (bytes) std::memset(p, 0xff, bytes);
}

void set_order(Order o, unsigned seed) {
  order = o;
  rng.seed(seed);
}
void reset_order() { set_order(usual_order()); }
bool in_kernel() { return *kernel_name; }

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
  kernel_name = "";
}

}  // namespace sr_emu
