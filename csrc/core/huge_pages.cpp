#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <new>

namespace fastopt {
namespace {

size_t whole_pages(size_t bytes) {
  return (bytes + kHugePage - 1) / kHugePage * kHugePage;
}

}  // namespace

#if defined(__linux__)

Mapping map_huge(size_t bytes) {
  const size_t wanted = whole_pages(bytes);
  void* raw = mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) {
    throw std::bad_alloc();
  }
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = whole_pages(start);
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

void unmap(const Mapping& mapping) noexcept {
  munmap(mapping.address, mapping.bytes);
}

void discard(void* begin, size_t bytes) noexcept {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<uintptr_t>(begin);
  uintptr_t first = (start + page - 1) / page * page;
  if (first % kHugePage == 0) {
    first += page;  // of memory in hugetlbfs, some kernels take more than was asked for, but nothing from here on
  }
  const uintptr_t last = (start + bytes) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);  // where it is refused, they stay
  }
}

#else

Mapping map_huge(size_t bytes) {
  return {::operator new(whole_pages(bytes), std::align_val_t{kHugePage}), whole_pages(bytes)};
}

void unmap(const Mapping& mapping) noexcept {
  ::operator delete(mapping.address, std::align_val_t{kHugePage});
}

void discard(void*, size_t) noexcept {}

#endif

}  // namespace fastopt
