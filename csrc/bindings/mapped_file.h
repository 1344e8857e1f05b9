// Files in memory, and storages that lie in them.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace fastopt {

// A file that was mapped as a whole when it was opened, and stays so while a storage in it is alive. What is written to
// the memory is seen by this process alone and does not reach the file. Nothing is read before it is looked at; a file
// that somebody cuts short meanwhile kills whoever looks beyond its end (SIGBUS).
class MappedFile final : public c10::intrusive_ptr_target {
 public:
  // Null where the path is no regular file with something in it that can be opened and mapped.
  static c10::intrusive_ptr<MappedFile> open(const std::string& path);

  // The same for a file that is open, and may be closed afterwards; `path` is its name for errors.
  static c10::intrusive_ptr<MappedFile> of(int descriptor, std::string path);

  MappedFile(int descriptor, std::string path, void* address, size_t bytes)
      : descriptor_(descriptor), path_(std::move(path)), address_(static_cast<char*>(address)), bytes_(bytes) {}
  ~MappedFile() override;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::string_view contents() const { return {address_, bytes_}; }

  // The memory from an offset on, for a storage of up to so many bytes as the file has from there.
  c10::DataPtr memory_at(size_t offset);

  int descriptor() const { return descriptor_; }
  const std::string& path() const { return path_; }

 private:
  // Maps a file, and closes it where that fails.
  static c10::intrusive_ptr<MappedFile> owned(int descriptor, std::string path);

  const int descriptor_;
  const std::string path_;
  char* const address_;
  const size_t bytes_;
};

// Where in its file a storage lies. Its memory may hold something else by now: only who has just read the file, and
// knows that nobody has written to what came out of it, may read the file in place of the memory.
struct FileRange {
  const MappedFile& file;  // as long as the storage lives
  size_t offset;
  size_t bytes;
};

// Nothing for a storage that lies in no mapped file.
std::optional<FileRange> file_range_of(const c10::StorageImpl& storage);

}  // namespace fastopt
