// What a failed call of the CUDA runtime becomes.
#include "kernels/cuda/platform.h"

namespace sr {
namespace cuda {

void fail(cudaError_t error, const char* what) {
  const std::string text = cudaGetErrorString(error);
  // The runtime keeps a failed call in mind, and a launch asks for the last failure: without this, the next kernel
  // would be blamed for an allocation that a caller has survived. A broken device goes on failing all the same.
  cudaGetLastError();
  if (error == cudaErrorMemoryAllocation) {
    throw Error(ErrorCode::budget, std::string("not enough GPU memory for ") + what +
                                       ": use a smaller context (--ctx-size) or model, or --device cpu");
  }
  throw Error(ErrorCode::runtime, std::string("the GPU failed (") + what + ": " + text +
                                      "): start again, with --device cpu if it comes back");
}

}  // namespace cuda
}  // namespace sr
