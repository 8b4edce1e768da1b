// Device and pinned host memory with owners.
#pragma once

#include <utility>

#include "kernels/cuda/platform.h"

namespace sr {
namespace cuda {

template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  // Throws Error(budget) naming `what` where the device has no room.
  DeviceBuffer(size_t n, const char* what) { reset(n, what); }
  ~DeviceBuffer() { release(); }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  void reset(size_t n, const char* what) {
    release();
    if (n == 0) return;
    void* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)), what);
    data_ = static_cast<T*>(p);
    size_ = n;
  }
  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  void release() {
    if (data_) cudaFree(data_);  // a device that has failed cannot free either
    data_ = nullptr;
    size_ = 0;
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Copies from the host, and waits until the bytes are there: streams of their own do not wait for the default stream.
inline void copy_to_device(void* to, const void* from, size_t bytes, const char* what) {
  if (!bytes) return;
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), what);
  check(cudaStreamSynchronize(nullptr), what);
}

// Copies n elements from the host.
template <class T>
DeviceBuffer<T> to_device(const T* from, size_t n, const char* what) {
  DeviceBuffer<T> buffer(n, what);
  copy_to_device(buffer.data(), from, n * sizeof(T), what);
  return buffer;
}

// Host memory that the device can copy from and to while the host goes on.
template <class T>
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  ~PinnedBuffer() {
    if (data_) cudaFreeHost(data_);
  }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  void reset(size_t n, const char* what) {
    if (data_) cudaFreeHost(data_);
    data_ = nullptr;
    void* p = nullptr;
    check(cudaMallocHost(&p, n * sizeof(T)), what);
    data_ = static_cast<T*>(p);
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

// A place in a stream that the host can wait for.
class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream, const char* what) const { check(cudaEventRecord(event_, stream), what); }
  void wait(const char* what) const { check(cudaEventSynchronize(event_), what); }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait(const char* what) const { check(cudaStreamSynchronize(stream_), what); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace cuda
}  // namespace sr
