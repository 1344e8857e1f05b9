// Reading what torch.save wrote, where it is plain.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "archive.h"
#include "bindings.h"
#include "mapped_file.h"
#include "plain_pickle.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// Storages over the records that a pickle asks for.
class MappedStorages {
 public:
  MappedStorages(c10::intrusive_ptr<MappedFile> file, Archive& archive) : file_(std::move(file)), archive_(archive) {}

  c10::intrusive_ptr<c10::StorageImpl> at(const std::string& key, size_t bytes) {
    const std::string name = "data/" + key;
    const auto record = archive_.find(name);
    if (!record) {
      throw NotPlain();
    }
    if (const size_t there = record->data.end - record->data.begin; bytes > there) {
      throw py::value_error("record " + name + " has " + std::to_string(there) + " bytes, and " +
                            std::to_string(bytes) + " are asked of it");
    }
    taken_.push_back({record->header, record->data.end});
    return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                 file_->memory_at(record->data.begin), /*allocator=*/nullptr,
                                                 /*resizable=*/false);
  }

  bool are_disjoint() {
    std::sort(taken_.begin(), taken_.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < taken_.size(); ++i) {
      if (taken_[i].begin < taken_[i - 1].end) {
        return false;
      }
    }
    return true;
  }

 private:
  const c10::intrusive_ptr<MappedFile> file_;
  Archive& archive_;
  std::vector<Extent> taken_;
};

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char character) { return (character & 0x80) == 0; });
}

bool is_number(std::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

// Whether what torch would read of an archive besides is in order, or absent as in old files.
bool has_ordinary_head(Archive& archive) {
  for (const char* name : {".format_version", ".storage_alignment"}) {
    if (archive.has(name) && !is_number(archive.read(name).value_or(""))) {
      return false;
    }
  }
  return is_ascii(archive.read(".data/serialization_id").value_or(""));
}

// The pickle of an archive that is an ordinary one: of this byte order, no TorchScript.
std::optional<std::string> pickle_of(Archive& archive) {
  if (std::endian::native != std::endian::little || archive.read("byteorder") != "little" ||
      archive.has("constants.pkl") || !archive.names_are_ordinary() || !has_ordinary_head(archive)) {
    return std::nullopt;
  }
  return archive.read("data.pkl");
}

}  // namespace

// path: as os.fsencode gives it.
// -> (content,) with tensors in a mapping of the file, or None where the file is torch's to read or to refuse (Note
// [Plain pickles]). Raises ValueError where a tensor is larger than its record.
py::object read_torch_file(const std::string& path) {
  try {
    c10::intrusive_ptr<MappedFile> file;
    std::unique_ptr<Archive> archive;
    std::optional<std::string> pickle;
    {
      const py::gil_scoped_release without_gil;
      file = MappedFile::open(path);
      if (file) {
        archive = std::make_unique<Archive>(file);
        pickle = pickle_of(*archive);
      }
    }
    if (!pickle) {
      return py::none();
    }
    MappedStorages storages(file, *archive);
    py::object content =
        decode_plain(*pickle, [&](const std::string& key, size_t bytes) { return storages.at(key, bytes); });
    return storages.are_disjoint() ? py::object(py::make_tuple(std::move(content))) : py::none();
  } catch (const c10::Error&) {
    return py::none();
  } catch (const NotPlain&) {
    return py::none();
  }
}

}  // namespace fastopt
