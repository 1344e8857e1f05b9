// The audit of a cast, in loops that a compiler vectorises for the target of the file that includes this (as
// cast_loop.h, and for the same reason all of it has internal linkage).
//
// Note [Ordinary blocks]
// Nearly all values of nearly all states are ordinary: zero, or finite and normal in the new dtype, with a rounding
// error that is at most the largest so far. A block is first asked whether all of it is, and only if not are its values
// counted one by one. What is NaN or infinite, before or after, has an error that is NaN or larger than any limit, and
// what becomes zero has one as large as itself; so "at most" finds these as well. "Larger" would not find the NaNs, nor
// do their results: rounding may turn a NaN with all bits set, which is CUDA's own, into zero.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "audit.h"
#include "scalar.h"

namespace fastopt {
namespace {

constexpr int64_t kAuditedBlock = 256;

// The dtype in which values are compared before and after.
template <class Src>
using Wide = std::conditional_t<std::is_same_v<Src, double>, double, float>;

template <class W>
using BitsOf = std::conditional_t<std::is_same_v<W, double>, uint64_t, uint32_t>;

template <class W>
BitsOf<W> magnitude(W value) {
  return std::bit_cast<BitsOf<W>>(value) & (std::numeric_limits<BitsOf<W>>::max() >> 1);
}

template <class W>
constexpr BitsOf<W> kInfinity = std::bit_cast<BitsOf<W>>(std::numeric_limits<W>::infinity());

// The smallest normal number of a dtype.
template <class T, class W>
constexpr W kSmallestNormal = static_cast<W>(std::numeric_limits<T>::min());
template <class W>
constexpr W kSmallestNormal<bfloat16, W> = std::numeric_limits<float>::min();
template <class W>
constexpr W kSmallestNormal<float16, W> = W{0x1p-14};

template <class Src, class Dst>
constexpr bool kExact = std::is_same_v<Dst, double> || (std::is_same_v<Dst, float> && !std::is_same_v<Src, double>);

// The smallest number that rounds to infinity.
template <class T>
constexpr float kRoundsToInfinity = std::bit_cast<float>(0x7f7f8000u);  // half a last bit above the largest bfloat16
template <>
constexpr float kRoundsToInfinity<float16> = 65520.0f;

// Note [Settled]
// No value that is normal before and after has a larger relative error than the one halfway between one and the next
// number, and among some millions of random values that one is found. From then on there is nothing to compute: a block
// is ordinary if its values are zero or within the new dtype's normal range.
template <class T>
constexpr float kLargestErrorOfNormal = 0x1p-8f / (1.0f + 0x1p-8f);
template <>
constexpr float kLargestErrorOfNormal<float16> = 0x1p-11f / (1.0f + 0x1p-11f);

template <class Dst>
bool is_settled(double largest_error) {
  return largest_error >= kLargestErrorOfNormal<Dst>;
}

// Whether a value that is normal in one dtype may be subnormal in another.
template <class Src, class Dst>
constexpr bool kNarrowsRange = kSmallestNormal<Src, double> < kSmallestNormal<Dst, double>;

// The most that may be the largest error so far. With one next to 1, its product with a value could round to that
// value, and let pass one of which nothing is left.
constexpr float kTolerated = 0.5f;

template <class Src>
Wide<Src> value_at(const char* src, int64_t index) {
  Src value;
  std::memcpy(&value, src + index * static_cast<int64_t>(sizeof(Src)), sizeof(Src));
  if constexpr (std::is_same_v<Src, double>) {
    return value;
  } else {
    return to_float(value);
  }
}

// What a cast makes of a float32, as a float32: `to_float` of `from_float`, but in 32 bits all the way, which makes
// shorter vector code. A NaN may become zero, as nothing here needs to know what became of one.
inline float after_cast(float value, float) {
  return value;
}

inline float after_cast(float value, bfloat16) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

inline float after_cast(float value, float16) {
  constexpr uint32_t first_infinite = std::bit_cast<uint32_t>(65520.0f);
  constexpr uint32_t first_normal = std::bit_cast<uint32_t>(0x1p-14f);
  const uint32_t bits = magnitude(value);
  const uint32_t normal = (bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu;
  const float subnormal = (std::bit_cast<float>(bits) + 0.5f) - 0.5f;  // rounds at the last bit of a subnormal
  const uint32_t finite = bits < first_normal ? std::bit_cast<uint32_t>(subnormal) : normal;
  const uint32_t result = bits >= first_infinite ? std::max(bits, kInfinity<float>) : finite;
  return std::copysign(std::bit_cast<float>(result), value);
}

// Through float32, as the kernels (Note [Rounding]).
template <class Dst, class W>
W after_cast(W value) {
  return static_cast<W>(after_cast(to_float(value), Dst{}));
}

template <class Src, class Dst>
bool is_ordinary(const char* src, int64_t count, Wide<Src> largest_error) {
  using W = Wide<Src>;
  const W tolerated = std::min(largest_error, W{kTolerated});
  BitsOf<W> odd = 0;
  for (int64_t i = 0; i < count; ++i) {
    const W before = value_at<Src>(src, i);
    if constexpr (kExact<Src, Dst>) {
      odd |= static_cast<BitsOf<W>>(magnitude(before) >= kInfinity<W>);
    } else {
      const W error = std::abs(before - after_cast<Dst>(before));
      odd |= static_cast<BitsOf<W>>(!(error <= tolerated * std::abs(before)));
      if constexpr (kNarrowsRange<Src, Dst>) {
        constexpr auto normal = std::bit_cast<BitsOf<W>>(kSmallestNormal<Dst, W>);
        odd |= static_cast<BitsOf<W>>(magnitude(before) - 1 < normal - 1);  // less one, zero is the largest of all
      }
    }
  }
  return odd == 0;
}

// Without a branch, so that it becomes vector code: a state that is too small for its new dtype has no ordinary block.
template <class Src, class Dst>
void count_one_by_one(const char* src, int64_t count, Audit& audit) {
  using W = Wide<Src>;
  using Bits = BitsOf<W>;
  constexpr auto old_normal = std::bit_cast<Bits>(kSmallestNormal<Src, W>);
  constexpr auto new_normal = std::bit_cast<Bits>(kSmallestNormal<Dst, W>);
  Bits nan = 0;
  Bits inf = 0;
  Bits overflowed = 0;
  Bits underflowed = 0;
  Bits subnormal = 0;
  Bits largest_error = 0;  // the bits of one that is not negative are in its order
  for (int64_t i = 0; i < count; ++i) {
    const W before = value_at<Src>(src, i);
    const Bits from = magnitude(before);
    nan += static_cast<Bits>(from > kInfinity<W>);
    inf += static_cast<Bits>(from == kInfinity<W>);
    if constexpr (!kExact<Src, Dst>) {
      const W after = after_cast<Dst>(before);
      const Bits to = magnitude(after);
      const auto was_finite = static_cast<Bits>(from < kInfinity<W>);
      overflowed += was_finite & static_cast<Bits>(to == kInfinity<W>);
      underflowed += was_finite & static_cast<Bits>(to == 0) & static_cast<Bits>(from != 0);
      subnormal += was_finite & static_cast<Bits>(to != 0) & static_cast<Bits>(from >= old_normal) &
                   static_cast<Bits>(to < new_normal);
      const Bits error = magnitude((before - after) / before);
      const Bits counts = was_finite & static_cast<Bits>(to != 0) & static_cast<Bits>(to < kInfinity<W>);
      largest_error = std::max(largest_error, static_cast<Bits>(error & (Bits{0} - counts)));
    }
  }
  audit.nan += static_cast<int64_t>(nan);
  audit.inf += static_cast<int64_t>(inf);
  audit.overflowed += static_cast<int64_t>(overflowed);
  audit.underflowed += static_cast<int64_t>(underflowed);
  audit.subnormal += static_cast<int64_t>(subnormal);
  audit.largest_error = std::max(audit.largest_error, static_cast<double>(std::bit_cast<W>(largest_error)));
}

template <class Src, class Dst>
void audit_cast(const void* src, int64_t count, Audit& audit) {
  const char* from = static_cast<const char*>(src);
  audit.values += count;
  for (int64_t begin = 0; begin < count; begin += kAuditedBlock) {
    const char* block = from + begin * static_cast<int64_t>(sizeof(Src));
    const int64_t size = std::min(kAuditedBlock, count - begin);
    if (!is_ordinary<Src, Dst>(block, size, static_cast<Wide<Src>>(audit.largest_error))) {
      count_one_by_one<Src, Dst>(block, size, audit);
    }
  }
}

// Whether vectors can be looked at while they are cast: what they hold is all of a value, so not where it is a float64.
template <class Vector, class Src, class Dst>
constexpr bool kIsWatched =
    !std::is_same_v<Src, double> && requires { typename Vector::template Watch<Src, Dst, false>; };

}  // namespace
}  // namespace fastopt
