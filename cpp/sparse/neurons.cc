// Checked when set: what uses the sets does not look again.
#include "sparse/neurons.h"

#include <string>

#include "sparse_run/error.h"

namespace sr {

void NeuronSets::set(int layer, const int32_t* ids, size_t n) {
  auto set = std::make_unique<NeuronSet>();
  set->ids.assign(ids, ids + n);
  set->keep.assign(size_t(n_ff_), 0);
  for (size_t i = 0; i < n; i++) {
    if (ids[i] < 0 || ids[i] >= n_ff_ || (i && ids[i] <= ids[i - 1])) {
      throw Error(ErrorCode::usage, "the neurons of layer " + std::to_string(layer) + " must be ascending, from 0 to " +
                                        std::to_string(n_ff_ - 1) + ", each once; number " + std::to_string(i) +
                                        " is " + std::to_string(ids[i]));
    }
    set->keep[size_t(ids[i])] = 1;
  }
  sets_[size_t(layer)] = std::move(set);
}

}  // namespace sr
