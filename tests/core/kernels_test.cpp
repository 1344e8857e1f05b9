// Kernels, held to rounding by arithmetic rather than by bits.
#include "kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "core_test.h"
#include "cpu_target.h"
#include "dtype.h"

namespace core_test {
namespace {

using fastopt::DType;
using fastopt::kDTypes;
using fastopt::Kernels;
using fastopt::size_of;
using fastopt::Store;

constexpr std::array<const char*, kDTypes> kNames{"float32", "bfloat16", "float16", "float64", "byte"};

const char* name_of(DType dtype) {
  return kNames[static_cast<size_t>(dtype)];
}

struct Format {
  int fraction_bits;
  int smallest_exponent;  // of a normal number, as in 2^e
  double largest;
};

constexpr Format kFloat16Format{10, -14, 65504.0};
const Format kBFloat16Format{7, -126, std::ldexp(255.0, 120)};

// The nearest number of the format, ties to even; infinity where that is beyond the largest.
double rounded(double value, const Format& format) {
  if (value == 0 || !std::isfinite(value)) {
    return value;
  }
  const int exponent = std::max(std::ilogb(value), format.smallest_exponent);
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double nearest = std::nearbyint(value / unit) * unit;
  return std::abs(nearest) > format.largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : nearest;
}

double float16_value(uint64_t bits) {
  const auto fraction = static_cast<double>(bits & 0x3ff);
  const auto exponent = static_cast<int>(bits >> 10 & 0x1f);
  double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  if (exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return bits >> 15 ? -magnitude : magnitude;
}

double value_of(const char* at, DType dtype) {
  const uint64_t bits = load_bits(at, size_of(dtype));
  switch (dtype) {
    case DType::Float32:
      return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    case DType::BFloat16:
      return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
    case DType::Float16:
      return float16_value(bits);
    case DType::Float64:
      return std::bit_cast<double>(bits);
    case DType::Byte:
      break;
  }
  throw std::logic_error("a byte has no value");
}

// Note [Rounding] of csrc/core: through float32.
double expected_value(double value, DType dtype) {
  const auto single = static_cast<double>(static_cast<float>(value));
  switch (dtype) {
    case DType::BFloat16:
      return rounded(single, kBFloat16Format);
    case DType::Float16:
      return rounded(single, kFloat16Format);
    default:
      return single;
  }
}

bool same_value(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Bits around every rounding boundary: for a 16-bit dtype all there are.
std::vector<uint64_t> hard_bits(DType dtype) {
  std::vector<uint64_t> all;
  if (size_of(dtype) <= 2) {
    for (uint64_t bits = 0; bits < (1u << (8 * size_of(dtype))); ++bits) {
      all.push_back(bits);
    }
    return all;
  }
  const int fraction_bits = dtype == DType::Float32 ? 23 : 52;
  const uint64_t exponents = dtype == DType::Float32 ? 1 << 9 : 1 << 12;  // with the sign above
  const uint64_t fraction_mask = (uint64_t{1} << fraction_bits) - 1;
  for (uint64_t exponent = 0; exponent < exponents; ++exponent) {
    for (const int tie : {0, 11, fraction_bits - 14, fraction_bits - 11, fraction_bits - 8, fraction_bits - 1}) {
      for (const uint64_t above : {uint64_t{0}, uint64_t{1}, fraction_mask}) {
        for (const uint64_t by : {~uint64_t{0}, uint64_t{0}, uint64_t{1}}) {
          const uint64_t fraction = (above << (tie + 1)) + (uint64_t{1} << tie) + by;
          all.push_back(exponent << fraction_bits | (fraction & fraction_mask));
        }
      }
    }
  }
  return all;
}

// Casts `bits` by one call of the kernel between exact buffers that start at the given offsets.
void check_cast(const Kernels& kernels, DType src, DType dst, Store store, const uint64_t* bits, int64_t count,
                int64_t src_offset, int64_t dst_offset) {
  const Buffer from(count * size_of(src), src_offset);
  const Buffer to(count * size_of(dst), dst_offset);
  for (int64_t i = 0; i < count; ++i) {
    store_bits(from.data() + i * size_of(src), size_of(src), bits[i]);
  }
  kernels.find(src, dst, store)(from.data(), to.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    const char* result = to.data() + i * size_of(dst);
    if (src == DType::Byte) {
      check(load_bits(result, 1) == bits[i], kernels.target, ": byte ", i, " of ", count, " was not moved");
      continue;
    }
    const double value = value_of(from.data() + i * size_of(src), src);
    const double expected = expected_value(value, dst);
    const double actual = value_of(result, dst);
    check(same_value(actual, expected), kernels.target, ": ", name_of(src), " ", value, " became ", name_of(dst), " ",
          actual, " instead of ", expected, " (element ", i, " of ", count, ")");
  }
}

template <class Visit>
void for_each_kernel(Visit visit) {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    for (const DType src : kAllDTypes) {
      for (const DType dst : kAllDTypes) {
        for (const Store store : {Store::Cached, Store::Streaming}) {
          if (fastopt::kernels().find(src, dst, store) != nullptr) {
            visit(fastopt::kernels(), src, dst, store);
          }
        }
      }
    }
  }
}

void test_kernels_round_hard_values() {
  for_each_kernel([](const Kernels& kernels, DType src, DType dst, Store store) {
    const std::vector<uint64_t> bits = hard_bits(src);
    check_cast(kernels, src, dst, store, bits.data(), static_cast<int64_t>(bits.size()), 0, 0);
  });
}

void test_kernels_stay_within_any_size_at_any_alignment() {
  std::mt19937 random(3);
  for_each_kernel([&](const Kernels& kernels, DType src, DType dst, Store store) {
    const std::vector<uint64_t> bits = hard_bits(src);
    for (int64_t count = 0; count <= 100; ++count) {
      for (int64_t shift = 0; shift < 16; ++shift) {
        const size_t start = random() % (bits.size() - 100);
        check_cast(kernels, src, dst, store, bits.data() + start, count, shift, shift * 5 % 64);
      }
    }
  });
}

void test_an_empty_tensor_may_have_no_memory() {
  for_each_kernel([](const Kernels& kernels, DType src, DType dst, Store store) {
    kernels.find(src, dst, store)(nullptr, nullptr, 0);
  });
}

void test_kernels_exist_where_the_table_says() {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    for (const DType src : kAllDTypes) {
      for (const DType dst : kAllDTypes) {
        const bool moved = src == DType::Byte && dst == DType::Byte;
        const bool cast = src != dst && src != DType::Byte && dst != DType::Byte;
        for (const Store store : {Store::Cached, Store::Streaming}) {
          check((fastopt::kernels().find(src, dst, store) != nullptr) == (moved || cast), target, ": ", name_of(src),
                " to ", name_of(dst));
        }
      }
    }
  }
}

}  // namespace

std::span<const Test> kernels_tests() {
  static constexpr std::array kTests{
      TEST(test_kernels_round_hard_values),
      TEST(test_kernels_stay_within_any_size_at_any_alignment),
      TEST(test_an_empty_tensor_may_have_no_memory),
      TEST(test_kernels_exist_where_the_table_says),
  };
  return kTests;
}

}  // namespace core_test
