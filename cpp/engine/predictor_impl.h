// What stands behind the public predictors handle.
#pragma once

#include "engine/model_impl.h"
#include "sparse/predictor.h"
#include "sparse_run/predictor.h"

namespace sr {

struct Predictor::Impl {
  std::shared_ptr<Model::Impl> model;
  PredictorSet set;
};

}  // namespace sr
