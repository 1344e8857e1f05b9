#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

namespace fastopt {
namespace {

void release_file(void* file) {
  c10::raw::intrusive_ptr::decref(static_cast<MappedFile*>(file));
}

}  // namespace

c10::intrusive_ptr<MappedFile> MappedFile::open(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return {};
  }
  // Opened without waiting: a pipe that nobody writes to is no file to map either.
  return owned(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK), path);
}

c10::intrusive_ptr<MappedFile> MappedFile::of(int descriptor, std::string path) {
  return owned(fcntl(descriptor, F_DUPFD_CLOEXEC, 0), std::move(path));
}

c10::intrusive_ptr<MappedFile> MappedFile::owned(int descriptor, std::string path) {
  if (descriptor < 0) {
    return {};
  }
  struct stat about{};
  if (fstat(descriptor, &about) == 0 && S_ISREG(about.st_mode) && about.st_size > 0) {
    const auto bytes = static_cast<size_t>(about.st_size);
    // Pages are read and hardly ever written: memory for all of them need not be there (a file may be larger).
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor, 0);
    if (address != MAP_FAILED) {
      return c10::make_intrusive<MappedFile>(descriptor, std::move(path), address, bytes);
    }
  }
  close(descriptor);
  return {};
}

MappedFile::~MappedFile() {
  munmap(address_, bytes_);
  close(descriptor_);
}

c10::DataPtr MappedFile::memory_at(size_t offset) {
  c10::raw::intrusive_ptr::incref(this);
  return {address_ + offset, this, &release_file, c10::Device(c10::DeviceType::CPU)};
}

std::optional<FileRange> file_range_of(const c10::StorageImpl& storage) {
  const c10::DataPtr& memory = storage.data_ptr();
  if (memory.get_deleter() != &release_file) {
    return std::nullopt;
  }
  const auto& file = *static_cast<const MappedFile*>(memory.get_context());
  return FileRange{file, static_cast<size_t>(static_cast<const char*>(memory.get()) - file.contents().data()),
                   storage.nbytes()};
}

}  // namespace fastopt
