// Buffers are zeroed and aligned; giving pages back touches whole pages only, whatever their size.
#include "base/aligned_buffer.h"

#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "check.h"

using sr::AlignedBuffer;

TEST_CASE("buffer: zeroed and aligned to 64 bytes, small and large") {
  for (size_t n : {size_t(1), size_t(1000), size_t(256 * 1024 - 1), size_t(256 * 1024), size_t(3000001)}) {
    AlignedBuffer<uint8_t> b(n, "test");
    CHECK_EQ(reinterpret_cast<uintptr_t>(b.data()) % 64, uintptr_t(0));
    CHECK(std::all_of(b.data(), b.data() + n, [](uint8_t v) { return v == 0; }));
    std::fill(b.data(), b.data() + n, uint8_t(1));  // all of it can be written
  }
}

TEST_CASE("discard_pages: bytes outside the whole pages of the range keep their values") {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), n = 20 * page + 1000;
  AlignedBuffer<uint8_t> b(std::max(n, size_t(512 * 1024)), "test");
  for (const auto& range : {std::pair<size_t, size_t>{page / 2, 3 * page}, {5 * page, page}, {7 * page + 1, page},
                            {10 * page + 64, 100}, {12 * page, 8 * page + 1000}}) {
    std::fill(b.data(), b.data() + n, uint8_t(7));
    sr::discard_pages(b.data() + range.first, range.second);
    const size_t first = (range.first + page - 1) / page * page, last = (range.first + range.second) / page * page;
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) {
#if defined(__linux__)
      const bool given_back = i >= first && i < last;
#else
      const bool given_back = false;
      (void)first, (void)last;
#endif
      wrong += b[i] != (given_back ? 0 : 7);
    }
    CHECK_EQ(wrong, size_t(0));
  }
}
