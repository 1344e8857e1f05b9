#include "memory.h"

#include <c10/core/CPUAllocator.h>

#include <memory>

#include "../core/huge_pages.h"

namespace fastopt {
namespace {

void release_mapping(void* context) {
  const std::unique_ptr<Mapping> mapping(static_cast<Mapping*>(context));
  unmap(*mapping);
}

void release_piece(void* slab) {
  release(static_cast<Slab*>(slab));
}

}  // namespace

c10::DataPtr ResultMemory::allocate(size_t bytes) {
  const c10::Device cpu(c10::DeviceType::CPU);
  if (bytes == 0) {
    return c10::GetCPUAllocator()->allocate(0);
  }
  if (bytes <= SlabArena::kLargestPiece) {
    const Piece piece = small_.take(bytes);
    return {piece.data, piece.owner, &release_piece, cpu};
  }
  auto mapping = std::make_unique<Mapping>();  // before the memory itself, which nothing would give back if this threw
  *mapping = map_huge(bytes);
  void* address = mapping->address;
  return {address, mapping.release(), &release_mapping, cpu};
}

}  // namespace fastopt
