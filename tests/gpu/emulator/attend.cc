// The device code of cpp/kernels/cuda/attend.cu as plain C++.
#include "kernels/cuda/attend.cu"
