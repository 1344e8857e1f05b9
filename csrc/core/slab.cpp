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

constexpr size_t kAlignment = 64;
constexpr size_t kFirstSlab = size_t{2} << 10;
constexpr size_t kHugePage = size_t{2} << 20;

// Where a slab of so many bytes starts. One of several huge pages asks for them: a fault each instead of 512.
std::align_val_t alignment_of(size_t bytes) {
  return std::align_val_t{bytes >= kHugePage ? kHugePage : kAlignment};
}

}  // namespace

// The head of its own memory: the pieces follow it.
class alignas(kAlignment) Slab {
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

  void add_owner() noexcept { owners_.fetch_add(1, std::memory_order_relaxed); }

  void drop_owner() noexcept {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      const std::align_val_t alignment = alignment_of(bytes_);
      this->~Slab();
      ::operator delete(this, alignment);
    }
  }

 private:
  explicit Slab(size_t bytes) : bytes_(bytes) {}

  const size_t bytes_;
  std::atomic<int64_t> owners_{1};  // the arena, until it moves on
};

SlabArena::~SlabArena() {
  if (slab_ != nullptr) {
    slab_->drop_owner();
  }
}

Piece SlabArena::take(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (slab_ == nullptr || used_ + rounded > size_) {
    const size_t whole = std::clamp(2 * (size_ + sizeof(Slab)), kFirstSlab, kLargestSlab);
    const size_t size = std::max(rounded, whole - sizeof(Slab));
    Slab* next = Slab::create(sizeof(Slab) + size);
    if (slab_ != nullptr) {
      slab_->drop_owner();
    }
    slab_ = next;
    size_ = size;
    used_ = 0;
  }
  slab_->add_owner();
  void* data = slab_->pieces() + used_;
  used_ += rounded;
  return {data, slab_};
}

void release(Slab* slab) noexcept {
  slab->drop_owner();
}

}  // namespace fastopt
