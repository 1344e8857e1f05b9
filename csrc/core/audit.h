// What casts do to values, counted.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastopt {

struct Audit {
  int64_t values = 0;
  int64_t overflowed = 0;   // finite, and infinite in the new dtype
  int64_t underflowed = 0;  // not zero, and zero in the new dtype
  int64_t subnormal = 0;    // normal in the old dtype, subnormal in the new one
  int64_t nan = 0;          // before the cast already
  int64_t inf = 0;
  double largest_error = 0;  // relative, of what is finite before and after, and not zero after

  void add(const Audit& other) {
    values += other.values;
    overflowed += other.overflowed;
    underflowed += other.underflowed;
    subnormal += other.subnormal;
    nan += other.nan;
    inf += other.inf;
    largest_error = std::max(largest_error, other.largest_error);
  }
};

// Casts as a CastFn does, and adds what that did.
using AuditedCastFn = void (*)(const void* src, void* dst, int64_t count, Audit& audit);

}  // namespace fastopt
