#include "crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

uint32_t by_tables(uint32_t state, const unsigned char* bytes, size_t size) {
  for (; size >= kStep; size -= kStep, bytes += kStep) {
    std::array<unsigned char, kStep> next;
    std::memcpy(next.data(), bytes, kStep);
    for (size_t i = 0; i < 4; ++i) {
      next[i] = static_cast<unsigned char>(next[i] ^ (state >> (8 * i)));
    }
    state = 0;
    for (size_t i = 0; i < kStep; ++i) {
      state ^= kTables[kStep - 1 - i][next[i]];
    }
  }
  for (; size > 0; --size, ++bytes) {
    state = (state >> 8) ^ kTables[0][(state ^ *bytes) & 0xFF];
  }
  return state;
}

#if defined(__x86_64__)

// Note [Folding]
// Carry-less multiplication folds the data onto itself: 64 bytes become what they are congruent to, modulo the
// polynomial, 64 bytes further on. The last 16 bytes that this leaves have the remainder of the whole, and go through
// the tables. Method and constants, powers of x modulo the polynomial in reflected order, are those of Gopal et al.,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009).
constexpr size_t kLane = 16;
constexpr size_t kFolded = 4 * kLane;

__attribute__((target("pclmul,sse4.1"))) __m128i folded(__m128i lane, __m128i powers, __m128i onto) {
  const __m128i low = _mm_clmulepi64_si128(lane, powers, 0x00);
  const __m128i high = _mm_clmulepi64_si128(lane, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

__m128i lane_at(const unsigned char* bytes) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

// At least `kFolded` bytes, a multiple of `kLane`.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_folding(uint32_t state, const unsigned char* bytes, size_t size) {
  const __m128i by_four = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);  // x^(512 - 32), x^(512 + 32)
  const __m128i by_one = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);   // x^(128 - 32), x^(128 + 32)
  __m128i lanes[4];  // no std::array: it would drop the attributes of the type
  for (size_t i = 0; i < 4; ++i) {
    lanes[i] = lane_at(bytes + i * kLane);
  }
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  for (bytes += kFolded, size -= kFolded; size >= kFolded; bytes += kFolded, size -= kFolded) {
    for (size_t i = 0; i < 4; ++i) {
      lanes[i] = folded(lanes[i], by_four, lane_at(bytes + i * kLane));
    }
  }
  __m128i lane = lanes[0];
  for (size_t i = 1; i < 4; ++i) {
    lane = folded(lane, by_one, lanes[i]);
  }
  for (; size >= kLane; bytes += kLane, size -= kLane) {
    lane = folded(lane, by_one, lane_at(bytes));
  }
  std::array<unsigned char, kLane> rest;
  std::memcpy(rest.data(), &lane, kLane);
  return by_tables(0, rest.data(), kLane);
}

bool can_fold() {
  static const bool can = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return can;
}

#endif

}  // namespace

uint32_t crc32(uint32_t crc, const void* data, size_t size) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint32_t state = ~crc;
#if defined(__x86_64__)
  if (size >= kFolded && can_fold()) {
    const size_t folded = size / kLane * kLane;
    state = by_folding(state, bytes, folded);
    bytes += folded;
    size -= folded;
  }
#endif
  return ~by_tables(state, bytes, size);
}

}  // namespace fastopt
