#include "slab.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace fastopt {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kFirstSlab = size_t{2} << 10;

}  // namespace

// The head of its own memory: the pieces follow it.
class alignas(kAlignment) Slab {
 public:
  static Slab* create(size_t bytes) {
    return new (::operator new(sizeof(Slab) + bytes, std::align_val_t{kAlignment})) Slab;
  }

  char* pieces() { return reinterpret_cast<char*>(this + 1); }

  void add_owner() noexcept { owners_.fetch_add(1, std::memory_order_relaxed); }

  void drop_owner() noexcept {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      this->~Slab();
      ::operator delete(this, std::align_val_t{kAlignment});
    }
  }

 private:
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
    const size_t size = std::max(rounded, std::clamp(2 * size_, kFirstSlab, kLargestSlab));
    Slab* next = Slab::create(size);
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
