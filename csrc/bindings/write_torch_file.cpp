// Files of torch.save, for plain content.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <c10/util/hash.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <deque>
#include <iomanip>
#include <numeric>
#include <optional>
#include <span>
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
constexpr std::string_view kVersion = "version";
constexpr size_t kVersionSize = 2;
constexpr std::string_view kId = ".data/serialization_id";
constexpr size_t kIdSize = 40;
constexpr uint64_t kBetween = 64;  // files within one begin at multiples of this, as records in them may do

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
  Writer(FileOutput& output, const std::array<Record, 4>& head, uint64_t alignment) : zip_(output, kFolder, alignment) {
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
    zip_.add(kVersion, "3\n", kVersionSize);
    std::ostringstream id;  // differs where the content does, as torch's
    id << std::setfill('0') << std::setw(kIdSize / 2) << index_ << std::setw(kIdSize / 2) << combined_;
    zip_.add(kId, id.str().data(), kIdSize);
    zip_.finish();
  }

 private:
  void count(uint32_t crc) { combined_ = c10::hash_combine(combined_, crc); }

  ZipWriter zip_;
  size_t index_ = 0;
  size_t combined_ = 0;
  alignas(8) std::array<char, kGathered> scratch_;
};

// One of the files, of which the large storages are written before the rest.
class TorchFile {
 public:
  // Throws TorchPickle::NotPlain.
  TorchFile(const py::handle& content, const py::dict& dtypes, const std::string& alignment) : alignment_(alignment) {
    TorchPickle pickle(dtypes);
    pickle.dump(content);
    pickle_ = pickle.take_bytes();
    storages_ = pickle.take_storages();
  }

  // Finds a place for all, from an offset on; returns where it ends. Appends what is large to `entries`.
  uint64_t lay_out(uint64_t start, uint64_t alignment, py::list& entries) {
    start_ = start;
    ZipLayout layout(kFolder.size() + 1, alignment);
    for (const Record& record : head()) {
      layout.next(record.name, record.data.size());
    }
    for (const Stored& stored : storages_) {
      const uint64_t offset = layout.next(storage_name(sources_.size()), stored.size).data;
      sources_.push_back(gathered(stored));
      if (!sources_.back()) {
        entries.append(entry(stored, start + offset));
      }
    }
    layout.next(kVersion, kVersionSize);
    layout.next(kId, kIdSize);
    size_ = layout.file_size();
    return start + size_;
  }

  // Writes the rest. `crcs` are those of what is large, from the next one of this file on.
  void write(FileOutput& output, uint64_t alignment, std::span<const uint32_t>& crcs) const {
    static constexpr std::array<char, kBetween> kGap{};
    output.append(kGap.data(), start_ - output.offset());
    Writer writer(output, head(), alignment);
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (sources_[i]) {
        writer.add(*sources_[i]);
      } else {
        TORCH_INTERNAL_ASSERT(!crcs.empty());
        writer.add_around(storages_[i].size, crcs.front());
        crcs = crcs.subspan(1);
      }
    }
    writer.finish();
    TORCH_INTERNAL_ASSERT(output.offset() == start_ + size_);
  }

  py::tuple place() const { return py::make_tuple(start_, size_); }

 private:
  std::array<Record, 4> head() const {
    return {
        {{"data.pkl", pickle_}, {".format_version", "1"}, {".storage_alignment", alignment_}, {"byteorder", "little"}}};
  }

  const std::string& alignment_;
  std::string pickle_;
  std::vector<Stored> storages_;
  std::vector<std::optional<Source>> sources_;
  uint64_t start_ = 0;
  uint64_t size_ = 0;
};

}  // namespace

// Writes what torch.save would, for contents from `first` on up to one that is not plain (Note [Plain content]): one
// file after the other into an open one, from `start` on, which nobody has written to; each begins at a multiple of
// kBetween bytes.
// `dtypes`: the dtype that a tensor gets in the file, by its id. `write_tensors(entries) -> CRC-32s` writes large
// storages: (offset, tensor, dtype) each. The contents stay alive and as they are meanwhile.
// -> (offset, bytes) of each. Raises OSError, and what `write_tensors` raises.
py::list write_torch_files(int file, const py::list& contents, size_t first, const py::dict& dtypes, uint64_t start,
                           uint64_t alignment, const py::function& write_tensors) {
  const std::string aligned = std::to_string(alignment);
  std::deque<TorchFile> files;
  py::list entries;
  uint64_t end = start;
  try {
    for (size_t i = first; i < contents.size(); ++i) {
      files.emplace_back(contents[i], dtypes, aligned);
      end = files.back().lay_out((end + kBetween - 1) / kBetween * kBetween, alignment, entries);
    }
  } catch (const TorchPickle::NotPlain&) {  // thrown before the file is one of `files`
  }
  const auto crcs = write_tensors(entries).cast<std::vector<uint32_t>>();
  try {
    const py::gil_scoped_release released;
    FileOutput output(file, start);
    std::span<const uint32_t> rest(crcs);
    for (const TorchFile& torch_file : files) {
      torch_file.write(output, alignment, rest);
    }
    output.flush();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
  py::list places;
  for (const TorchFile& torch_file : files) {
    places.append(torch_file.place());
  }
  return places;
}

}  // namespace fastopt
