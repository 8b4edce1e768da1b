// A whole file as read-only memory: mapped, so that its pages are shared with the page cache and start-up is immediate,
// or copied into huge pages, which are read about 15-30% faster (cpp/README.md), or address space that is filled piece
// by piece, where a memory budget leaves no room for all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "base/direct_file.h"

namespace sr {

class MappedFile {
 public:
  // Throws Error(model) naming the file when it cannot be opened, is not a regular file or is empty.
  // in_memory: copied; where huge pages or memory for it cannot be had, mapped all the same.
  explicit MappedFile(const std::string& path, bool in_memory = false);
  // Room for all of the file, of which only what is fetched takes memory; the rest must not be read.
  explicit MappedFile(std::shared_ptr<ByteSource> source);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }
  bool in_memory() const { return block_ != nullptr && !source_; }
  // Makes [offset, offset + bytes) readable where the file is read piece by piece; Error(runtime) where that fails.
  void fetch(size_t offset, size_t bytes) const;
  // The same memory, for whoever reads larger pieces himself; null where the file is mapped or copied.
  uint8_t* room(size_t offset) const { return source_ ? static_cast<uint8_t*>(block_) + offset : nullptr; }
  // Tells the system that [offset, offset + bytes) will be read soon; a hint, never an error.
  void will_need(size_t offset, size_t bytes) const;

 private:
  bool copy_from(int fd);

  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  void* block_ = nullptr;  // what to unmap when copied: data_ is aligned inside it
  size_t block_size_ = 0;
  std::shared_ptr<ByteSource> source_;
  std::string path_;
};

// The content of a small text file; Error(model) when it is missing, unreadable or larger than `limit` bytes.
std::string read_text_file(const std::string& path, size_t limit);

}  // namespace sr
