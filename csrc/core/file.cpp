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

// Reads as many bytes as come at once, and no fewer than `least`; returns how many.
#if defined(__unix__) || defined(__APPLE__)

int64_t read_some(int descriptor, int64_t offset, void* to, int64_t least, int64_t most) {
  int64_t done = 0;
  while (done < least) {
    char* next = static_cast<char*>(to) + done;
    const ssize_t got = pread(descriptor, next, static_cast<size_t>(most - done), static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      throw ReadError(got < 0 ? errno : 0, offset + done, least - done);
    }
    done += got;
  }
  return done;
}

#else

int64_t read_some(int, int64_t offset, void*, int64_t least, int64_t) {
  throw ReadError(ENOSYS, offset, least);
}

#endif

}  // namespace

ReadError::ReadError(int code, int64_t offset, int64_t bytes)
    : std::runtime_error(describe(code, offset, bytes)), code(code), offset(offset), bytes(bytes) {}

void read_at(int descriptor, int64_t offset, void* to, int64_t bytes) {
  read_some(descriptor, offset, to, bytes, bytes);
}

const char* ReadWindow::at(int descriptor, int64_t offset, int64_t bytes) {
  if (descriptor != descriptor_ || offset < begin_ || offset + bytes > end_) {
    if (buffer_ == nullptr) {
      buffer_ = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(bytes_));
    }
    descriptor_ = -1;  // until it has been read
    begin_ = offset / kAlignment * kAlignment;
    end_ = begin_ + read_some(descriptor, begin_, buffer_.get(), offset + bytes - begin_, bytes_);
    descriptor_ = descriptor;
  }
  return buffer_.get() + (offset - begin_);
}

}  // namespace fastopt
