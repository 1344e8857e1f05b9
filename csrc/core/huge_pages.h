// Memory in pages, straight from the system and back to it.
#pragma once

#include <cstddef>

namespace fastopt {

inline constexpr size_t kHugePage = size_t{2} << 20;

struct Mapping {
  void* address;
  size_t bytes;
};

// Memory for `bytes`, up to a whole ordinary page, aligned to kHugePage and in huge pages where the system has them:
// each costs one fault instead of 512. What is left after the last whole huge page is in ordinary ones, as a huge page
// that is touched anywhere is there as a whole. Throws std::bad_alloc.
Mapping map_huge(size_t bytes);

// Gives back what lies after the first `bytes` of a mapping, which has not been touched, up to a whole ordinary page.
void trim(Mapping& mapping, size_t bytes) noexcept;

void unmap(const Mapping& mapping) noexcept;

// Gives the pages that lie as a whole within a range back to the system, which takes them when it can. What they held
// is lost: private memory, that nobody will read again before writing to it.
void discard(void* begin, size_t bytes) noexcept;

}  // namespace fastopt
