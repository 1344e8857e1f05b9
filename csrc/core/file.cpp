#include "file.h"

#include <cerrno>
#include <cstring>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace fastopt {
namespace {

std::string describe(int code, int64_t offset, int64_t bytes) {
  const std::string place = std::to_string(bytes) + " bytes from byte " + std::to_string(offset) + " on";
  return code == 0 ? "the file has ended before " + place : place + " cannot be read: " + std::strerror(code);
}

}  // namespace

ReadError::ReadError(int code, int64_t offset, int64_t bytes)
    : std::runtime_error(describe(code, offset, bytes)), code(code), offset(offset), bytes(bytes) {}

#if defined(__unix__) || defined(__APPLE__)

void read_at(int descriptor, int64_t offset, void* to, int64_t bytes) {
  char* next = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = pread(descriptor, next, static_cast<size_t>(bytes), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      throw ReadError(got < 0 ? errno : 0, offset, bytes);
    }
    next += got;
    offset += got;
    bytes -= got;
  }
}

#else

void read_at(int, int64_t offset, void*, int64_t bytes) {
  throw ReadError(ENOSYS, offset, bytes);
}

#endif

}  // namespace fastopt
