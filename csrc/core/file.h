// Reading files with many threads at once.
#pragma once

#include <cstddef>
#include <cstdint>
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

}  // namespace fastopt
