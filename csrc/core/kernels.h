// The cast kernels of one instruction set, as a table of function pointers.
#pragma once

#include <array>
#include <cstdint>

#include "audit.h"
#include "dtype.h"

namespace fastopt {

// Casts `count` elements from `src` to `dst`. The two do not overlap; neither needs any alignment; `count` may be zero.
using CastFn = void (*)(const void* src, void* dst, int64_t count);

// How a kernel writes: through the cache, or past it, for output that would not stay there until somebody reads it.
enum class Store : uint8_t { Cached, Streaming };

struct Kernels {
  using Table = std::array<std::array<CastFn, kDTypes>, kDTypes>;
  using AuditedTable = std::array<std::array<AuditedCastFn, kDTypes>, kDTypes>;

  const char* target;
  // [store][src][dst]; null where no kernel exists (Byte goes only to Byte).
  std::array<Table, 2> tables;
  std::array<AuditedTable, 2> audited;  // as `tables`

  CastFn find(DType src, DType dst, Store store = Store::Cached) const {
    return tables[static_cast<size_t>(store)][static_cast<size_t>(src)][static_cast<size_t>(dst)];
  }

  // The same cast with an audit; null where `find` is, and for Byte.
  AuditedCastFn find_audited(DType src, DType dst, Store store = Store::Cached) const {
    return audited[static_cast<size_t>(store)][static_cast<size_t>(src)][static_cast<size_t>(dst)];
  }
};

// One a file, so that each is compiled for its own instruction set and nothing else is.
extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace fastopt
