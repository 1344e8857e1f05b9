// Files of torch.save, for plain content.
#include <ATen/ops/empty.h>
#include <c10/util/hash.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <iomanip>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "../core/cpu_target.h"
#include "../core/torch_zip.h"
#include "bindings.h"
#include "plain.h"
#include "torch_pickle.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// A storage of less is written together with what is around it; each larger one by itself, by all threads.
constexpr uint64_t kGathered = 16 << 10;

constexpr std::string_view kFolder = "archive";  // torch's name where it writes to no path

// What is gathered: the bytes of a storage, or what a kernel makes of a tensor.
struct Source {
  const void* data;
  uint64_t size;  // in the file
  int64_t count = 0;
  CastFn cast = nullptr;  // null where the bytes are there already
};

std::optional<Source> gathered(const Stored& stored) {
  if (stored.size >= kGathered) {
    return std::nullopt;
  }
  if (stored.memory) {
    return Source{stored.memory.data(), stored.size};
  }
  const auto dtypes = cast_dtypes(stored.tensor.scalar_type(), stored.dtype);
  if (!dtypes) {
    return std::nullopt;
  }
  // Its elements stand as they will in the file: such a tensor is dense, and its strides are kept.
  const CastFn cast = kernels().find(dtypes->src, dtypes->dst, Store::Cached);
  return Source{stored.tensor.const_data_ptr(), stored.size, stored.tensor.numel(), cast};
}

// A tensor whose elements, in row-major order, are what the storage gets.
at::Tensor in_order(const Stored& stored) {
  if (stored.memory) {
    const auto size = static_cast<int64_t>(stored.size);
    return at::empty({0}, at::kByte).set_(stored.memory, 0, {size}, {1});
  }
  std::vector<int64_t> dims(static_cast<size_t>(stored.tensor.dim()));
  std::iota(dims.begin(), dims.end(), 0);
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int64_t a, int64_t b) { return stored.tensor.stride(a) > stored.tensor.stride(b); });
  return stored.tensor.permute(dims);
}

struct Record {
  std::string_view name;
  std::string_view data;
};

std::string storage_name(size_t index) {
  return "data/" + std::to_string(index);
}

// A large storage's entry for `write_tensors`: (offset, tensor, dtype).
py::tuple entry(const Stored& stored, uint64_t offset) {
  return py::make_tuple(offset, in_order(stored), stored.memory ? at::kByte : stored.dtype);
}

// Writes the container, and in it what is gathered.
class Writer {
 public:
  Writer(int file, const std::array<Record, 4>& head, uint64_t alignment) : zip_(file, kFolder, alignment) {
    for (const Record& record : head) {
      count(zip_.add(record.name, record.data.data(), record.data.size()));
    }
  }

  void add(const Source& source) {
    const void* data = source.data;
    if (source.cast != nullptr) {
      source.cast(source.data, scratch_.data(), source.count);
      data = scratch_.data();
    }
    count(zip_.add(storage_name(index_++), data, source.size));
  }

  void add_around(uint64_t size, uint32_t crc) {
    zip_.add_around(storage_name(index_++), size, crc);
    count(crc);
  }

  void finish() {
    zip_.add("version", "3\n", 2);
    std::ostringstream id;  // differs where the content does, as torch's
    id << std::setfill('0') << std::setw(20) << index_ << std::setw(20) << combined_;
    zip_.add(".data/serialization_id", id.str().data(), id.str().size());
    zip_.finish();
  }

 private:
  void count(uint32_t crc) { combined_ = c10::hash_combine(combined_, crc); }

  ZipWriter zip_;
  size_t index_ = 0;
  size_t combined_ = 0;
  alignas(8) std::array<char, kGathered> scratch_;
};

}  // namespace

// Writes what torch.save would, into an empty file; false, and nothing done, where the content is not plain (Note
// [Plain content]).
// `dtypes`: the dtype that a tensor gets in the file, by its id. `write_tensors(entries) -> CRC-32s` writes large
// storages: (offset, tensor, dtype) each. The content stays alive and as it is meanwhile. Raises OSError, and what
// `write_tensors` raises.
bool write_torch_file(int file, const py::object& content, const py::dict& dtypes, uint64_t alignment,
                      const py::function& write_tensors) {
  TorchPickle pickle(dtypes);
  try {
    pickle.dump(content);
  } catch (const TorchPickle::NotPlain&) {
    return false;
  }
  const std::string aligned = std::to_string(alignment);
  const std::array<Record, 4> head{{{"data.pkl", pickle.bytes()},
                                    {".format_version", "1"},
                                    {".storage_alignment", aligned},
                                    {"byteorder", "little"}}};
  ZipLayout layout(kFolder.size() + 1, alignment);
  for (const Record& record : head) {
    layout.next(record.name, record.data.size());
  }
  std::vector<std::optional<Source>> sources;
  py::list entries;
  for (const Stored& stored : pickle.storages()) {
    const uint64_t offset = layout.next(storage_name(sources.size()), stored.size).data;
    sources.push_back(gathered(stored));
    if (!sources.back()) {
      entries.append(entry(stored, offset));
    }
  }
  const auto crcs = write_tensors(entries).cast<std::vector<uint32_t>>();
  try {
    const py::gil_scoped_release released;
    Writer writer(file, head, alignment);
    size_t large = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      if (sources[i]) {
        writer.add(*sources[i]);
      } else {
        writer.add_around(pickle.storages()[i].size, crcs.at(large++));
      }
    }
    writer.finish();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  return true;
}

}  // namespace fastopt
