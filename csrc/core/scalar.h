// One element from one floating dtype to another, in portable C++.
//
// Note [Rounding]
// Results are bit-equal to torch's `.to()` for every input that is not NaN; a NaN stays a NaN. Torch rounds to nearest,
// ties to even, and takes float64 to a 16-bit dtype through float32 (two roundings), so every pair here goes through
// float32 as well. That makes a cast the composition of `to_float` and `from_float`, and a vector kernel the same with
// wider registers.
#pragma once

#include <bit>
#include <cstdint>

#include "dtype.h"

namespace fastopt {

static constexpr float to_float(float value) {
  return value;
}

static constexpr float to_float(double value) {
  return static_cast<float>(value);
}

static constexpr float to_float(bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

static constexpr float to_float(float16 value) {
  constexpr uint32_t exponent_mask = 0x7c00u << 13;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & exponent_mask;
  const uint32_t rebiased = magnitude + (112u << 23);
  // Subnormal: the bits are a fraction of 2^-14; adding the hidden one and subtracting it as a float normalises them.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(rebiased + (1u << 23)) - std::bit_cast<float>(113u << 23));
  const uint32_t finite = exponent == 0 ? subnormal : rebiased;
  const uint32_t result = exponent == exponent_mask ? rebiased + (112u << 23) : finite;
  return std::bit_cast<float>(result | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

static constexpr void from_float(float value, float& out) {
  out = value;
}

static constexpr void from_float(float value, double& out) {
  out = static_cast<double>(value);
}

static constexpr void from_float(float value, bfloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

static constexpr void from_float(float value, float16& out) {
  constexpr uint32_t subnormal_magic = 126u << 23;  // 0.5f: adding it leaves the rounded subnormal in the low bits
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + std::bit_cast<float>(subnormal_magic)) -
      subnormal_magic;
  const uint32_t odd = (magnitude >> 13) & 1u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t result = magnitude >= (143u << 23) ? special : finite;
  out.bits = static_cast<uint16_t>(result | sign >> 16);
}

}  // namespace fastopt
