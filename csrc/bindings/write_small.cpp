// Very many small tensors, written to a file.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <system_error>
#include <vector>

#include "../core/cpu_target.h"
#include "../core/crc32.h"
#include "../core/torch_zip.h"
#include "bindings.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// Larger ones are better written by all threads.
constexpr uint64_t kSmall = 16 << 10;

struct Small {
  size_t entry;
  uint64_t offset;  // in the file
  uint64_t size;    // there
  const void* data;
  int64_t count;
  CastFn cast;  // null where the bytes are there already
};

// Nothing for what is not small, plain (Note [Plain tensors]) and in row-major order, or has no kernel.
std::optional<Small> small_from(const py::handle& item, size_t index) {
  const auto fields = py::reinterpret_borrow<py::tuple>(item);
  const py::handle object = fields[1];
  if (!THPVariable_CheckExact(object.ptr())) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
  const auto dtype = fields[2].cast<at::ScalarType>();
  const auto dtypes = cast_dtypes(tensor.scalar_type(), dtype);
  if (!dtypes || !is_plain(tensor) || !tensor.is_contiguous()) {
    return std::nullopt;
  }
  const uint64_t size = static_cast<uint64_t>(tensor.numel()) * c10::elementSize(dtype);
  if (size >= kSmall) {
    return std::nullopt;
  }
  const bool casts = dtype != tensor.scalar_type();
  const CastFn cast = casts ? kernels().find(dtypes->src, dtypes->dst, Store::Cached) : nullptr;
  return Small{index, fields[0].cast<uint64_t>(), size, tensor.const_data_ptr(), tensor.numel(), cast};
}

// Returns the checksum.
uint32_t write(FileOutput& output, const Small& small) {
  alignas(8) std::array<char, kSmall> scratch;
  const void* data = small.data;
  if (small.cast != nullptr) {
    small.cast(small.data, scratch.data(), small.count);
    data = scratch.data();
  }
  if (small.offset != output.offset()) {
    output.skip(small.offset - output.offset());
  }
  output.append(data, small.size);
  return crc32(0, data, small.size);
}

}  // namespace

// Writes what is small and plain among the entries to its place in a file; what follows each other is written at once.
// entries: (offset, tensor, dtype in the file) each, in the order of their offsets. They stay as they are meanwhile.
// -> the CRC-32 of each, or None for what is left to others. Raises OSError.
py::list write_small(int file, const py::list& entries) {
  std::vector<Small> smalls;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (auto small = small_from(entries[i], i)) {
      smalls.push_back(*small);
    }
  }
  std::vector<uint32_t> crcs;
  crcs.reserve(smalls.size());
  try {
    const py::gil_scoped_release released;
    FileOutput output(file);
    for (const Small& small : smalls) {
      crcs.push_back(write(output, small));
    }
    output.flush();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  py::list results(entries.size());
  for (size_t i = 0; i < results.size(); ++i) {
    results[i] = py::none();
  }
  for (size_t i = 0; i < smalls.size(); ++i) {
    results[smalls[i].entry] = py::int_(crcs[i]);
  }
  return results;
}

}  // namespace fastopt
