// What stands behind the public thresholds handle.
#pragma once

#include "engine/model_impl.h"
#include "sparse/plan.h"

namespace sr {

struct Sparsity::Impl {
  std::shared_ptr<Model::Impl> model;
  SparsityPlan plan;
};

}  // namespace sr
