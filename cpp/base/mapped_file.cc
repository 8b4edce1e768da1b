// mmap where there is one; elsewhere the file is read into memory, which is correct and merely slower to start.
#include "base/mapped_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

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
MappedFile::MappedFile(const std::string& path) : path_(path) {
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

MappedFile::~MappedFile() { munmap(const_cast<uint8_t*>(data_), size_); }

void MappedFile::will_need(size_t offset, size_t bytes) const {
  if (offset >= size_) return;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t begin = offset / page * page;
  const size_t end = bytes > size_ - offset ? size_ : offset + bytes;
  madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_WILLNEED);
}
#else
MappedFile::MappedFile(const std::string& path) : path_(path) {
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
