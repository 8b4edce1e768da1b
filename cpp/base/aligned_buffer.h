// Memory for vectors: zeroed, 64-byte aligned, and (when large) of pages that cost nothing until they are touched.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "sparse_run/error.h"

namespace sr {

// Zeroed bytes, aligned to 64 at least; `what` names the purpose in the Error(budget) thrown when there are none.
void* allocate_zeroed(size_t bytes, const char* what);
void free_zeroed(void* data, size_t bytes);
// Bytes of all allocate_zeroed memory that is not freed yet, touched or not: what it may come to take.
size_t allocated_bytes();
// Asks for huge pages, for memory that is used from end to end; a hint, never an error.
void prefer_huge_pages(void* data, size_t bytes);
// Takes that back.
void refuse_huge_pages(void* data, size_t bytes);
// Whether discard_pages gives memory back.
#if defined(__linux__)
constexpr bool kDiscardsPages = true;
#else
constexpr bool kDiscardsPages = false;
#endif
// Gives the whole pages inside [data, data + bytes) back; they read as zero afterwards where the system can do it. Only
// for allocate_zeroed memory.
void discard_pages(void* data, size_t bytes);

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(size_t n, const char* what) { reset(n, what); }
  ~AlignedBuffer() { free_zeroed(data_, size_ * sizeof(T)); }
  AlignedBuffer(AlignedBuffer&& o) noexcept { swap(o); }
  AlignedBuffer& operator=(AlignedBuffer&& o) noexcept {
    swap(o);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  // n zeroed elements; what was there before is gone.
  void reset(size_t n, const char* what) {
    AlignedBuffer fresh;
    if (n > size_t(-1) / 2 / sizeof(T)) {
      throw Error(ErrorCode::budget, std::string("not enough memory for ") + what);
    }
    if (n) fresh.data_ = static_cast<T*>(allocate_zeroed(n * sizeof(T), what));
    fresh.size_ = n;
    swap(fresh);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void give_back() { discard_pages(data_, bytes()); }  // see there
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  void swap(AlignedBuffer& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sr
