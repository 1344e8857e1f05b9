#include "slab.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "huge_pages.h"

namespace fastopt {
namespace {

constexpr size_t kFirstSlab = size_t{2} << 10;

// What a slab is owned by at first, more than it will have pieces: the arena gives back what it has not handed out when
// it moves on, so that to hand out a piece counts nothing that other threads count as well.
constexpr int64_t kOwners = int64_t{1} << 62;

}  // namespace

// The head of its own memory: the pieces follow it.
class alignas(SlabArena::kCacheLine) Slab {
 public:
  // Of `bytes` or more, the head counted. Large ones go back to the system at once when they are released, whatever
  // malloc would keep.
  static Slab* create(size_t bytes) {
    if (bytes >= kHugePage) {
      const Mapping mapping = map_huge(bytes);
      return new (mapping.address) Slab(mapping.bytes, /*is_mapped=*/true);
    }
    return new (::operator new(bytes, kAlignment)) Slab(bytes, /*is_mapped=*/false);
  }

  size_t size() const { return bytes_ - sizeof(Slab); }

  // Gives back the end, where only the first `bytes` of the pieces are in use. A huge page that is in use in part is
  // there as a whole; cut off, that part comes in ordinary pages.
  void trim(size_t bytes) noexcept {
    if (is_mapped_ && bytes + kWorthTrimming < size()) {
      Mapping mapping{this, bytes_};
      fastopt::trim(mapping, sizeof(Slab) + bytes);
      bytes_ = mapping.bytes;
    }
  }

  char* pieces() { return reinterpret_cast<char*>(this + 1); }

  void drop_owners(int64_t number) noexcept {
    if (owners_.fetch_sub(number, std::memory_order_acq_rel) == number) {
      const Mapping mapping{this, bytes_};
      const bool is_mapped = is_mapped_;
      this->~Slab();
      if (is_mapped) {
        unmap(mapping);
      } else {
        ::operator delete(mapping.address, kAlignment);
      }
    }
  }

 private:
  static constexpr std::align_val_t kAlignment{SlabArena::kCacheLine};

  static constexpr size_t kWorthTrimming = size_t{256} << 10;

  Slab(size_t bytes, bool is_mapped) : bytes_(bytes), is_mapped_(is_mapped) {}

  size_t bytes_;
  const bool is_mapped_;
  std::atomic<int64_t> owners_{kOwners};
};

SlabArena::~SlabArena() {
  retire();
}

Piece SlabArena::take(size_t bytes, size_t alignment) {
  size_t begin = (used_ + alignment - 1) / alignment * alignment;
  if (slab_ == nullptr || begin + bytes > size_) {
    const size_t whole = std::clamp(2 * (size_ + sizeof(Slab)), kFirstSlab, kLargestSlab);
    Slab* next = Slab::create(std::max(bytes + sizeof(Slab), whole));
    if (slab_ != nullptr) {
      slab_->trim(used_);
    }
    retire();
    slab_ = next;
    size_ = next->size();
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
