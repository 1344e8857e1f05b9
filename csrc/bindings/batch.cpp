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
#include "new_tensor.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// A storage of result memory. It resizes like any other CPU storage.
c10::intrusive_ptr<c10::StorageImpl> new_storage(ResultMemory& memory, size_t bytes) {
  return memory.make<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes),
                                       c10::GetCPUAllocator(), /*resizable=*/true);
}

// A tensor of `like`'s sizes and strides over a new storage. Undefined where there is no memory for it.
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

Job job_of(const at::Tensor& dst, const at::Tensor& src, CastDTypes dtypes) {
  const int64_t count = dtypes.src == DType::Byte ? src.numel() * src.element_size() : src.numel();
  return {src.const_data_ptr(), dst.mutable_data_ptr(), count, dtypes.src, dtypes.dst};
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

Job job_between(const at::Tensor& dst, const at::Tensor& src) {
  const auto dtypes = cast_dtypes(src.scalar_type(), dst.scalar_type());
  TORCH_CHECK(dtypes, "no kernel from ", src.scalar_type(), " to ", dst.scalar_type());
  return job_of(dst, src, *dtypes);
}

Batch::Batch() : kernels_(kernels()) {}

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

py::object Batch::cast(py::handle src, at::ScalarType dtype, Audit* audit, bool is_given) {
  const at::Tensor& from = THPVariable_Unpack(src.ptr());
  const auto dtypes = cast_dtypes(from.scalar_type(), dtype);
  if (!dtypes || !is_dense(from)) {
    return {};
  }
  at::Tensor to = new_tensor(memory_, static_cast<size_t>(from.numel()) * c10::elementSize(dtype), from, dtype, 0);
  if (!to.defined()) {
    return {};
  }
  Job job = job_of(to, from, *dtypes);
  job.audit = audit;
  job.is_given = is_given && is_discardable(src.ptr(), from);
  return add(job, src, std::move(to));
}

py::object Batch::clone(py::handle src) {
  const at::Tensor& from = THPVariable_Unpack(src.ptr());
  const size_t bytes = from.storage().nbytes();
  at::Tensor to = new_tensor(memory_, bytes, from, from.scalar_type(), from.storage_offset());
  if (!to.defined()) {
    return {};
  }
  const Job job{from.storage().data(), to.storage().mutable_data(), static_cast<int64_t>(bytes), DType::Byte,
                DType::Byte};
  return add(job, src, std::move(to));
}

void Batch::copy(py::handle dst, py::handle src) {
  jobs_.push_back(job_between(THPVariable_Unpack(dst.ptr()), THPVariable_Unpack(src.ptr())));
  hold(src);
  hold(dst);
}

py::object Batch::add(const Job& job, py::handle src, at::Tensor dst) {
  auto result = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(dst)));
  if (!result) {
    throw py::error_already_set();
  }
  if (const int64_t bytes = job.count * size_of(job.src_dtype); bytes < kSmallestListed) {
    if (job.audit == nullptr) {
      kernels_.find(job.src_dtype, job.dst_dtype)(job.src, job.dst, job.count);
    } else {
      kernels_.find_audited(job.src_dtype, job.dst_dtype)(job.src, job.dst, job.count, *job.audit);
    }
  } else {
    jobs_.push_back(job);
    hold(src);
  }
  return result;
}

void Batch::hold(py::handle object) {
  held_.push_back(object.ptr());
  object.inc_ref();
}

void Batch::run() {
  const py::gil_scoped_release without_gil;
  fastopt::run(jobs_, kernels_, at::get_num_threads(), over_torch_threads);
}

}  // namespace fastopt
