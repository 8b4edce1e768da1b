// How much memory this process may still take.
#pragma once

#include <cstddef>

namespace sr {

// Bytes available without swapping: what the system says, and what the cgroup's limit leaves. 0 when it cannot be told.
size_t available_memory();

}  // namespace sr
