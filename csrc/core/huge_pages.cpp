#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <new>

namespace fastopt {
namespace {

constexpr uintptr_t up_to(uintptr_t number, uintptr_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

}  // namespace

#if defined(__linux__)

namespace {

size_t page_size() {
  static const auto size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

Mapping map_huge(size_t bytes) {
  const size_t wanted = up_to(bytes, page_size());
  void* raw = mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) {
    throw std::bad_alloc();
  }
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = up_to(start, kHugePage);
  if (aligned > start) {
    munmap(raw, aligned - start);
  }
  if (const size_t after = kHugePage - (aligned - start); after > 0) {
    munmap(reinterpret_cast<void*>(aligned + wanted), after);
  }
  auto* address = reinterpret_cast<void*>(aligned);
  madvise(address, wanted, MADV_HUGEPAGE);  // advice: where it is refused, ordinary pages serve
  return {address, wanted};
}

void trim(Mapping& mapping, size_t bytes) noexcept {
  const size_t kept = up_to(bytes, page_size());
  if (kept < mapping.bytes && munmap(static_cast<char*>(mapping.address) + kept, mapping.bytes - kept) == 0) {
    mapping.bytes = kept;
  }
}

void unmap(const Mapping& mapping) noexcept {
  munmap(mapping.address, mapping.bytes);
}

void discard(void* begin, size_t bytes) noexcept {
  const auto start = reinterpret_cast<uintptr_t>(begin);
  uintptr_t first = up_to(start, page_size());
  if (first % kHugePage == 0) {
    first +=
        page_size();  // of memory in hugetlbfs, some kernels take more than was asked for, but nothing from here on
  }
  const uintptr_t last = (start + bytes) / page_size() * page_size();
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // where it is refused, they stay
  }
}

#else

Mapping map_huge(size_t bytes) {
  return {::operator new(bytes, std::align_val_t{kHugePage}), bytes};
}

void trim(Mapping&, size_t) noexcept {}

void unmap(const Mapping& mapping) noexcept {
  ::operator delete(mapping.address, std::align_val_t{kHugePage});
}

void discard(void*, size_t) noexcept {}

#endif

}  // namespace fastopt
