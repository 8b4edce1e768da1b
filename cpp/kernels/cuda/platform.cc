// What a failed call of the CUDA runtime becomes.
#include "kernels/cuda/platform.h"

namespace sr {
namespace cuda {

void fail(cudaError_t error, const char* what) {
  const std::string text = cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) {
    throw Error(ErrorCode::budget, std::string("not enough GPU memory for ") + what +
                                       ": use a smaller context (--ctx-size) or model, or --device cpu");
  }
  throw Error(ErrorCode::runtime, std::string("the GPU failed (") + what + ": " + text +
                                      "): start again, with --device cpu if it comes back");
}

}  // namespace cuda
}  // namespace sr
