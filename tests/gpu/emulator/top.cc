// The device code of cpp/kernels/cuda/top.cu as plain C++.
#include "kernels/cuda/top.cu"
