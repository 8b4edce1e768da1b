// A file read past the page cache, so that what is read counts once, where it is put, and never as cache.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace sr {

// Offsets, lengths and addresses of reads are multiples of this.
constexpr size_t kReadAlign = 4096;

inline uint64_t align_down(uint64_t n) { return n / kReadAlign * kReadAlign; }
inline uint64_t align_up(uint64_t n) { return (n + kReadAlign - 1) / kReadAlign * kReadAlign; }

// What weights are read from. Any number of threads may read at once. Tests put faults in between.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  // As pread: the bytes read, perhaps fewer than asked for, 0 at the end of the file, or -errno.
  virtual int64_t read(void* to, size_t bytes, uint64_t offset) = 0;
  virtual uint64_t size() const = 0;
  virtual const std::string& path() const = 0;
  virtual bool direct() const = 0;  // false: through the page cache, whose pages are dropped after each read
  // Empty, or what happened to the file since it was opened.
  virtual std::string changed() const = 0;
};

// The same as an error's text, which names the file.
inline std::string change_of(const ByteSource& source) {
  const std::string what = source.changed();
  return what.empty() ? what : source.path() + " " + what + " since the model was opened";
}

// Opens a file; Error(model) names it and says why not. Direct where the file system can, else plain.
std::shared_ptr<ByteSource> open_direct(const std::string& path);

// Every source that open_direct makes goes through `wrap` from now on; null ends that. For tests.
void wrap_sources(std::function<std::shared_ptr<ByteSource>(std::shared_ptr<ByteSource>)> wrap);

// Reads [offset, offset + bytes), all aligned, into `to`: short reads go on, interrupted ones begin again, the end of
// the file may fall into the last 4096 bytes. Gives up between reads when *stop. Returns the empty text, or what went
// wrong.
std::string read_fully(ByteSource& source, void* to, size_t bytes, uint64_t offset,
                       const std::atomic<bool>* stop = nullptr);

}  // namespace sr
