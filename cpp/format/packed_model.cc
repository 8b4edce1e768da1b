// Layout descriptions are checked against the bytes that are really there before a kernel may see a matrix.
#include "format/packed_model.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "sparse_run/error.h"

namespace sr {
namespace {

constexpr int64_t kFormatVersion = 1;
constexpr size_t kMaxConfigBytes = 16u << 20;
constexpr int64_t kMaxSide = int64_t(1) << 24;  // rows or columns: keeps every product of sizes within 64 bits
constexpr size_t kTensorAlign = 4096;
constexpr const char* kAgain = "; convert it again with sparse-run convert";

const struct {
  const char* name;
  WeightKind kind;
} kKinds[] = {{"q4", WeightKind::q4},   {"q5", WeightKind::q5},   {"q6", WeightKind::q6},  {"q8", WeightKind::q8},
              {"f32", WeightKind::f32}, {"f16", WeightKind::f16}, {"bf16", WeightKind::bf16}};

int64_t member_int(const Json& j, const char* key) {
  const Json* v = j.find(key);
  if (!v) throw JsonError(std::string("lacks ") + key);
  return v->as_integer();
}

WeightKind kind_of(const Json& layout) {
  const Json* kind = layout.find("kind");
  for (const auto& k : kKinds) {
    if (kind && kind->as_string() == k.name) return k.kind;
  }
  throw JsonError("has an unknown kind");
}

// Columns per scale and minima of a quantised kind, where `m` has such members.
template <class Matrix>
void read_scales(const Json& layout, Matrix* m) {
  const int64_t group = member_int(layout, "group");
  if (group != 32 && group != 16) throw JsonError("has an impossible group");
  m->group = int(group);
  const Json* min = layout.find("min");
  m->has_min = min && min->as_bool();
}

// Slabs of a block that shares a unit of its scales; 0 where scales are halves.
int read_unit_slabs(const Json& layout) {
  const Json* columns = layout.find("superblock");
  if (!columns) return 0;
  const int64_t n = columns->as_integer();
  if (n < 2 * kSlabCols || n % (2 * kSlabCols) || n > (1 << 16)) throw JsonError("has an impossible superblock");
  return int(n / kSlabCols);
}

bool is_layout(const Json& layout, const char* name, int version) {
  const Json* text = layout.find("layout");
  return text && text->as_string() == name && member_int(layout, "version") == version;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); i++) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

size_t counted_bytes(const Safetensors& weights) {
  size_t total = 0;
  for (const auto& t : weights.tensors()) {
    if (t.first.rfind("__pad__.", 0) != 0) total += t.second.bytes;
  }
  return total;
}

}  // namespace

PackedModel::PackedModel(const std::string& directory, bool in_memory) : directory_(directory) {
  read_config();
  weights_ = std::make_unique<Safetensors>(weight_file(directory), in_memory);
  tensor_bytes_ = counted_bytes(*weights_);
}

PackedModel::PackedModel(const std::string& directory, std::shared_ptr<ByteSource> weights) : directory_(directory) {
  read_config();
  weights_ = std::make_unique<Safetensors>(std::move(weights));
  tensor_bytes_ = counted_bytes(*weights_);
}

void PackedModel::read_config() {
  const std::string config_path = directory_ + "/config.json";
  config_text_ = read_text_file(config_path, kMaxConfigBytes);
  try {
    config_ = Json::parse(config_text_);
    if (!config_.is_object()) throw JsonError("the top level must be an object");
  } catch (const JsonError& e) {
    throw Error(ErrorCode::model, "damaged model file " + config_path + ": " + e.what() + kAgain);
  }
  const Json* version = config_.find("format_version");
  if (!version || !version->is_integer()) bad_config("format_version", "is missing: not a packed model");
  if (version->as_integer() != kFormatVersion) {
    throw Error(ErrorCode::unsupported, config_path + ": packed model format " + std::to_string(version->as_integer()) +
                                            ", this program reads " + std::to_string(kFormatVersion) + kAgain);
  }
}

size_t PackedModel::weight_file_bytes(const std::string& directory) {
  std::ifstream file(weight_file(directory), std::ios::binary | std::ios::ate);
  return file ? size_t(std::max<std::streamoff>(0, file.tellg())) : 0;
}

void PackedModel::bad_config(const std::string& key, const std::string& what) const {
  throw Error(ErrorCode::model, "damaged model file " + directory_ + "/config.json: " + key + " " + what + kAgain);
}

bool PackedModel::has_matrix(const std::string& name) const {
  return weights_->find(name) || weights_->find(name + ".0");
}

Json PackedModel::layout_of(const std::string& tensor) const {
  const auto layout = weights_->metadata().find("layout:" + tensor);
  if (layout == weights_->metadata().end()) weights_->damaged(tensor + " has no layout");
  try {
    return Json::parse(layout->second);
  } catch (const JsonError& e) {
    weights_->damaged("the layout of " + tensor + " " + e.what());
  }
}

