// The device code of cpp/kernels/cuda/gemm.cu as plain C++.
#include "kernels/cuda/gemm.cu"
