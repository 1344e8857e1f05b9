// Copies between tensors of one GPU, listed first and then launched together.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <vector>

#include "../core/run.h"

namespace fastopt {

// Ordered as torch's own copies are: by the current stream of the device. Memory of its allocator is kept by that for
// what has been launched; so nothing is held here.
class DeviceBatch {
 public:
  // Whether a copy between two plain tensors (Note [Plain tensors]) is one for this: both on one GPU, aligned to their
  // elements. False for all where the extension was built without CUDA.
  static bool takes(const at::Tensor& dst, const at::Tensor& src);

  // Lists `dst.copy_(src)` for tensors that it takes, under the conditions of Batch::copy.
  void copy(const at::Tensor& dst, const at::Tensor& src);

  // Launches all that is listed and does not wait for it. Throws std::runtime_error with CUDA's own words.
  void run();

 private:
  std::map<c10::DeviceIndex, std::vector<Job>> jobs_;
};

}  // namespace fastopt
