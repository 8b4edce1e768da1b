// The device code of cpp/kernels/cuda/gemv.cu as plain C++.
#include "kernels/cuda/gemv.cu"
