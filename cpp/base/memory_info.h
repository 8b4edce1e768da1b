// How much memory this process may still take.
#pragma once

#include <cstddef>

namespace sr {

// Bytes available without swapping: what the system says, and what the cgroup's limit leaves. 0 when it cannot be told.
size_t available_memory();

// Bytes that this machine, or the cgroup's limit, has in all. 0 when it cannot be told.
size_t total_memory();

// Bytes of memory that this process takes now, shared pages included. 0 when it cannot be told.
size_t resident_memory();

// Returns what the heap holds but does not use to the system, where it can be told to.
void give_back_freed_memory();

}  // namespace sr
