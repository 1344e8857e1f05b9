#include "crc32.h"

#include <array>
#include <cstring>

namespace fastopt {
namespace {

// Eight bytes a step: table [k] has what a byte comes to that k more bytes of zeros follow.
constexpr size_t kStep = 8;
using Tables = std::array<std::array<uint32_t, 256>, kStep>;

constexpr Tables make_tables() {
  constexpr uint32_t kPolynomial = 0xEDB88320;
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    }
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < kStep; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t crc32(uint32_t crc, const void* data, size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= kStep; size -= kStep, bytes += kStep) {
    std::array<unsigned char, kStep> next;
    std::memcpy(next.data(), bytes, kStep);
    for (size_t i = 0; i < 4; ++i) {
      next[i] = static_cast<unsigned char>(next[i] ^ (crc >> (8 * i)));
    }
    crc = 0;
    for (size_t i = 0; i < kStep; ++i) {
      crc ^= kTables[kStep - 1 - i][next[i]];
    }
  }
  for (; size > 0; --size, ++bytes) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 0xFF];
  }
  return ~crc;
}

}  // namespace fastopt
