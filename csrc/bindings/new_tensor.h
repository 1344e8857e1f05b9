// Tensors made without the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include "memory.h"

namespace fastopt {

// A plain tensor over a storage of the CPU's, built without the dispatcher: no operation happens here that a mode or a
// transform would want to see. `offset` and `strides` count elements, all of which lie within the storage (the caller's
// to know). Throws std::bad_alloc.
at::Tensor tensor_over(ResultMemory& memory, c10::Storage storage, at::ScalarType dtype, at::IntArrayRef sizes,
                       at::IntArrayRef strides, int64_t offset);

// A tensor of another's sizes and strides over a new storage of result memory. Undefined where there is no memory for
// it.
at::Tensor new_tensor(ResultMemory& memory, size_t bytes, const at::Tensor& like, at::ScalarType dtype, int64_t offset);

}  // namespace fastopt
