#include "slab.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace fastopt {
namespace {

constexpr size_t kFirstSlab = size_t{2} << 10;
constexpr size_t kHugePage = size_t{2} << 20;

// What a slab is owned by at first, more than it will have pieces: the arena gives back what it has not handed out when
// it moves on, so that to hand out a piece counts nothing that other threads count as well.
constexpr int64_t kOwners = int64_t{1} << 62;

// Where a slab of so many bytes starts. One of several huge pages asks for them: a fault each instead of 512.
std::align_val_t alignment_of(size_t bytes) {
  return std::align_val_t{bytes >= kHugePage ? kHugePage : SlabArena::kCacheLine};
}

}  // namespace

// The head of its own memory: the pieces follow it.
class alignas(SlabArena::kCacheLine) Slab {
 public:
  // `bytes` counts the head.
  static Slab* create(size_t bytes) {
    void* memory = ::operator new(bytes, alignment_of(bytes));
#if defined(__linux__)
    if (bytes >= kHugePage) {
      madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // advice: ordinary pages serve as well
    }
#endif
    return new (memory) Slab(bytes);
  }

  char* pieces() { return reinterpret_cast<char*>(this + 1); }

  void drop_owners(int64_t number) noexcept {
    if (owners_.fetch_sub(number, std::memory_order_acq_rel) == number) {
      const std::align_val_t alignment = alignment_of(bytes_);
      this->~Slab();
      ::operator delete(this, alignment);
    }
  }

 private:
  explicit Slab(size_t bytes) : bytes_(bytes) {}

  const size_t bytes_;
  std::atomic<int64_t> owners_{kOwners};
};

SlabArena::~SlabArena() {
  retire();
}

Piece SlabArena::take(size_t bytes, size_t alignment) {
  size_t begin = (used_ + alignment - 1) / alignment * alignment;
  if (slab_ == nullptr || begin + bytes > size_) {
    const size_t whole = std::clamp(2 * (size_ + sizeof(Slab)), kFirstSlab, kLargestSlab);
    const size_t size = std::max(bytes, whole - sizeof(Slab));
    Slab* next = Slab::create(sizeof(Slab) + size);
    retire();
    slab_ = next;
    size_ = size;
    begin = 0;
  }
  pieces_ += 1;
  used_ = begin + bytes;
  return {slab_->pieces() + begin, slab_};
}

void SlabArena::retire() {
  if (slab_ != nullptr) {
    slab_->drop_owners(kOwners - pieces_);
    pieces_ = 0;
  }
}

void release(Slab* slab) noexcept {
  slab->drop_owners(1);
}

}  // namespace fastopt
