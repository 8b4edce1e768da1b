// O_DIRECT on Linux, F_NOCACHE on macOS, plain reads with the pages dropped behind them elsewhere.
#include "base/direct_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "sparse_run/error.h"

#if defined(__unix__) || defined(__APPLE__)
#define SR_POSIX 1
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace sr {
namespace {

[[noreturn]] void cannot_open(const std::string& path, const std::string& why) {
  throw Error(ErrorCode::model, "cannot open " + path + ": " + why);
}

// What the system says, and where it only says that nothing answers any more, what that is like for people.
std::string reason(int error) {
  std::string text = std::strerror(error);
  switch (error) {
    case EIO:
    case ENODEV:
    case ENXIO:
#ifdef ESTALE
    case ESTALE:  // of a network
#endif
#ifdef ENOTCONN
    case ENOTCONN:  // of a program that was the file system
#endif
      text += " (the disk that it lies on fails, or was removed)";
      break;
    default: break;
  }
  return text;
}

std::mutex wrap_mutex;
std::function<std::shared_ptr<ByteSource>(std::shared_ptr<ByteSource>)> wrapper;

#if SR_POSIX

// Size and time of the last change: what tells a file that was written to from the one that was opened.
struct Stamp {
  uint64_t size = 0;
  int64_t seconds = 0, nanoseconds = 0;
};

bool stamp_of(int fd, Stamp* out, bool* regular) {
  struct stat st;
  if (fstat(fd, &st) != 0) return false;
  *regular = S_ISREG(st.st_mode);
  out->size = uint64_t(st.st_size);
#if defined(__APPLE__)
  out->seconds = st.st_mtimespec.tv_sec;
  out->nanoseconds = st.st_mtimespec.tv_nsec;
#else
  out->seconds = st.st_mtim.tv_sec;
  out->nanoseconds = st.st_mtim.tv_nsec;
#endif
  return true;
}

class DirectFile : public ByteSource {
 public:
  explicit DirectFile(const std::string& path) : path_(path) {
#if defined(O_DIRECT)
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = fd_ >= 0;
    if (fd_ >= 0 && !can_read_direct()) {  // some file systems take the flag and then refuse to read
      close(fd_);
      fd_ = -1;
      direct_ = false;
    }
#endif
    if (fd_ < 0) fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) cannot_open(path, reason(errno));
#if defined(F_NOCACHE)
    direct_ = fcntl(fd_, F_NOCACHE, 1) == 0;
#endif
    bool regular = false;
    std::string why;
    if (!stamp_of(fd_, &opened_, &regular)) why = reason(errno);
    else if (!regular) why = "not a regular file";
    else if (opened_.size == 0) why = "the file is empty";
    if (!why.empty()) {
      close(fd_);
      cannot_open(path, why);
    }
  }
  ~DirectFile() override { close(fd_); }
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  int64_t read(void* to, size_t bytes, uint64_t offset) override {
    const ssize_t n = pread(fd_, to, bytes, off_t(offset));
    if (n < 0) return -int64_t(errno);
#if defined(POSIX_FADV_DONTNEED)
    if (!direct_) posix_fadvise(fd_, off_t(offset), off_t(bytes), POSIX_FADV_DONTNEED);
#endif
    return n;
  }
  uint64_t size() const override { return opened_.size; }
  const std::string& path() const override { return path_; }
  bool direct() const override { return direct_; }
  std::string changed() const override {
    Stamp now;
    bool regular = false;
    if (!stamp_of(fd_, &now, &regular)) return std::string("has become unreachable (") + std::strerror(errno) + ")";
    if (now.size < opened_.size) return "has become shorter";
    if (now.size != opened_.size || now.seconds != opened_.seconds || now.nanoseconds != opened_.nanoseconds) {
      return "has been written to";
    }
    return "";
  }

 private:
  bool can_read_direct() {
    alignas(kReadAlign) static thread_local char page[kReadAlign];
    ssize_t n;
    do n = pread(fd_, page, sizeof page, 0);
    while (n < 0 && errno == EINTR);
    return n >= 0 || errno != EINVAL;
  }

  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
  Stamp opened_;
};

#else

class DirectFile : public ByteSource {
 public:
  explicit DirectFile(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) cannot_open(path, reason(errno));
    std::fseek(file_, 0, SEEK_END);
    const long size = std::ftell(file_);
    if (size <= 0) {
      std::fclose(file_);
      cannot_open(path, "the file is empty");
    }
    size_ = uint64_t(size);
  }
  ~DirectFile() override { std::fclose(file_); }
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  int64_t read(void* to, size_t bytes, uint64_t offset) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (std::fseek(file_, long(offset), SEEK_SET) != 0) return -int64_t(errno);
    const size_t n = std::fread(to, 1, bytes, file_);
    return n || !std::ferror(file_) ? int64_t(n) : -int64_t(errno);
  }
  uint64_t size() const override { return size_; }
  const std::string& path() const override { return path_; }
  bool direct() const override { return false; }
  std::string changed() const override { return ""; }

 private:
  std::string path_;
  std::FILE* file_;
  uint64_t size_ = 0;
  std::mutex mutex_;
};

#endif

}  // namespace

std::shared_ptr<ByteSource> open_direct(const std::string& path) {
  std::shared_ptr<ByteSource> source = std::make_shared<DirectFile>(path);
  std::lock_guard<std::mutex> lock(wrap_mutex);
  return wrapper ? wrapper(std::move(source)) : source;
}

void wrap_sources(std::function<std::shared_ptr<ByteSource>(std::shared_ptr<ByteSource>)> wrap) {
  std::lock_guard<std::mutex> lock(wrap_mutex);
  wrapper = std::move(wrap);
}

std::string read_fully(ByteSource& source, void* to, size_t bytes, uint64_t offset,
                       const std::atomic<bool>* stop) {
  const uint64_t file_end = source.size();
  uint64_t at = offset;
  const uint64_t end = offset + bytes;
  while (at < end && at < file_end) {
    if (stop && stop->load(std::memory_order_relaxed)) return "given up";
    const int64_t n = source.read(static_cast<char*>(to) + (at - offset), size_t(end - at), at);
    if (n == -EINTR || n == -EAGAIN) continue;
    if (n < 0) return "cannot read " + source.path() + ": " + reason(int(-n));
    if (n == 0) return source.path() + " has become shorter while it is in use";
    const uint64_t begun = at;
    at += uint64_t(n);
    // Direct reads begin at multiples of the block: what a short read left of the last block is read again, unless that
    // would lead nowhere.
    if (at < end && at < file_end && align_down(at) > begun) at = align_down(at);
  }
  return "";
}

}  // namespace sr
