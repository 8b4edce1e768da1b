// Declarations of the AVX-512 kernels.
#pragma once

#include "kernels/table.h"

namespace sr {
namespace avx512 {
#include "kernels/declare_kernels.inc"
}  // namespace avx512
}  // namespace sr
