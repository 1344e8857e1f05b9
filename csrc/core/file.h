// Reading files with many threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

namespace fastopt {

// A read that failed: `code` is errno, or 0 where the file has ended before the bytes that were asked for.
class ReadError : public std::runtime_error {
 public:
  ReadError(int code, int64_t offset, int64_t bytes);

  const int code;
  const int64_t offset;  // in the file, of the first byte that was not read
  const int64_t bytes;   // that were asked for from there on
};

// Reads exactly so many bytes from an offset on; needs no position in the file, so threads may share the descriptor.
// Throws ReadError.
void read_at(int descriptor, int64_t offset, void* to, int64_t bytes);

// The part of a file around what was last asked for: many small reads, one after the other, become few large ones.
class ReadWindow {
 public:
  // Reads so many bytes at a time: fewer where what is asked for lies far apart.
  explicit ReadWindow(int64_t bytes = kBytes) : bytes_(bytes) {}

  // What the file holds from an offset on, until the next call; `bytes` is at most longest(). What is aligned in the
  // file, to 16 bytes at most, is so here. Throws ReadError.
  const char* at(int descriptor, int64_t offset, int64_t bytes);

  static constexpr int64_t kBytes = 256 << 10;
  static constexpr int64_t kAlignment = 64;

  int64_t longest() const { return bytes_ - kAlignment; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> buffer_;
  int descriptor_ = -1;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

}  // namespace fastopt
