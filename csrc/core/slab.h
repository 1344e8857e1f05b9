// Memory for many small results: pieces of shared slabs, each slab freed when its last piece is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

class Slab;

struct Piece {
  void* data;
  Slab* owner;  // to be handed to `release` once
};

// Hands out pieces of one slab after another, from one thread. Slabs grow from a few KiB to `kLargestSlab`, so that a
// small batch takes little and a surviving piece of a large one pins no more than its slab. What is left at the end of
// a slab has not been touched, and costs no memory.
class SlabArena {
 public:
  static constexpr size_t kLargestSlab = size_t{8} << 20;
  static constexpr size_t kLargestPiece = size_t{4} << 20;
  static constexpr size_t kCacheLine = 64;

  SlabArena() = default;
  ~SlabArena();
  SlabArena(const SlabArena&) = delete;
  SlabArena& operator=(const SlabArena&) = delete;

  // `bytes` is at most kLargestPiece, `alignment` a power of two up to kCacheLine. Throws std::bad_alloc.
  Piece take(size_t bytes, size_t alignment = kCacheLine);

 private:
  void retire();

  Slab* slab_ = nullptr;
  int64_t pieces_ = 0;  // of the slab, taken so far
  size_t used_ = 0;
  size_t size_ = 0;
};

// Gives a piece back, from any thread.
void release(Slab* slab) noexcept;

}  // namespace fastopt
