// Copies that are listed first and then run together.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <span>
#include <vector>

#include "../core/run.h"
#include "jobs.h"
#include "memory.h"

namespace fastopt {

// Note [Small copies]
// A copy into a new tensor that is small is made at once, without being listed: what leads to it is in the cache then,
// and it costs less than to note it, keep its source alive and come back for it. From this many bytes read on, the
// other threads are worth that.
inline constexpr int64_t kSmallestListed = 1024;

// Copies between plain tensors (Note [Plain tensors]). What is listed runs together, and what it reads is kept alive
// until then by its Python objects: that costs less than to hold the tensors, where a second owner is counted once more
// in Python. What it makes, the caller keeps until `run` has returned. All of it is called with the GIL held.
class Batch {
 public:
  // `reads_files`: whether sources that lie in a mapped file still hold what the file does (mapped_file.h). They are
  // read from the file then (Note [Reading files]).
  explicit Batch(bool reads_files = false);
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Copies `src` into a new tensor as `src.to(dtype, copy=True)` would make it: dense strides are kept. The result has
  // its values after `run` at the latest, all else at once.
  // Null where the native path cannot do that (no kernel, strides with gaps, no memory): the caller asks torch.
  // `audit`, if not null, counts what the cast does; until `run` has returned, too. `is_given`: whether `src` may be
  // lost (Note [Given memory]).
  pybind11::object cast(pybind11::handle src, at::ScalarType dtype, Audit* audit = nullptr, bool is_given = false);

  // Copies `src` as `copy.deepcopy` would make it: the whole storage, and the same view of it.
  // Null where there is no memory for it.
  pybind11::object clone(pybind11::handle src);

  // Lists `dst.copy_(src)` for tensors of equal shape whose elements stand in the same order in memory, without gaps,
  // and for whose dtypes there is a kernel.
  void copy(pybind11::handle dst, pybind11::handle src);

  // Runs all that is listed, over torch's threads, with the GIL released. Call it once. Raises OSError where a file
  // cannot be read.
  void run();

 private:
  pybind11::object add(Job job, pybind11::handle src, at::Tensor dst);
  void copy_now(const Job& job, int64_t bytes);

  const Kernels& kernels_;
  const bool reads_files_;
  ResultMemory memory_;
  ReadWindow window_;  // for small copies out of files
  std::vector<Job> jobs_;
  Held held_;
};

}  // namespace fastopt
