// A safetensors file: mapped, its header parsed and checked; tensors are views into the mapping.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/mapped_file.h"

namespace sr {

struct TensorView {
  std::string dtype;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  size_t file_offset = 0;
};

class Safetensors {
 public:
  // Throws Error(model) naming the file when it is not a sound safetensors file: header length, JSON, offsets within
  // the file, no overlaps, shapes that agree with their byte counts.
  explicit Safetensors(const std::string& path, bool in_memory = false);
  // The header is read, tensors are not: see MappedFile::fetch.
  explicit Safetensors(std::shared_ptr<ByteSource> source);

  const std::string& path() const { return file_.path(); }
  const MappedFile& file() const { return file_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const TensorView* find(const std::string& name) const;

  // Throws Error(model) that names the file, says `what` and how to make the file anew.
  [[noreturn]] void damaged(const std::string& what) const;

 private:
  void read_header();
  MappedFile file_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace sr
