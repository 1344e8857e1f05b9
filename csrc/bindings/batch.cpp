#include "batch.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <new>
#include <utility>

#include "../core/cpu_target.h"
#include "plain.h"

namespace fastopt {
namespace {

// A storage of result memory, or null where there is none to be had. It resizes like any other CPU storage.
c10::intrusive_ptr<c10::StorageImpl> new_storage(ResultMemory& memory, size_t bytes) {
  try {
    return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes),
                                                 c10::GetCPUAllocator(), /*resizable=*/true);
  } catch (const c10::Error&) {
    return {};
  } catch (const std::bad_alloc&) {
    return {};
  }
}

// A plain tensor of `like`'s sizes and strides over a storage, built without the dispatcher: no operation happens here
// that a mode or a transform would want to see.
at::Tensor view_of(c10::intrusive_ptr<c10::StorageImpl> storage, const at::Tensor& like, at::ScalarType dtype,
                   int64_t offset) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return tensor;
}

void over_torch_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task(i);
    }
  });
}

}  // namespace

bool is_dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense();
}

at::Tensor Batch::cast(const at::Tensor& src, at::ScalarType dtype) {
  const auto dtypes = cast_dtypes(src.scalar_type(), dtype);
  if (!dtypes || !is_dense(src)) {
    return {};
  }
  auto storage = new_storage(memory_, static_cast<size_t>(src.numel()) * c10::elementSize(dtype));
  if (!storage) {
    return {};
  }
  at::Tensor dst = view_of(std::move(storage), src, dtype, 0);
  copy(dst, src);
  return dst;
}

at::Tensor Batch::clone(const at::Tensor& src) {
  const c10::Storage& from = src.storage();
  auto storage = new_storage(memory_, from.nbytes());
  if (!storage) {
    return {};
  }
  at::Tensor dst = view_of(std::move(storage), src, src.scalar_type(), src.storage_offset());
  const auto bytes = static_cast<int64_t>(from.nbytes());
  add(dst, src, {from.data(), dst.storage().mutable_data(), bytes, DType::Byte, DType::Byte});
  return dst;
}

void Batch::copy(const at::Tensor& dst, const at::Tensor& src) {
  const auto dtypes = cast_dtypes(src.scalar_type(), dst.scalar_type());
  TORCH_CHECK(dtypes, "no kernel from ", src.scalar_type(), " to ", dst.scalar_type());
  const int64_t count =
      dtypes->src == DType::Byte ? static_cast<int64_t>(src.numel() * src.element_size()) : src.numel();
  add(dst, src, {src.const_data_ptr(), dst.mutable_data_ptr(), count, dtypes->src, dtypes->dst});
}

void Batch::add(const at::Tensor& dst, const at::Tensor& src, Job job) {
  jobs_.push_back(job);
  alive_.push_back(src);
  alive_.push_back(dst);
}

void Batch::run() {
  pybind11::gil_scoped_release without_gil;
  fastopt::run(jobs_, kernels(), at::get_num_threads(), over_torch_threads);
}

}  // namespace fastopt
