// The device code of cpp/kernels/cuda/rows.cu as plain C++.
#include "kernels/cuda/rows.cu"
