#include "archive.h"

#include <c10/util/Exception.h>
#include <caffe2/serialize/inline_container.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "../core/file.h"

namespace fastopt {
namespace {

// A local header begins so: signature, version, flags, method, each little-endian.
constexpr std::string_view kSignature("PK\3\4", 4);
constexpr size_t kFlags = 6;
constexpr size_t kMethod = 8;
constexpr size_t kHeader = 30;

// Whether the data behind a local header is neither encrypted nor compressed.
bool is_stored(std::string_view header) {
  return (header[kFlags] & 1) == 0 && header[kMethod] == 0 && header[kMethod + 1] == 0;
}

}  // namespace

// Hands the file's bytes to torch's reader, and looks at the local headers among them, of which it reads a record's
// when asked for the record's place or bytes. It does not tell whether a record is compressed and would unpack one of
// any size; so that stops here. Read, and not looked at through the mapping: a file may be cut short meanwhile.
class Archive::Source final : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit Source(c10::intrusive_ptr<MappedFile> file) : file_(std::move(file)) {}

  size_t size() const override { return file_->contents().size(); }

  size_t read(uint64_t position, void* buffer, size_t bytes, const char* what) const override {
    TORCH_CHECK(position <= size() && bytes <= size() - position, what, ": beyond the end of the file");
    try {
      fill(static_cast<char*>(buffer), static_cast<int64_t>(position), static_cast<int64_t>(bytes));
    } catch (const ReadError& error) {
      TORCH_CHECK(false, what, ": ", error.what());
    }
    const std::string_view wanted(static_cast<const char*>(buffer), bytes);
    if (bytes == kHeader && wanted.starts_with(kSignature)) {
      TORCH_CHECK(is_stored(wanted), what, ": a record is compressed or encrypted");
      last_header_ = position;
    }
    return bytes;
  }

  // The place of the local header that was read last, once.
  std::optional<size_t> take_header() { return std::exchange(last_header_, std::nullopt); }

 private:
  // The headers of small records lie close to each other: what is behind one is read together with it.
  static constexpr int64_t kWindow = 16 << 10;

  void fill(char* buffer, int64_t position, int64_t bytes) const {
    if (bytes > window_.longest()) {
      read_at(file_->descriptor(), position, buffer, bytes);
    } else {
      std::copy_n(window_.at(file_->descriptor(), position, bytes), bytes, buffer);
    }
  }

  const c10::intrusive_ptr<MappedFile> file_;
  mutable ReadWindow window_{kWindow};
  mutable std::optional<size_t> last_header_;
};

Archive::Archive(c10::intrusive_ptr<MappedFile> file)
    : file_(std::move(file)),
      source_(std::make_shared<Source>(file_)),
      reader_(std::make_unique<caffe2::serialize::PyTorchStreamReader>(source_)) {}

Archive::~Archive() = default;

std::optional<Record> Archive::find(const std::string& name) {
  try {
    source_->take_header();
    const size_t offset = reader_->getRecordOffset(name);
    const std::optional<size_t> header = source_->take_header();
    const size_t bytes = reader_->getRecordSize(name);
    const size_t end = file_->contents().size();
    if (!header || offset > end || bytes > end - offset) {
      return std::nullopt;
    }
    return Record{{offset, offset + bytes}, *header};
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

std::optional<std::string> Archive::read(const std::string& name) {
  const auto record = find(name);
  if (!record) {
    return std::nullopt;
  }
  std::string bytes(record->data.end - record->data.begin, '\0');
  source_->read(record->data.begin, bytes.data(), bytes.size(), name.c_str());
  return bytes;
}

bool Archive::has(const std::string& name) {
  return reader_->hasRecord(name);
}

bool Archive::names_are_ordinary() {
  std::vector<size_t> hashes;  // should two names share one, that is no harm
  for (std::string name : reader_->getAllRecords()) {
    for (char& character : name) {
      if ((character & 0x80) != 0) {
        return false;
      }
      character = static_cast<char>(std::tolower(character));
    }
    hashes.push_back(std::hash<std::string>()(name));
  }
  std::sort(hashes.begin(), hashes.end());
  return std::adjacent_find(hashes.begin(), hashes.end()) == hashes.end();
}

}  // namespace fastopt
