// The device code of cpp/kernels/cuda/head.cu as plain C++.
#include "kernels/cuda/head.cu"
