// Batched copy and cast of plain tensors, for fastopt.copy_ and fastopt.to.
#include <c10/util/StringUtil.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "bindings.h"
#include "device.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

struct Interval {
  uintptr_t begin;
  uintptr_t end;
};

// The bytes from the first to the last that a strided tensor may touch; none for one that has no memory to look at.
std::optional<Interval> memory_of(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.is_meta() || tensor.numel() == 0) {
    return std::nullopt;
  }
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return Interval{begin, begin + static_cast<uintptr_t>((last + 1) * static_cast<int64_t>(tensor.element_size()))};
}

bool same_memory_order(const at::Tensor& dst, const at::Tensor& src) {
  return (dst.strides() == src.strides() && is_dense(dst)) || (dst.is_contiguous() && src.is_contiguous());
}

bool is_itself(const at::Tensor& dst, const at::Tensor& src) {
  return dst.const_data_ptr() == src.const_data_ptr() && dst.scalar_type() == src.scalar_type() &&
         dst.strides() == src.strides();
}

void sort_by_begin(std::vector<Interval>& intervals) {
  const auto earlier = [](const Interval& a, const Interval& b) { return a.begin < b.begin; };
  if (!std::is_sorted(intervals.begin(), intervals.end(), earlier)) {  // tensors of one allocation run mostly are
    std::sort(intervals.begin(), intervals.end(), earlier);
  }
}

// Whether any destination may share a byte with another destination or with a source.
bool may_overlap(std::vector<Interval> dsts, std::vector<Interval> srcs) {
  sort_by_begin(dsts);
  sort_by_begin(srcs);
  for (size_t i = 1; i < dsts.size(); ++i) {
    if (dsts[i].begin < dsts[i - 1].end) {
      return true;
    }
  }
  size_t dst = 0;
  for (const Interval& src : srcs) {
    while (dst < dsts.size() && dsts[dst].end <= src.begin) {
      ++dst;
    }
    if (dst < dsts.size() && dsts[dst].begin < src.end) {
      return true;
    }
  }
  return false;
}

// In place, an inference tensor is writable only in inference mode: torch's to refuse.
bool is_writable(const at::Tensor& tensor) {
  return !tensor.is_inference() || c10::InferenceMode::is_enabled();
}

enum class Path { Cpu, Device, Torch };

// Who copies one plain entry into another.
Path path_of(const at::Tensor& dst, const at::Tensor& src, DeviceBatch& device_batch) {
  if (!is_writable(dst) || !cast_dtypes(src.scalar_type(), dst.scalar_type())) {
    return Path::Torch;
  }
  const bool from_cpu = is_plain(src);
  const bool to_cpu = is_plain(dst);
  if (!(from_cpu || is_plain_cuda(src)) || !(to_cpu || is_plain_cuda(dst)) || !same_memory_order(dst, src)) {
    return Path::Torch;
  }
  if (from_cpu && to_cpu) {
    return Path::Cpu;
  }
  return device_batch.takes(dst, src) ? Path::Device : Path::Torch;
}

std::string described(const at::Tensor& tensor) {
  return c10::str(torch::getTHPDtype(tensor.scalar_type())->name, " ", tensor.sizes(), " on ", tensor.device());
}

}  // namespace

