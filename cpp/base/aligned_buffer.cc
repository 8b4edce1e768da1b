// Large buffers are anonymous mappings without huge pages: a cache of which a tenth is used then costs a tenth.
#include "base/aligned_buffer.h"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#define SR_MMAP 1
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace sr {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kLarge = 256 * 1024;  // from here on whole pages are asked for

std::atomic<size_t> allocated{0};

[[noreturn]] void out_of_memory(size_t bytes, const char* what) {
  char text[200];
  std::snprintf(text, sizeof text, "not enough memory for %s (%.1f MB): use a smaller context or model, or free memory",
                what, double(bytes) / 1e6);
  throw Error(ErrorCode::budget, text);
}

size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

void* allocate_zeroed(size_t bytes, const char* what) {
#if SR_MMAP
  if (bytes >= kLarge) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) out_of_memory(bytes, what);
#ifdef MADV_NOHUGEPAGE
    madvise(p, bytes, MADV_NOHUGEPAGE);
#endif
    allocated.fetch_add(bytes, std::memory_order_relaxed);
    return p;
  }
#endif
  void* p = ::operator new(rounded(bytes), std::align_val_t(kAlign), std::nothrow);
  if (!p) out_of_memory(bytes, what);
  std::memset(p, 0, rounded(bytes));
  allocated.fetch_add(bytes, std::memory_order_relaxed);
  return p;
}

void free_zeroed(void* data, size_t bytes) {
  if (!data) return;
  allocated.fetch_sub(bytes, std::memory_order_relaxed);
#if SR_MMAP
  if (bytes >= kLarge) {
    munmap(data, bytes);
    return;
  }
#endif
  ::operator delete(data, std::align_val_t(kAlign));
}

size_t allocated_bytes() { return allocated.load(std::memory_order_relaxed); }

void prefer_huge_pages(void* data, size_t bytes) {
#if SR_MMAP && defined(MADV_HUGEPAGE)
  if (bytes >= kLarge) madvise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void refuse_huge_pages(void* data, size_t bytes) {
#if SR_MMAP && defined(MADV_NOHUGEPAGE)
  madvise(data, bytes, MADV_NOHUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void discard_pages(void* data, size_t bytes) {
#if SR_MMAP && defined(MADV_DONTNEED) && defined(__linux__)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace sr
