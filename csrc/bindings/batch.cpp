#include "batch.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <new>
#include <utility>

#include "../core/cpu_target.h"
#include "plain.h"

namespace py = pybind11;

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

Batch::~Batch() {
  // Far more of them than fit into a cache: fetch the counts ahead of their turn.
  constexpr size_t kAhead = 16;
  for (size_t i = 0; i < held_.size(); ++i) {
    if (i + kAhead < held_.size()) {
      __builtin_prefetch(held_[i + kAhead], /*rw=*/1);
    }
    Py_DECREF(held_[i]);
  }
}

py::object Batch::cast(py::handle src, at::ScalarType dtype) {
  const at::Tensor& tensor = THPVariable_Unpack(src.ptr());
  const auto dtypes = cast_dtypes(tensor.scalar_type(), dtype);
  if (!dtypes || !is_dense(tensor)) {
    return {};
  }
  const int64_t count = tensor.numel();
  auto storage = new_storage(memory_, static_cast<size_t>(count) * c10::elementSize(dtype));
  if (!storage) {
    return {};
  }
  const bool bytes = dtypes->src == DType::Byte;
  const Job job{tensor.const_data_ptr(), storage->mutable_data(), bytes ? count * tensor.element_size() : count,
                dtypes->src, dtypes->dst};
  return add(job, src, view_of(std::move(storage), tensor, dtype, 0));
}

py::object Batch::clone(py::handle src) {
  const at::Tensor& tensor = THPVariable_Unpack(src.ptr());
  const c10::Storage& from = tensor.storage();
  auto storage = new_storage(memory_, from.nbytes());
  if (!storage) {
    return {};
  }
  const Job job{from.data(), storage->mutable_data(), static_cast<int64_t>(from.nbytes()), DType::Byte, DType::Byte};
  return add(job, src, view_of(std::move(storage), tensor, tensor.scalar_type(), tensor.storage_offset()));
}

void Batch::copy(py::handle dst, py::handle src) {
  const at::Tensor& to = THPVariable_Unpack(dst.ptr());
  const at::Tensor& from = THPVariable_Unpack(src.ptr());
  const auto dtypes = cast_dtypes(from.scalar_type(), to.scalar_type());
  TORCH_CHECK(dtypes, "no kernel from ", from.scalar_type(), " to ", to.scalar_type());
  const int64_t count = dtypes->src == DType::Byte ? from.numel() * from.element_size() : from.numel();
  jobs_.push_back({from.const_data_ptr(), to.mutable_data_ptr(), count, dtypes->src, dtypes->dst});
  hold(src);
  hold(dst);
}

py::object Batch::add(const Job& job, py::handle src, at::Tensor dst) {
  PyObject* wrapped = THPVariable_Wrap(std::move(dst));
  if (wrapped == nullptr) {
    throw py::error_already_set();
  }
  auto result = py::reinterpret_steal<py::object>(wrapped);
  jobs_.push_back(job);
  hold(src);
  return result;
}

void Batch::hold(py::handle object) {
  held_.push_back(object.ptr());
  object.inc_ref();
}

void Batch::run() {
  const py::gil_scoped_release without_gil;
  fastopt::run(jobs_, kernels(), at::get_num_threads(), over_torch_threads);
}

}  // namespace fastopt
