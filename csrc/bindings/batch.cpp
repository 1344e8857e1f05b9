#include "batch.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cerrno>
#include <new>
#include <utility>

#include "../core/cpu_target.h"
#include "checked.h"
#include "mapped_file.h"
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

// Where what a job reads lies in a file, if it does.
void find_in_file(Job& job, const c10::Storage& storage) {
  if (const auto range = file_range_of(*storage.unsafeGetStorageImpl())) {
    const auto before = static_cast<const char*>(job.src) - static_cast<const char*>(storage.data());
    job.file = range->file.descriptor();
    job.file_offset = static_cast<int64_t>(range->offset) + before;
  }
}

void over_torch_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      task(i);
    }
  });
}

}  // namespace

void raise(const ReadError& error) {
  if (error.code == 0) {
    PyErr_SetString(PyExc_OSError, error.what());
  } else {
    errno = error.code;
    PyErr_SetFromErrno(PyExc_OSError);
  }
  throw py::error_already_set();
}

void run_jobs(std::span<const Job> jobs) {
  try {
    const py::gil_scoped_release without_gil;
    fastopt::run(jobs, kernels(), at::get_num_threads(), over_torch_threads);
  } catch (const ReadError& error) {
    raise(error);
  }
}

bool is_dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense();
}

Job job_between(const at::Tensor& dst, const at::Tensor& src) {
  const auto dtypes = cast_dtypes(src.scalar_type(), dst.scalar_type());
  TORCH_CHECK(dtypes, "no kernel from ", src.scalar_type(), " to ", dst.scalar_type());
  return job_of(dst, src, *dtypes);
}

Batch::Batch(bool reads_files) : kernels_(kernels()), reads_files_(reads_files) {}

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

py::object Batch::add(Job job, py::handle src, at::Tensor dst) {
  py::object result = checked(THPVariable_Wrap(std::move(dst)));
  if (reads_files_) {
    find_in_file(job, THPVariable_Unpack(src.ptr()).storage());
  }
  if (const int64_t bytes = job.count * size_of(job.src_dtype); bytes >= kSmallestListed) {
    jobs_.push_back(job);
    hold(src);
  } else {
    copy_now(job, bytes);
  }
  return result;
}

void Batch::copy_now(const Job& job, int64_t bytes) {
  const void* src = job.src;
  if (job.file != kNoFile) {
    try {
      src = window_.at(job.file, job.file_offset, bytes);
    } catch (const ReadError& error) {
      raise(error);
    }
  }
  if (job.audit == nullptr) {
    kernels_.find(job.src_dtype, job.dst_dtype)(src, job.dst, job.count);
  } else {
    kernels_.find_audited(job.src_dtype, job.dst_dtype)(src, job.dst, job.count, *job.audit);
  }
}

void Batch::hold(py::handle object) {
  held_.push_back(object.ptr());
  object.inc_ref();
}

void Batch::run() {
  run_jobs(jobs_);
}

}  // namespace fastopt
