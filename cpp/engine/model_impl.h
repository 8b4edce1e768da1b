// What stands behind the public model handle.
#pragma once

#include "format/packed_model.h"
#include "model/decoder.h"
#include "sparse_run/engine.h"

namespace sr {

struct Model::Impl {
  explicit Impl(const ModelOptions& options);
  PackedModel packed;
  Decoder decoder;
};

}  // namespace sr
