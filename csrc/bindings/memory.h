// Memory for the tensors that fastopt makes.
#pragma once

#include <c10/core/Allocator.h>

#include "../core/slab.h"

namespace fastopt {

// Note [Result memory]
// A large result is written once, from end to end, right after it is allocated: what it costs is its fresh pages. So it
// gets a mapping of its own, aligned to 2 MiB and advised to use huge pages, which halve that cost where the system has
// them and change nothing where it has not; the mapping goes back to the system with the tensor. Smaller results of one
// batch share slabs, large ones of which ask for huge pages as well: an allocation of its own would cost each of the
// smallest more than its values, and each of the larger ones its fresh pages at their full price.
class ResultMemory {
 public:
  // Throws c10::Error or std::bad_alloc.
  c10::DataPtr allocate(size_t bytes);

 private:
  SlabArena small_;
};

}  // namespace fastopt
