#include "device.h"

#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <exception>

#include "../cuda/transfers.h"
#include "gpu.h"
#include "new_tensor.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

const at::Tensor& tensor_of(py::handle object) {
  return THPVariable_Unpack(object.ptr());
}

bool is_aligned_on_gpu(const at::Tensor& tensor) {
  return tensor.is_cpu() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

// Throws the error that Python has raised, with a note.
[[noreturn]] void rethrow_noted(const std::string& note) {
  py::error_already_set error;
  error.value().attr("add_note")(note);
  throw error;
}

}  // namespace

bool DeviceBatch::is_built() {
  return gpu::kIsBuilt;
}

c10::Device DeviceBatch::resolved(c10::Device device) {
  return is_built() && device.is_cuda() && !device.has_index() ? gpu::current() : device;
}

bool DeviceBatch::takes(const at::Tensor& dst, const at::Tensor& src) {
  return connects(src.device(), dst.device()) && cast_dtypes(src.scalar_type(), dst.scalar_type()) &&
         is_aligned_on_gpu(dst) && is_aligned_on_gpu(src);
}

void DeviceBatch::copy(py::handle dst, py::handle src) {
  const at::Tensor& from = tensor_of(src);
  Job job = job_between(tensor_of(dst), from);
  if (reads_files_ && from.is_cpu()) {
    find_in_file(job, from);
  }
  add(job, dst, src);
  held_.add(dst);
}

py::object DeviceBatch::cast(py::handle src, at::ScalarType dtype, c10::Device device, Audit* audit, bool is_given) {
  const at::Tensor& from = tensor_of(src);
  if (!connects(from.device(), device) || !cast_dtypes(from.scalar_type(), dtype) || !is_dense(from) ||
      !is_aligned_on_gpu(from) || (audit != nullptr && !from.is_cpu())) {
    return {};
  }
  const size_t bytes = static_cast<size_t>(from.numel()) * c10::elementSize(dtype);
  const at::Tensor to =
      device.is_cpu() ? new_tensor(memory_, bytes, from, dtype, 0) : gpu::new_tensor(from, dtype, device);
  if (!to.defined()) {
    return {};
  }
  Job job = job_between(to, from);
  if (from.is_cpu()) {
    job.audit = audit;
    job.is_given = is_given && is_discardable(src.ptr(), from);
    if (reads_files_) {
      find_in_file(job, from);
    }
  }
  auto result = py::reinterpret_steal<py::object>(THPVariable_Wrap(to));
  if (!result) {
    throw py::error_already_set();
  }
  add(job, result, src);
  return result;
}

void DeviceBatch::add(const Job& job, py::handle dst, py::handle src) {
  const bool to_gpu = tensor_of(dst).is_cuda();
  const bool from_gpu = tensor_of(src).is_cuda();
  const Way way = to_gpu && from_gpu ? Way::Within : to_gpu ? Way::ToDevice : Way::ToHost;
  Listed& listed = listed_[{way, tensor_of(to_gpu ? dst : src).device().index()}];
  listed.jobs.push_back(job);
  listed.indices.push_back(size_++);
  listed.on_cpu.push_back((to_gpu ? src : dst).ptr());
  held_.add(src);
}

void DeviceBatch::run(const std::function<std::string(size_t)>& describe, bool non_blocking) {
  for (const auto& [where, listed] : listed_) {
    const auto note = [&](size_t first, size_t last) {
      const std::string from = describe(listed.indices[first]);
      return first == last ? from : "somewhere from " + from + " to " + describe(listed.indices[last]);
    };
    const size_t last = listed.jobs.size() - 1;
    try {
      const py::gil_scoped_release without_gil;
      run_on(where.second, where.first, listed, non_blocking);
    } catch (const ReadError& error) {
      raise(error);
    } catch (const cuda::TransferError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      rethrow_noted(note(error.first_job, error.last_job));
    } catch (const cuda::DeviceError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      rethrow_noted(note(0, last));
    } catch (const c10::Error&) {  // no memory for staging
      torch::translate_exception_to_python(std::current_exception());
      rethrow_noted(note(0, last));
    }
  }
}

// Whether copies go from one to the other.
bool DeviceBatch::connects(c10::Device from, c10::Device to) {
  const c10::Device cpu(c10::kCPU);  // "cpu:0" is another device to torch
  if (!is_built() || !(from.is_cuda() || to.is_cuda())) {
    return false;
  }
  return from == to || (from == cpu && !is_capturing(to)) || (to == cpu && !is_capturing(from));
}

bool DeviceBatch::is_capturing(c10::Device gpu) {
  const auto [found, is_new] = captures_.try_emplace(gpu.index());
  if (is_new) {
    found->second = gpu::is_capturing(gpu.index());
  }
  return found->second;
}

void DeviceBatch::run_on(c10::DeviceIndex device, Way way, const Listed& listed, bool non_blocking) {
  if (way == Way::Within) {
    gpu::cast(device, listed.jobs);
    return;
  }
  const auto direction = way == Way::ToDevice ? cuda::Direction::ToDevice : cuda::Direction::ToHost;
  for (const size_t job : gpu::transfer(device, listed.jobs, direction, /*waits=*/!non_blocking)) {
    gpu::keep_until_done(device, THPVariable_Unpack(listed.on_cpu[job]));
  }
}

}  // namespace fastopt
