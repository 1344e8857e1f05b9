// Tensors at known places of a file.
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../core/file.h"
#include "bindings.h"
#include "jobs.h"
#include "mapped_file.h"
#include "memory.h"
#include "new_tensor.h"
#include "plain.h"

namespace py = pybind11;

namespace fastopt {
namespace {

using Counts = c10::SmallVector<int64_t, 5>;

Counts counts_from(const py::handle& sequence) {
  Counts counts;
  for (const py::handle item : sequence) {
    counts.push_back(item.cast<int64_t>());
  }
  return counts;
}

Counts row_major(const Counts& sizes) {
  Counts strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(sizes[dim], 1), &stride)) {
      throw py::value_error("a tensor has too many elements");
    }
  }
  return strides;
}

// Elements that a storage must have; throws where there is no such number.
int64_t elements_needed(const Counts& sizes, const Counts& strides, int64_t first) {
  bool fits = sizes.size() == strides.size() && first >= 0;
  bool is_empty = false;
  int64_t last = first;
  for (size_t dim = 0; fits && dim < sizes.size(); ++dim) {
    int64_t step = 0;
    fits = sizes[dim] >= 0 && strides[dim] >= 0 &&
           !__builtin_mul_overflow(std::max<int64_t>(sizes[dim] - 1, 0), strides[dim], &step) &&
           !__builtin_add_overflow(last, step, &last);
    is_empty = is_empty || sizes[dim] == 0;
  }
  if (!fits || __builtin_add_overflow(last, 1, &last)) {
    throw py::value_error("sizes and strides are no tensor's");
  }
  return is_empty ? 0 : last;
}

struct Place {
  int64_t offset;
  int64_t bytes;
  at::ScalarType dtype;
  Counts sizes;
  Counts strides;
  int64_t first;
  bool is_copied;
};

Place place_from(const py::handle& item) {
  const auto fields = item.cast<py::tuple>();
  Place place{fields[0].cast<int64_t>(),
              fields[1].cast<int64_t>(),
              fields[2].cast<at::ScalarType>(),
              counts_from(fields[3]),
              {},
              fields[5].cast<int64_t>(),
              fields[6].cast<bool>()};
  place.strides = fields[4].is_none() ? row_major(place.sizes) : counts_from(fields[4]);
  return place;
}

void check(const Place& place, size_t file_size) {
  const auto item_size = static_cast<int64_t>(c10::elementSize(place.dtype));
  if (place.offset < 0 || place.bytes < 0 || static_cast<size_t>(place.offset) > file_size ||
      static_cast<size_t>(place.bytes) > file_size - static_cast<size_t>(place.offset)) {
    throw py::value_error("a tensor is not within the file");
  }
  if (elements_needed(place.sizes, place.strides, place.first) > place.bytes / item_size) {
    throw py::value_error("a tensor is not within its bytes of the file");
  }
  if (!place.is_copied && place.offset % item_size != 0) {
    throw py::value_error("a tensor is not aligned in the file");
  }
}

c10::intrusive_ptr<c10::StorageImpl> mapped(ResultMemory& memory, MappedFile& file, const Place& place) {
  return memory.make<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), static_cast<size_t>(place.bytes),
                                       file.memory_at(static_cast<size_t>(place.offset)), /*allocator=*/nullptr,
                                       /*resizable=*/false);
}

// What a file holds, read into memory: small pieces through a window.
c10::intrusive_ptr<c10::StorageImpl> copied(ResultMemory& memory, ReadWindow& window, int file, const Place& place) {
  const auto bytes = static_cast<size_t>(place.bytes);
  auto storage = memory.make<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, memory.allocate(bytes),
                                               c10::GetCPUAllocator(), /*resizable=*/true);
  if (place.bytes > window.longest()) {
    read_at(file, place.offset, storage->mutable_data(), place.bytes);
  } else if (place.bytes > 0) {
    std::memcpy(storage->mutable_data(), window.at(file, place.offset, place.bytes), bytes);
  }
  return storage;
}

}  // namespace

