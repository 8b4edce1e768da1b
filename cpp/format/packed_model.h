// The packed model directory of models/format.md: names to checked matrices and vectors, used as they lie in the file.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "format/safetensors.h"
#include "sparse_run/tensor.h"

namespace sr {

class PackedModel {
 public:
  // Opens a directory; Error(model) or Error(unsupported) says which file is missing, damaged or too new.
  // in_memory: the weights are copied into huge pages rather than mapped.
  explicit PackedModel(const std::string& directory, bool in_memory = false);
  // `weights` instead of the directory's weight file, read piece by piece: vectors when they are asked for, matrices by
  // whoever needs them (weights().file().room).
  PackedModel(const std::string& directory, std::shared_ptr<ByteSource> weights);
  static std::string weight_file(const std::string& directory) { return directory + "/weights.safetensors"; }
  // Bytes of a directory's weight file, 0 if there is none.
  static size_t weight_file_bytes(const std::string& directory);

  const std::string& directory() const { return directory_; }
  const std::string& config_text() const { return config_text_; }
  const Json& config() const { return config_; }
  const Safetensors& weights() const { return *weights_; }
  size_t tensor_bytes() const { return tensor_bytes_; }

  // Whether the matrix NAME (or its first part NAME.0) exists.
  bool has_matrix(const std::string& name) const;
  // The parts of NAME, rows and columns as expected or Error(model).
  std::vector<PanelMatrix> matrix(const std::string& name, int64_t rows, int64_t cols) const;
  // Whether NAME is stored as records of neurons, and those records: as many and of such a form, or Error(model).
  bool has_neurons(const std::string& name) const;
  NeuronMatrix neurons(const std::string& name, int64_t neurons, int64_t cols, bool gated) const;
  // An F32 tensor of exactly this shape, or null when it is absent and not `required`.
  const float* vector(const std::string& name, const std::vector<int64_t>& shape, bool required) const;

  // Throws Error(model) about config.json: `key` is missing or has an impossible value.
  [[noreturn]] void bad_config(const std::string& key, const std::string& what) const;

 private:
  void read_config();
  PanelMatrix part(const std::string& tensor, const TensorView& view) const;
  Json layout_of(const std::string& tensor) const;
  void check_blob(const std::string& tensor, const TensorView& view, size_t bytes) const;

  std::string directory_;
  std::string config_text_;
  Json config_;
  std::unique_ptr<Safetensors> weights_;
  size_t tensor_bytes_ = 0;
};

}  // namespace sr
