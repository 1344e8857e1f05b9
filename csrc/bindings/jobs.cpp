#include "jobs.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cerrno>

#include "../core/cpu_target.h"
#include "mapped_file.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {

bool is_dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense();
}

Job job_between(const at::Tensor& dst, const at::Tensor& src) {
  const auto dtypes = cast_dtypes(src.scalar_type(), dst.scalar_type());
  TORCH_CHECK(dtypes, "no kernel from ", src.scalar_type(), " to ", dst.scalar_type());
  const int64_t count = dtypes->src == DType::Byte ? src.numel() * src.element_size() : src.numel();
  return {src.const_data_ptr(), dst.mutable_data_ptr(), count, dtypes->src, dtypes->dst};
}

void find_in_file(Job& job, const at::Tensor& src) {
  const c10::Storage& storage = src.storage();
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

Held::~Held() {
  // Far more of them than fit into a cache: fetch the counts ahead of their turn.
  constexpr size_t kAhead = 16;
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (i + kAhead < objects_.size()) {
      __builtin_prefetch(objects_[i + kAhead], /*rw=*/1);
    }
    Py_DECREF(objects_[i]);
  }
}

void Held::add(py::handle object) {
  objects_.push_back(object.ptr());
  object.inc_ref();
}

}  // namespace fastopt
