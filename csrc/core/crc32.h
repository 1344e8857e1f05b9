// CRC-32 as zip files have it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

// The checksum of what came before, with `crc` as its checksum (0 for nothing), and `size` bytes more.
uint32_t crc32(uint32_t crc, const void* data, size_t size);

}  // namespace fastopt
