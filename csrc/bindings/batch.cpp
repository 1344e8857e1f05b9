#include "batch.h"

#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "../core/cpu_target.h"
#include "checked.h"
#include "new_tensor.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {

Batch::Batch(bool reads_files) : kernels_(kernels()), reads_files_(reads_files) {}

py::object Batch::cast(py::handle src, at::ScalarType dtype, Audit* audit, bool is_given) {
  const at::Tensor& from = THPVariable_Unpack(src.ptr());
  if (!cast_dtypes(from.scalar_type(), dtype) || !is_dense(from)) {
    return {};
  }
  at::Tensor to = new_tensor(memory_, static_cast<size_t>(from.numel()) * c10::elementSize(dtype), from, dtype, 0);
  if (!to.defined()) {
    return {};
  }
  Job job = job_between(to, from);
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
  const at::Tensor& from = THPVariable_Unpack(src.ptr());
  Job job = job_between(THPVariable_Unpack(dst.ptr()), from);
  if (reads_files_) {
    find_in_file(job, from);
  }
  jobs_.push_back(job);
  held_.add(src);
  held_.add(dst);
}

py::object Batch::add(Job job, py::handle src, at::Tensor dst) {
  py::object result = checked(THPVariable_Wrap(std::move(dst)));
  if (reads_files_) {
    find_in_file(job, THPVariable_Unpack(src.ptr()));
  }
  if (const int64_t bytes = job.count * size_of(job.src_dtype); bytes >= kSmallestListed) {
    jobs_.push_back(job);
    held_.add(src);
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

void Batch::run() {
  run_jobs(jobs_);
}

}  // namespace fastopt
