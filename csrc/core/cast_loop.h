// The loop that every cast kernel is, for vectors of any width.
//
// `Vector` offers `kWidth`, `load(const T*)` to `kWidth` float32 lanes, and `store(T*, lanes)` for each floating dtype
// T. Included by one file per instruction set, after that file has set its target: everything here has internal
// linkage, or the linker might keep the copy that the machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "scalar.h"

namespace fastopt {
namespace {

template <class Src, class Dst>
void cast_scalar(const char* src, char* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Src in;
    Dst out;
    std::memcpy(&in, src + i * static_cast<int64_t>(sizeof(Src)), sizeof(Src));
    from_float(to_float(in), out);
    std::memcpy(dst + i * static_cast<int64_t>(sizeof(Dst)), &out, sizeof(Dst));
  }
}

template <class Vector, class Src, class Dst>
void cast(const void* src, void* dst, int64_t count) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t i = 0;
  for (; i + Vector::kWidth <= count; i += Vector::kWidth) {
    const auto lanes = Vector::template load<Src>(from + i * static_cast<int64_t>(sizeof(Src)));
    Vector::template store<Dst>(to + i * static_cast<int64_t>(sizeof(Dst)), lanes);
  }
  cast_scalar<Src, Dst>(from + i * static_cast<int64_t>(sizeof(Src)), to + i * static_cast<int64_t>(sizeof(Dst)),
                        count - i);
}

void move_bytes(const void* src, void* dst, int64_t count) {
  if (count > 0) {  // memcpy takes no null pointer, and an empty tensor may have one
    std::memcpy(dst, src, static_cast<size_t>(count));
  }
}

template <class Vector, class Src>
constexpr std::array<CastFn, kDTypes> casts_from() {
  return {cast<Vector, Src, float>, cast<Vector, Src, bfloat16>, cast<Vector, Src, float16>, cast<Vector, Src, double>,
          nullptr};
}

// The order is that of DType. The diagonal is empty: equal dtypes are moved as Byte.
template <class Vector>
constexpr Kernels make_kernels(const char* target) {
  Kernels kernels{target,
                  {casts_from<Vector, float>(),
                   casts_from<Vector, bfloat16>(),
                   casts_from<Vector, float16>(),
                   casts_from<Vector, double>(),
                   {nullptr, nullptr, nullptr, nullptr, move_bytes}}};
  for (size_t same = 0; same + 1 < kDTypes; ++same) {
    kernels.table[same][same] = nullptr;
  }
  return kernels;
}

}  // namespace
}  // namespace fastopt
