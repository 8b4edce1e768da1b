// The reference kernels, also used by other sets for what they do not specialise.
#pragma once

#include "kernels/table.h"

namespace sr {
namespace generic {
#include "kernels/declare_kernels.inc"
}  // namespace generic

const KernelTable& generic_table();

}  // namespace sr
