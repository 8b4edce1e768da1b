// Declarations of the AVX2 kernels.
#pragma once

#include "kernels/table.h"

namespace sr {
namespace avx2 {
#include "kernels/declare_kernels.inc"
}  // namespace avx2
}  // namespace sr
