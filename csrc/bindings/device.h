// Copies to, from and within GPUs, listed first and then made together.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../core/run.h"
#include "jobs.h"
#include "memory.h"

namespace fastopt {

// What is copied within a GPU is launched; what crosses the bus goes through the pinned ring (Note [Pinned ring]).
// Ordered as torch's own copies are: by the current stream of the GPU. What is listed is kept alive by its Python
// objects until it has run, and after that, on a GPU, by torch's allocator for what has been launched. All of it is
// called with the GIL held.
class DeviceBatch {
 public:
  // `reads_files`: as of Batch.
  explicit DeviceBatch(bool reads_files = false) : reads_files_(reads_files) {}

  // Whether the extension was built with CUDA: otherwise a batch takes nothing.
  static bool is_built();

  // A GPU without an index is the current one.
  static c10::Device resolved(c10::Device device);

  // Whether a copy between two plain tensors (Note [Plain tensors]) is one for this: on one GPU, or between one and the
  // CPU; for whose dtypes there is a kernel; aligned to their elements there. A graph that is being captured takes
  // copies within a GPU alone.
  bool takes(const at::Tensor& dst, const at::Tensor& src);

  // Lists `dst.copy_(src)` for tensors that it takes, of equal shape, whose elements stand in the same order in memory,
  // without gaps.
  void copy(pybind11::handle dst, pybind11::handle src);

  // Copies a plain tensor into a new one as `src.to(device, dtype, copy=True)` would make it: dense strides are kept.
  // The result has its values after `run`, all else at once; the caller keeps it until then.
  // Null where that is not for this, or there is no memory for it: the caller asks torch.
  // `audit` and `is_given`: as of Batch::cast; with an audit, copies from the CPU alone are for this.
  pybind11::object cast(pybind11::handle src, at::ScalarType dtype, c10::Device device, Audit* audit = nullptr,
                        bool is_given = false);

  // How many have been listed.
  size_t size() const { return size_; }

  // Makes all that is listed. Memory of the CPU has been read and written when it returns; where it is pinned, and
  // `non_blocking` says so, it is read and written by the current stream. Call it once, with the GIL held; it is
  // released meanwhile. Raises RuntimeError with CUDA's own words and a note of what was being copied, in the words of
  // `describe` for the index of a copy in the order of listing; and OSError where a file cannot be read.
  void run(const std::function<std::string(size_t)>& describe, bool non_blocking = false);

 private:
  enum class Way : uint8_t { Within, ToDevice, ToHost };

  struct Listed {
    std::vector<Job> jobs;
    std::vector<size_t> indices;    // of each in the order of listing
    std::vector<PyObject*> on_cpu;  // the side of each that is there, if one is
  };

  void add(const Job& job, pybind11::handle dst, pybind11::handle src);
  bool connects(c10::Device from, c10::Device to);
  bool is_capturing(c10::Device gpu);
  static void run_on(c10::DeviceIndex device, Way way, const Listed& listed, bool non_blocking);

  const bool reads_files_;
  ResultMemory memory_;
  std::map<std::pair<Way, c10::DeviceIndex>, Listed> listed_;
  std::map<c10::DeviceIndex, bool> captures_;
  size_t size_ = 0;
  Held held_;
};

}  // namespace fastopt
