// Declarations of one Arm variant's kernels.
#pragma once

#include "kernels/neon/variant.h"
#include "kernels/table.h"

namespace sr {
namespace SR_NEON {
#include "kernels/declare_kernels.inc"
}  // namespace SR_NEON
}  // namespace sr