// descriptor: an open file, which may be closed afterwards. path: its name, as os.fsencode gives it.
// places: (offset, bytes, dtype, sizes, strides, first, is copied) of each tensor: where in the file its storage is;
// its strides, None for those of row-major order; the element of the storage that it begins with; and whether the
// storage is read into memory, or lies in a mapping of the file. In the mapping, the storage has to be aligned to the
// dtype.
// -> a tensor for each. Raises ValueError where a tensor would not lie within its bytes or the file, and OSError where
// the file cannot be mapped or read.
py::list tensors_in_file(int descriptor, const std::string& path, const py::list& places) {
  const auto file = MappedFile::of(descriptor, path);
  if (!file) {
    PyErr_SetString(PyExc_OSError, "the file cannot be mapped into memory");
    throw py::error_already_set();
  }
  ResultMemory memory;
  ReadWindow window;
  py::list tensors(places.size());
  for (size_t i = 0; i < places.size(); ++i) {
    const Place place = place_from(places[i]);
    check(place, file->contents().size());
    try {
      auto storage = place.is_copied ? copied(memory, window, descriptor, place) : mapped(memory, *file, place);
      tensors[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(
          tensor_over(memory, c10::Storage(std::move(storage)), place.dtype, place.sizes, place.strides, place.first)));
    } catch (const ReadError& error) {
      raise(error);
    }
  }
  return tensors;
}

// Fills a tensor with the elements that stand in a file from an offset on, in row-major order, as this dtype; all
// threads read and cast. Whether it did: not where the tensor is not plain (Note [Plain tensors]) and contiguous, or
// there is no kernel. Raises OSError where the file cannot be read.
bool read_into(int descriptor, int64_t offset, at::ScalarType dtype, const at::Tensor& target) {
  const auto dtypes = cast_dtypes(dtype, target.scalar_type());
  if (!dtypes || !is_plain(target) || !target.is_contiguous()) {
    return false;
  }
  const int64_t scale = dtypes->src == DType::Byte ? target.element_size() : 1;
  const Job job{nullptr,     target.mutable_data_ptr(), target.numel() * scale, dtypes->src,
                dtypes->dst, /*audit=*/nullptr,         /*is_given=*/false,     descriptor,
                offset};
  run_jobs({&job, 1});
  return true;
}

namespace {

// Rows of a box that are shorter than this are read together with what is between them, by whoever is left with them.
constexpr int64_t kShortestRow = 4 << 10;

// A box of elements in a file, row by row: as many dimensions as lie without gaps in the file and in the target make a
// row, and the others count the rows.
class Rows {
 public:
  Rows(const Counts& steps, const at::Tensor& target) : steps_(steps), target_(target) {
    for (outer_ = target.dim(); outer_ > 0; --outer_) {
      const int64_t dim = outer_ - 1;
      if (target.size(dim) != 1 && (steps[static_cast<size_t>(dim)] != elements_ || target.stride(dim) != elements_)) {
        break;
      }
      elements_ *= target.size(dim);
    }
  }

  int64_t elements() const { return elements_; }

  // Calls `row(elements before it in the file, elements before it in the target)` for each.
  template <class Row>
  void each(const Row& row, int64_t dim = 0, int64_t in_file = 0, int64_t in_target = 0) const {
    if (dim == outer_) {
      row(in_file, in_target);
      return;
    }
    for (int64_t i = 0; i < target_.size(dim); ++i) {
      each(row, dim + 1, in_file + i * steps_[static_cast<size_t>(dim)], in_target + i * target_.stride(dim));
    }
  }

