#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>

namespace fastopt {
namespace {

#if defined(__linux__)

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 2 * kHugePage;  // below this, rounding up to whole huge pages could waste half

struct Mapping {
  void* address;
  size_t bytes;
};

void unmap(void* context) {
  const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(context));
  munmap(mapping->address, mapping->bytes);
}

c10::DataPtr map_huge(size_t bytes) {
  const size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto mapping = std::make_unique<Mapping>();  // before the memory itself, which nothing would give back if this threw
  void* raw = mmap(nullptr, wanted + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(raw != MAP_FAILED, "fastopt: can't allocate memory: you tried to allocate ", bytes, " bytes");
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const uintptr_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) {
    munmap(raw, aligned - start);
  }
  if (const size_t after = kHugePage - (aligned - start); after > 0) {
    munmap(reinterpret_cast<void*>(aligned + wanted), after);
  }
  auto* address = reinterpret_cast<void*>(aligned);
  *mapping = {address, wanted};
  madvise(address, wanted, MADV_HUGEPAGE);  // advice: where it is refused, ordinary pages serve
  return {address, mapping.release(), &unmap, c10::Device(c10::DeviceType::CPU)};
}

#endif

void release_piece(void* slab) {
  release(static_cast<Slab*>(slab));
}

}  // namespace

c10::DataPtr ResultMemory::allocate(size_t bytes) {
  if (bytes > 0 && bytes <= SlabArena::kLargestPiece) {
    const Piece piece = small_.take(bytes);
    return {piece.data, piece.owner, &release_piece, c10::Device(c10::DeviceType::CPU)};
  }
#if defined(__linux__)
  if (bytes >= kLarge) {
    return map_huge(bytes);
  }
#endif
  return c10::GetCPUAllocator()->allocate(bytes);
}

}  // namespace fastopt
