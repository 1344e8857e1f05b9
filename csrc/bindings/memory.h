// Memory for the tensors that fastopt makes.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

#include "../core/slab.h"

namespace fastopt {

// An object in a slab. `delete` through a base class finds the way back as well.
template <class T>
class InSlab final : public T {
  static_assert(std::has_virtual_destructor_v<T>);

 public:
  using T::T;

  static void* operator new(size_t bytes, SlabArena& slabs) {
    static_assert(alignof(T) <= sizeof(Head));
    const Piece piece = slabs.take(sizeof(Head) + bytes, sizeof(Head));
    return (new (piece.data) Head{piece.owner}) + 1;
  }

  static void operator delete(void* object) { release((static_cast<Head*>(object) - 1)->owner); }

  // Called where a constructor has thrown.
  static void operator delete(void* object, SlabArena&) { operator delete(object); }

 private:
  struct alignas(2 * sizeof(void*)) Head {
    Slab* owner;
  };
};

// Note [Result memory]
// A large result is written once, from end to end, right after it is allocated: what it costs is its fresh pages. So it
// gets a mapping of its own, aligned to 2 MiB and advised to use huge pages, which halve that cost where the system has
// them and change nothing where it has not; the mapping goes back to the system with the tensor. Smaller results of one
// batch share slabs, large ones of which ask for huge pages as well: an allocation of its own would cost each of the
// smallest more than its values, and each of the larger ones its fresh pages at their full price.
//
// The objects that a tensor is made of take more memory than the values of a small one, so they come from slabs too,
// but from slabs of their own: they live on where the values are given back (resize_(0), `tensor.data = …`), and must
// not keep those.
class ResultMemory {
 public:
  // Throws std::bad_alloc.
  c10::DataPtr allocate(size_t bytes);

  // An object of torch's, which goes the way of any other when nobody refers to it. Throws std::bad_alloc,
  // and what T's constructor throws.
  template <class T, class Null = c10::detail::intrusive_target_default_null_type<T>, class... Arguments>
  c10::intrusive_ptr<T, Null> make(Arguments&&... arguments) {
    T* object = new (objects_) InSlab<T>(std::forward<Arguments>(arguments)...);
    return c10::intrusive_ptr<T, Null>::unsafe_steal_from_new(object);
  }

 private:
  SlabArena small_;
  SlabArena objects_;
};

}  // namespace fastopt