 private:
  const Counts& steps_;
  const at::Tensor& target_;
  int64_t outer_ = 0;
  int64_t elements_ = 1;
};

// Lists the jobs that fill a tensor with a box of a file; false where that is not for jobs to do.
bool list_jobs(std::vector<Job>& jobs, int descriptor, int64_t offset, at::ScalarType dtype, const Counts& steps,
               const at::Tensor& target) {
  const auto dtypes = cast_dtypes(dtype, target.scalar_type());
  if (!dtypes || !is_plain(target) || steps.size() != static_cast<size_t>(target.dim())) {
    return false;
  }
  const auto file_item = static_cast<int64_t>(c10::elementSize(dtype));
  const Rows rows(steps, target);
  if (rows.elements() < target.numel() && rows.elements() * file_item < kShortestRow) {
    return false;
  }
  const int64_t scale = dtypes->src == DType::Byte ? file_item : 1;
  char* const memory = static_cast<char*>(target.mutable_data_ptr());
  rows.each([&](int64_t in_file, int64_t in_target) {
    jobs.push_back({nullptr, memory + in_target * static_cast<int64_t>(target.element_size()), rows.elements() * scale,
                    dtypes->src, dtypes->dst, /*audit=*/nullptr, /*is_given=*/false, descriptor,
                    offset + in_file * file_item});
  });
  return true;
}

}  // namespace

// Fills tensors with boxes of elements that stand in files; all threads read and cast, in the order of the entries.
// entries: (descriptor, offset, dtype, steps, target) each: the byte of the file where the box's first element is, and
// how many elements the next one along each dimension is after it.
// -> the indices of those that are left to be read by others: what is not plain, has no kernel, or lies in short rows.
// Raises OSError where a file cannot be read, or ends before.
py::list read_boxes(const py::list& entries) {
  std::vector<Job> jobs;
  py::list left;
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto fields = entries[i].cast<py::tuple>();
    const at::Tensor target = fields[4].cast<at::Tensor>();
    if (target.numel() == 0) {
      continue;
    }
    if (list_jobs(jobs, fields[0].cast<int>(), fields[1].cast<int64_t>(), fields[2].cast<at::ScalarType>(),
                  counts_from(fields[3]), target)) {
      target.unsafeGetTensorImpl()->bump_version();
    } else {
      left.append(i);
    }
  }
  run_jobs(jobs);
  return left;
}

// A new tensor for each of (sizes, dtype), with memory that is fit to be filled from end to end.
py::list new_tensors(const py::list& specs) {
  ResultMemory memory;
  py::list tensors(specs.size());
  for (size_t i = 0; i < specs.size(); ++i) {
    const auto fields = specs[i].cast<py::tuple>();
    const Counts sizes = counts_from(fields[0]);
    const auto dtype = fields[1].cast<at::ScalarType>();
    const Counts strides = row_major(sizes);
    int64_t bytes = 0;
    if (__builtin_mul_overflow(elements_needed(sizes, strides, 0), static_cast<int64_t>(c10::elementSize(dtype)),
                               &bytes)) {
      throw py::value_error("a tensor has too many elements");
    }
    auto storage = memory.make<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), static_cast<size_t>(bytes),
                                                 memory.allocate(static_cast<size_t>(bytes)), c10::GetCPUAllocator(),
                                                 /*resizable=*/true);
    tensors[i] = py::reinterpret_steal<py::object>(
        THPVariable_Wrap(tensor_over(memory, c10::Storage(std::move(storage)), dtype, sizes, strides, 0)));
  }
  return tensors;
}

// -> (file descriptor, offset, bytes, path) of a tensor's storage; None where it lies in no file mapped by fastopt.
py::object file_range(const py::object& tensor) {
  if (!THPVariable_Check(tensor.ptr())) {
    throw py::type_error("file_range: not a tensor");
  }
  const at::Tensor& unpacked = THPVariable_Unpack(tensor.ptr());
  if (!unpacked.has_storage()) {
    return py::none();
  }
  const auto range = file_range_of(*unpacked.storage().unsafeGetStorageImpl());
  return range ? py::object(py::make_tuple(range->file.descriptor(), range->offset, range->bytes,
                                           py::bytes(range->file.path())))
               : py::none();
}

}  // namespace fastopt