// Copies the plain entries and calls `leave(indices)` for the others, before any byte moves. Appends the list of the
// plain ones to `begun` when nothing is left to be done but to copy them. False, and nothing done, where the entries
// have to be looked at one by one: an entry that is no tensor, shapes that differ, memory that may overlap.
// non_blocking: whether pinned memory may be read and written later, by the current stream. reads_files: whether
// sources that lie in a mapped file still hold what the file does, and are read from there.
bool copy_plain(const py::list& dsts, const py::list& srcs, bool non_blocking, bool reads_files,
                const py::function& leave, py::list begun) {
  std::vector<std::pair<py::handle, py::handle>> pairs;  // kept alive by the lists
  std::vector<std::pair<py::handle, py::handle>> device_pairs;
  std::vector<size_t> device_indices;
  DeviceBatch device_batch(reads_files);
  std::vector<py::handle> written;
  py::list written_indices;
  std::vector<Interval> dst_memory;
  std::vector<Interval> src_memory;
  py::list left;
  for (size_t i = 0; i < dsts.size(); ++i) {
    const py::handle dst_object = dsts[i];
    const py::handle src_object = srcs[i];
    if (!THPVariable_CheckExact(dst_object.ptr()) || !THPVariable_CheckExact(src_object.ptr())) {
      if (!THPVariable_Check(dst_object.ptr()) || !THPVariable_Check(src_object.ptr())) {
        return false;
      }
      left.append(i);
      continue;
    }
    const at::Tensor& dst = THPVariable_Unpack(dst_object.ptr());
    const at::Tensor& src = THPVariable_Unpack(src_object.ptr());
    if (dst.sizes() != src.sizes()) {
      return false;
    }
    const auto dst_bytes = memory_of(dst);
    const auto src_bytes = memory_of(src);
    const bool itself = dst_bytes && src_bytes && is_itself(dst, src);
    if (dst_bytes) {
      dst_memory.push_back(*dst_bytes);
    }
    if (src_bytes && !itself) {
      src_memory.push_back(*src_bytes);
    }
    const Path path = path_of(dst, src, device_batch);
    if (path == Path::Torch) {
      left.append(i);
      continue;
    }
    written.push_back(dst_object);
    written_indices.append(i);
    if (itself) {
      continue;
    }
    if (path == Path::Cpu) {
      pairs.emplace_back(dst_object, src_object);
    } else {
      device_pairs.emplace_back(dst_object, src_object);
      device_indices.push_back(i);
    }
  }
  if (may_overlap(std::move(dst_memory), std::move(src_memory))) {
    return false;
  }
  if (!left.empty()) {
    leave(left);
  }
  Batch batch(reads_files);  // after `leave`, which may run any Python: an address taken before might not hold
  for (const auto& [dst, src] : pairs) {
    batch.copy(dst, src);
  }
  for (const auto& [dst, src] : device_pairs) {
    device_batch.copy(dst, src);
  }
  if (!written_indices.empty()) {
    begun.append(written_indices);
  }
  for (const py::handle dst : written) {
    THPVariable_Unpack(dst.ptr()).unsafeGetTensorImpl()->bump_version();
  }
  const auto describe = [&](size_t copy) {
    const auto& [dst, src] = device_pairs[copy];
    return "copy_: entry " + std::to_string(device_indices[copy]) + ": " + described(THPVariable_Unpack(src.ptr())) +
           " -> " + described(THPVariable_Unpack(dst.ptr()));
  };
  device_batch.run(describe, non_blocking);  // first: the device works while the CPU does
  batch.run();
  return true;
}

// Batched `.to(device, dtype, copy=copy)`; None stands where the result is left to torch.
py::list to_plain(const py::list& tensors, const py::object& dtype, const py::object& device, bool copy) {
  Batch batch;
  DeviceBatch device_batch;
  std::vector<size_t> device_indices;
  py::list results;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::object object = tensors[i];
    py::object result;
    if (THPVariable_CheckExact(object.ptr())) {
      const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
      const at::ScalarType to_dtype = dtype.is_none() ? tensor.scalar_type() : dtype.cast<at::ScalarType>();
      const c10::Device place = device.is_none() ? tensor.device() : DeviceBatch::resolved(device.cast<at::Device>());
      const bool on_cpu = is_plain(tensor);
      if (!copy && to_dtype == tensor.scalar_type() && place == tensor.device()) {
        result = on_cpu || is_plain_cuda(tensor) ? object : py::object();
      } else if (on_cpu && place == tensor.device()) {
        result = batch.cast(object, to_dtype);
      } else if (on_cpu || is_plain_cuda(tensor)) {
        result = device_batch.cast(object, to_dtype, place);
        device_indices.resize(device_batch.size(), i);
      }
    }
    results.append(result ? std::move(result) : py::none());
  }
  device_batch.run([&](size_t copy) {
    const size_t i = device_indices[copy];
    return "to: entry " + std::to_string(i) + ": " + described(THPVariable_Unpack(py::object(tensors[i]).ptr()));
  });
  batch.run();
  return results;
}

}  // namespace fastopt
