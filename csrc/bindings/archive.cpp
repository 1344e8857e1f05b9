#include "archive.h"

#include <c10/util/Exception.h>
#include <c10/util/flat_hash_map.h>
#include <caffe2/serialize/inline_container.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

namespace fastopt {
namespace {

// A local header begins so: signature, version, flags, method, each little-endian.
constexpr std::string_view kSignature("PK\3\4", 4);
constexpr size_t kFlags = 6;
constexpr size_t kMethod = 8;
constexpr size_t kHeader = 30;

// Whether the data behind a local header is neither encrypted nor compressed.
bool is_stored(std::string_view header) {
  return header.starts_with(kSignature) && (header[kFlags] & 1) == 0 && header[kMethod] == 0 &&
         header[kMethod + 1] == 0;
}

}  // namespace

// Hands the mapped bytes to torch's reader, and notes where it read last: it does not tell whether a record is
// compressed, but reads that record's local header when asked for its place.
class Archive::Source final : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit Source(std::string_view contents) : contents_(contents) {}

  size_t size() const override { return contents_.size(); }

  size_t read(uint64_t position, void* buffer, size_t bytes, const char* what) const override {
    TORCH_CHECK(position <= size() && bytes <= size() - position, what, ": beyond the end of the file");
    std::memcpy(buffer, contents_.data() + position, bytes);
    last_ = position;
    return bytes;
  }

  size_t last() const { return last_; }

 private:
  const std::string_view contents_;
  mutable size_t last_ = 0;
};

Archive::Archive(c10::intrusive_ptr<MappedFile> file)
    : file_(std::move(file)),
      source_(std::make_shared<Source>(file_->contents())),
      reader_(std::make_unique<caffe2::serialize::PyTorchStreamReader>(source_)) {}

Archive::~Archive() = default;

std::optional<Record> Archive::find(const std::string& name) {
  try {
    const size_t offset = reader_->getRecordOffset(name);
    const size_t header = source_->last();
    const size_t bytes = reader_->getRecordSize(name);
    const std::string_view contents = file_->contents();
    if (offset > contents.size() || bytes > contents.size() - offset || header + kHeader > offset ||
        !is_stored(contents.substr(header, kHeader))) {
      return std::nullopt;
    }
    return Record{{offset, offset + bytes}, header};
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

std::optional<std::string> Archive::read(const std::string& name) {
  const auto record = find(name);
  if (!record) {
    return std::nullopt;
  }
  return std::string(file_->contents().substr(record->data.begin, record->data.end - record->data.begin));
}

bool Archive::has(const std::string& name) {
  return reader_->hasRecord(name);
}

bool Archive::names_are_distinct() {
  ska::flat_hash_set<size_t> seen;  // of hashes: should two names share one, that is no harm
  for (std::string name : reader_->getAllRecords()) {
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    if (!seen.insert(std::hash<std::string>()(name)).second) {
      return false;
    }
  }
  return true;
}

}  // namespace fastopt
