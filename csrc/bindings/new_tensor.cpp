#include "new_tensor.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/Exception.h>

#include <new>
#include <utility>

namespace fastopt {
namespace {

// A storage of result memory. It resizes like any other CPU storage.
c10::intrusive_ptr<c10::StorageImpl> new_storage(ResultMemory& memory, size_t bytes) {
  return memory.make<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes),
                                       c10::GetCPUAllocator(), /*resizable=*/true);
}

}  // namespace

at::Tensor tensor_over(ResultMemory& memory, c10::Storage storage, at::ScalarType dtype, at::IntArrayRef sizes,
                       at::IntArrayRef strides, int64_t offset) {
  auto impl = memory.make<c10::TensorImpl, c10::UndefinedTensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  impl->set_sizes_and_strides(sizes, strides, offset);
  return at::Tensor(std::move(impl));
}

at::Tensor new_tensor(ResultMemory& memory, size_t bytes, const at::Tensor& like, at::ScalarType dtype,
                      int64_t offset) {
  try {
    return tensor_over(memory, c10::Storage(new_storage(memory, bytes)), dtype, like.sizes(), like.strides(), offset);
  } catch (const c10::Error&) {
    return {};
  } catch (const std::bad_alloc&) {
    return {};
  }
}

}  // namespace fastopt
