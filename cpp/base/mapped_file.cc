// mmap where there is one; elsewhere the file is read into memory, which is correct and merely slower to start.
#include "base/mapped_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "base/aligned_buffer.h"
#include "sparse_run/error.h"

#if defined(__unix__) || defined(__APPLE__)
#define SR_MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace sr {
namespace {

[[noreturn]] void cannot(const char* verb, const std::string& path, const std::string& why) {
  throw Error(ErrorCode::model, std::string("cannot ") + verb + " " + path + ": " + why);
}

}  // namespace

#if SR_MMAP
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

// Reads the whole file to `to` with a few threads: one reader does not reach the rate of the page cache.
bool read_all(int fd, uint8_t* to, size_t size) {
  constexpr int kReaders = 4;
  std::atomic<size_t> next{0};
  std::atomic<bool> good{true};
  const auto work = [&] {
    for (size_t at; good && (at = next.fetch_add(4 * kHugePage)) < size;) {
      const size_t end = std::min(size, at + 4 * kHugePage);
      while (at < end) {
        const ssize_t n = pread(fd, to + at, end - at, off_t(at));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {  // an error, or a file that has become shorter
          good = false;
          return;
        }
        at += size_t(n);
      }
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < kReaders && size > 8 * kHugePage; i++) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // fewer readers, then
  }
  work();
  for (std::thread& t : helpers) t.join();
  return good;
}

}  // namespace

bool MappedFile::copy_from(int fd) {
  block_size_ = (size_ + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  void* p = mmap(nullptr, block_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return false;
  uint8_t* data = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage);
  prefer_huge_pages(data, size_);
  if (!read_all(fd, data, size_)) {
    munmap(p, block_size_);
    return false;
  }
  mprotect(p, block_size_, PROT_READ);
  block_ = p;
  data_ = data;
  return true;
}

MappedFile::MappedFile(const std::string& path, bool in_memory) : path_(path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) cannot("open", path, std::strerror(errno));
  struct stat st;
  std::string why;
  if (fstat(fd, &st) != 0) {
    why = std::strerror(errno);
  } else if (!S_ISREG(st.st_mode)) {
    why = "not a regular file";
  } else if (st.st_size == 0) {
    why = "the file is empty";
  } else {
    size_ = size_t(st.st_size);
    if (in_memory && copy_from(fd)) {
      close(fd);
      return;
    }
    void* p = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
      why = std::strerror(errno);
    } else {
      data_ = static_cast<const uint8_t*>(p);
#ifdef MADV_HUGEPAGE
      madvise(p, size_, MADV_HUGEPAGE);  // fewer TLB misses where the file system can; refused elsewhere
#endif
    }
  }
  close(fd);
  if (!data_) cannot("map", path, why);
}

MappedFile::MappedFile(std::shared_ptr<ByteSource> source)
    : size_(size_t(source->size())), source_(std::move(source)), path_(source_->path()) {
  // Room for the last block, which direct reads fill up, and for what kernels ask for beyond the end.
  block_size_ = size_t(align_up(size_)) + kReadAlign;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;
#endif
  block_ = mmap(nullptr, block_size_, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (block_ == MAP_FAILED) cannot("find address space for", path_, std::strerror(errno));
#ifdef MADV_NOHUGEPAGE
  madvise(block_, block_size_, MADV_NOHUGEPAGE);  // a huge page would take memory for what is never fetched
#endif
  data_ = static_cast<const uint8_t*>(block_);
}

MappedFile::~MappedFile() {
  if (block_) munmap(block_, block_size_);
  else munmap(const_cast<uint8_t*>(data_), size_);
}

void MappedFile::will_need(size_t offset, size_t bytes) const {
  if (offset >= size_ || block_) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t begin = offset / page * page;
  const size_t end = bytes > size_ - offset ? size_ : offset + bytes;
  madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_WILLNEED);
}
#else
MappedFile::MappedFile(std::shared_ptr<ByteSource> source) : path_(source->path()) {
  throw Error(ErrorCode::unsupported, "a memory budget is not supported on this operating system; leave it out");
}

MappedFile::MappedFile(const std::string& path, bool) : path_(path) {
  std::FILE* f = std::fopen(path.c_str(), "rb");
  if (!f) cannot("open", path, std::strerror(errno));
  std::fseek(f, 0, SEEK_END);
  const long size = std::ftell(f);
  std::fseek(f, 0, SEEK_SET);
  if (size > 0) {
    void* p = allocate_zeroed(size_t(size), "the model's weights");
    size_ = size_t(size);
    data_ = static_cast<const uint8_t*>(p);
    if (std::fread(p, 1, size_, f) != size_) {
      free_zeroed(p, size_);
      data_ = nullptr;
    }
  }
  std::fclose(f);
  if (!data_) cannot("read", path, size <= 0 ? "the file is empty" : "short read");
}

MappedFile::~MappedFile() { free_zeroed(const_cast<uint8_t*>(data_), size_); }

void MappedFile::will_need(size_t, size_t) const {}
#endif

void MappedFile::fetch(size_t offset, size_t bytes) const {
  if (!source_ || bytes == 0) return;
  const size_t begin = size_t(align_down(offset)), end = size_t(align_up(offset + bytes));
  const std::string error = read_fully(*source_, room(begin), end - begin, begin);
  if (!error.empty()) throw Error(ErrorCode::runtime, error);
}

std::string read_text_file(const std::string& path, size_t limit) {
  std::FILE* f = std::fopen(path.c_str(), "rb");
  if (!f) cannot("open", path, std::strerror(errno));
  std::string text;
  char chunk[16384];
  size_t n;
  while (text.size() <= limit && (n = std::fread(chunk, 1, sizeof chunk, f)) > 0) text.append(chunk, n);
  const bool failed = std::ferror(f) != 0;
  const int error = errno;
  std::fclose(f);
  if (failed) cannot("read", path, std::strerror(error));
  if (text.size() > limit) cannot("read", path, "larger than " + std::to_string(limit) + " bytes");
  return text;
}

}  // namespace sr
