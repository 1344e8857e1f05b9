// Copies that are listed first and then run together.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../core/run.h"
#include "memory.h"

namespace fastopt {

// Collects copies between plain tensors (Note [Plain tensors]) and keeps both sides alive. What `cast` and `clone`
// return has its final size, strides and dtype at once, and its values after `run`.
class Batch {
 public:
  // Lists a copy of `src` into a new tensor as `src.to(dtype, copy=True)` would make it: dense strides are kept.
  // Undefined where the native path cannot do that (no kernel, strides with gaps, no memory): the caller asks torch.
  at::Tensor cast(const at::Tensor& src, at::ScalarType dtype);

  // Lists a copy of `src` as `copy.deepcopy` would make it: the whole storage, and the same view of it.
  // Undefined where there is no memory for it.
  at::Tensor clone(const at::Tensor& src);

  // Lists `dst.copy_(src)` for tensors of equal shape whose elements stand in the same order in memory, without gaps,
  // and for whose dtypes there is a kernel.
  void copy(const at::Tensor& dst, const at::Tensor& src);

  // Runs all that is listed, over torch's threads, with the GIL released. Call it with the GIL held, once.
  void run();

 private:
  void add(const at::Tensor& dst, const at::Tensor& src, Job job);

  ResultMemory memory_;
  std::vector<Job> jobs_;
  std::vector<at::Tensor> alive_;
};

// Dense memory without gaps or overlap: element i of the memory is one element of the tensor.
bool is_dense(const at::Tensor& tensor);

}  // namespace fastopt
