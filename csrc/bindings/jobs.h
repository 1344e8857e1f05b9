// From tensors to jobs, and what running them needs of torch and of Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "../core/run.h"

namespace fastopt {

// Dense memory without gaps or overlap: element i of the memory is one element of the tensor.
bool is_dense(const at::Tensor& tensor);

// The job of `dst.copy_(src)`, for plain tensors of equal shape whose elements stand in the same order in memory,
// without gaps. Throws c10::Error where there is no kernel for their dtypes.
Job job_between(const at::Tensor& dst, const at::Tensor& src);

// Has a job read its file, if its source lies in a mapped one, which still holds what the memory does.
void find_in_file(Job& job, const at::Tensor& src);

// Parallel, by torch's threads.
void over_torch_threads(int64_t tasks, const std::function<void(int64_t)>& task);

// Runs jobs over torch's threads, with the GIL released. Raises OSError where a file cannot be read.
void run_jobs(std::span<const Job> jobs);

// As OSError.
[[noreturn]] void raise(const ReadError& error);

// References to Python objects, given back together. With the GIL held.
class Held {
 public:
  Held() = default;
  ~Held();
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  void add(pybind11::handle object);

 private:
  std::vector<PyObject*> objects_;
};

}  // namespace fastopt
