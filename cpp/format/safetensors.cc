// The header is untrusted: every number is checked against the file's size before it becomes a pointer.
#include "format/safetensors.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/json.h"
#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100u << 20;  // the limit of the safetensors format itself

// Bytes of an element, 0 for a type that the format does not have.
size_t element_bytes(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"U16", 2}, {"I16", 2},
                                                      {"F16", 2},  {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},
                                                      {"U64", 8},  {"I64", 8},  {"F64", 8}};
  const auto it = sizes.find(dtype);
  return it == sizes.end() ? 0 : it->second;
}

TensorView read_entry(const Json& entry, const uint8_t* data, size_t header_bytes, size_t data_bytes) {
  TensorView t;
  const Json *dtype = entry.find("dtype"), *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
  if (!dtype || !shape || !offsets) throw JsonError("needs dtype, shape and data_offsets");
  t.dtype = dtype->as_string();
  const size_t element = element_bytes(t.dtype);
  if (element == 0) throw JsonError("has the unknown type " + t.dtype);
  uint64_t count = 1;
  for (const Json& dim : shape->items()) {
    const int64_t n = dim.as_integer();
    if (n < 0 || (n > 0 && count > data_bytes / uint64_t(n))) throw JsonError("has an impossible shape");
    count *= uint64_t(n);
    t.shape.push_back(n);
  }
  if (offsets->items().size() != 2) throw JsonError("needs two data_offsets");
  const int64_t begin = offsets->items()[0].as_integer(), end = offsets->items()[1].as_integer();
  if (begin < 0 || end < begin || uint64_t(end) > data_bytes) throw JsonError("points outside the file");
  t.bytes = size_t(end - begin);
  if (count * element != t.bytes) throw JsonError("has a shape that does not fit its size");
  t.file_offset = header_bytes + size_t(begin);
  t.data = data + t.file_offset;
  return t;
}

}  // namespace

Safetensors::Safetensors(const std::string& path, bool in_memory) : file_(path, in_memory) { read_header(); }

Safetensors::Safetensors(std::shared_ptr<ByteSource> source) : file_(std::move(source)) { read_header(); }

void Safetensors::damaged(const std::string& what) const {
  throw Error(ErrorCode::model,
              "damaged model file " + path() + ": " + what + "; convert it again with sparse-run convert");
}

const TensorView* Safetensors::find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

void Safetensors::read_header() {
  uint64_t length = 0;
  if (file_.size() < 8) damaged("too short for a safetensors file");
  file_.fetch(0, 8);
  for (int i = 0; i < 8; i++) length |= uint64_t(file_.data()[i]) << (8 * i);
  if (length > kMaxHeaderBytes || length > file_.size() - 8) damaged("the header is longer than the file");
  file_.fetch(0, 8 + size_t(length));
  const size_t header_bytes = 8 + size_t(length), data_bytes = file_.size() - header_bytes;

  std::string where = "header";
  try {
    const Json header =
        Json::parse(std::string_view(reinterpret_cast<const char*>(file_.data()) + 8, size_t(length)));
    for (const auto& member : header.members()) {
      where = member.first;
      if (member.first == "__metadata__") {
        for (const auto& m : member.second.members()) metadata_[m.first] = m.second.as_string();
      } else {
        tensors_[member.first] = read_entry(member.second, file_.data(), header_bytes, data_bytes);
      }
    }
  } catch (const JsonError& e) {
    damaged(where + " " + e.what());
  }

  std::vector<const TensorView*> order;
  for (const auto& t : tensors_) {
    if (t.second.bytes) order.push_back(&t.second);
  }
  std::sort(order.begin(), order.end(),
            [](const TensorView* a, const TensorView* b) { return a->file_offset < b->file_offset; });
  for (size_t i = 1; i < order.size(); i++) {
    if (order[i - 1]->file_offset + order[i - 1]->bytes > order[i]->file_offset) damaged("tensors overlap");
  }
}

}  // namespace sr
