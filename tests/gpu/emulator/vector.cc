// The device code of cpp/kernels/cuda/vector.cu as plain C++.
#include "kernels/cuda/vector.cu"
