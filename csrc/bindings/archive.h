// The records of a file that torch.save wrote, which is a zip archive.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "mapped_file.h"

namespace caffe2::serialize {
class PyTorchStreamReader;
}

namespace fastopt {

// Bytes of the file.
struct Extent {
  size_t begin;
  size_t end;
};

struct Record {
  Extent data;
  size_t header;  // where the record begins, before its data
};

// What torch's own reader says of a mapped file, and whether that can be believed.
class Archive {
 public:
  // Throws c10::Error where that reader refuses the file.
  explicit Archive(c10::intrusive_ptr<MappedFile> file);
  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  // Nothing where there is no such record, or one whose bytes do not stand in the file as they are, or not all.
  std::optional<Record> find(const std::string& name);

  // A copy of a record's bytes: the file may change.
  std::optional<std::string> read(const std::string& name);

  bool has(const std::string& name);

  // Whether all names are ASCII, and each stands for one record: names that differ in case are one to torch's reader.
  bool names_are_ordinary();

 private:
  class Source;

  const c10::intrusive_ptr<MappedFile> file_;
  const std::shared_ptr<Source> source_;
  const std::unique_ptr<caffe2::serialize::PyTorchStreamReader> reader_;
};

}  // namespace fastopt
