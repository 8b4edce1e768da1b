// The Python object of a model: the handle, until it is closed.
#pragma once

#include <optional>

#include "sparse_run/engine.h"
#include "sparse_run/error.h"

namespace sr {

class PyModel {
 public:
  explicit PyModel(const ModelOptions& options) : model_(options) {}
  // A copy, so that closing while another thread loads a session does no harm.
  Model get() const {
    if (!model_) throw Error(ErrorCode::usage, "the model is closed");
    return *model_;
  }
  void close() { model_.reset(); }

 private:
  std::optional<Model> model_;
};

}  // namespace sr
