// Memory in pages, straight from the system and back to it.
#pragma once

#include <cstddef>

namespace fastopt {

inline constexpr size_t kHugePage = size_t{2} << 20;

struct Mapping {
  void* address;
  size_t bytes;
};

// Memory for `bytes` or more, a multiple of kHugePage and aligned to it, in huge pages where the system has them: each
// costs one fault instead of 512. Throws std::bad_alloc.
Mapping map_huge(size_t bytes);

void unmap(const Mapping& mapping) noexcept;

// Gives the pages that lie as a whole within a range back to the system, which takes them when it can. What they held
// is lost: private memory, that nobody will read again before writing to it.
void discard(void* begin, size_t bytes) noexcept;

}  // namespace fastopt