void PackedModel::check_blob(const std::string& tensor, const TensorView& view, size_t bytes) const {
  if (view.dtype != "U8") weights_->damaged(tensor + " must be of type U8");
  if (view.bytes != bytes) {
    weights_->damaged(tensor + " has " + std::to_string(view.bytes) + " bytes, its layout needs " +
                      std::to_string(bytes));
  }
  if (view.file_offset % kTensorAlign) weights_->damaged(tensor + " does not begin at a multiple of 4096 bytes");
}

PanelMatrix PackedModel::part(const std::string& tensor, const TensorView& view) const {
  PanelMatrix m;
  try {
    const Json j = layout_of(tensor);
    if (!is_layout(j, "panels", j.find("superblock") ? 2 : 1)) {
      throw Error(ErrorCode::unsupported, weights_->path() + ": tensor " + tensor +
                                              " has a layout that this program does not know" + kAgain);
    }
    m.kind = kind_of(j);
    const int64_t rows = member_int(j, "rows"), cols = member_int(j, "cols"), panel = member_int(j, "panel_rows");
    if (rows < 1 || rows > kMaxSide || cols < 1 || cols > kMaxSide) throw JsonError("has impossible sizes");
    if (panel < kTileRows || panel % kTileRows || panel > kMaxSide) throw JsonError("has an impossible panel_rows");
    m.rows = int(rows);
    m.cols = int(cols);
    m.panel_rows = int(panel);
    if (is_quantised(m.kind)) {
      read_scales(j, &m);
      m.unit_slabs = read_unit_slabs(j);
    } else if (m.panel_rows != kTileRows) {
      throw JsonError("has an impossible panel_rows");
    }
  } catch (const JsonError& e) {
    weights_->damaged("the layout of " + tensor + " " + e.what());
  }
  check_blob(tensor, view, m.total_bytes());
  m.data = view.data;
  return m;
}

bool PackedModel::has_neurons(const std::string& name) const {
  if (!weights_->find(name)) return false;
  try {
    return is_layout(layout_of(name), "neurons", 2);
  } catch (const JsonError& e) {
    weights_->damaged("the layout of " + name + " " + e.what());
  }
}

NeuronMatrix PackedModel::neurons(const std::string& name, int64_t neurons, int64_t cols, bool gated) const {
  const TensorView* view = weights_->find(name);
  if (!view) weights_->damaged("tensor " + name + " is missing");
  NeuronMatrix m;
  try {
    const Json j = layout_of(name);
    m.kind = kind_of(j);
    const Json* with_gate = j.find("gated");
    if (member_int(j, "neurons") != neurons || member_int(j, "cols") != cols || !with_gate ||
        with_gate->as_bool() != gated) {
      throw JsonError("does not fit the configuration");
    }
    m.neurons = int(neurons);
    m.cols = int(cols);
    m.gated = gated;
    if (is_quantised(m.kind)) read_scales(j, &m);
  } catch (const JsonError& e) {
    weights_->damaged("the layout of " + name + " " + e.what());
  }
  check_blob(name, *view, m.total_bytes());
  m.data = view->data;
  return m;
}

std::vector<PanelMatrix> PackedModel::matrix(const std::string& name, int64_t rows, int64_t cols) const {
  std::vector<PanelMatrix> parts;
  if (const TensorView* whole = weights_->find(name)) {
    parts.push_back(part(name, *whole));
  } else {
    for (int i = 0;; i++) {
      const std::string tensor = name + "." + std::to_string(i);
      const TensorView* view = weights_->find(tensor);
      if (!view) break;
      parts.push_back(part(tensor, *view));
    }
  }
  if (parts.empty()) weights_->damaged("tensor " + name + " is missing");
  int64_t total = 0;
  for (const PanelMatrix& p : parts) {
    total += p.rows;
    if (p.cols != cols) {
      weights_->damaged(name + " has " + std::to_string(p.cols) + " columns, the configuration says " +
                        std::to_string(cols));
    }
  }
  if (total != rows) {
    weights_->damaged(name + " has " + std::to_string(total) + " rows, the configuration says " + std::to_string(rows));
  }
  return parts;
}

const float* PackedModel::vector(const std::string& name, const std::vector<int64_t>& shape, bool required) const {
  const TensorView* view = weights_->find(name);
  if (!view) {
    if (required) weights_->damaged("tensor " + name + " is missing");
    return nullptr;
  }
  if (view->dtype != "F32" || view->shape != shape) {
    weights_->damaged(name + " is " + view->dtype + " " + shape_text(view->shape) + ", expected F32 " +
                      shape_text(shape));
  }
  if (view->file_offset % kTensorAlign) weights_->damaged(name + " does not begin at a multiple of 4096 bytes");
  weights_->file().fetch(view->file_offset, view->bytes);
  return reinterpret_cast<const float*>(view->data);
}

}  // namespace sr
