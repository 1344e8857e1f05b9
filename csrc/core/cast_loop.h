// The loop that every kernel is, for vectors of any width.
//
// `Vector` offers `kWidth`, `load<T>(from)` to `kWidth` float32 lanes, and `store<T, how>(to, lanes)` for each floating
// dtype T; `stream_line(from, to)` for the bytes of a cache line; and `fence()`, after which other threads see what was
// streamed. To stream, `to` is aligned to the line, and further on to the bytes of a vector. Included by
// one file per instruction set, after that file has set its target: everything here has internal linkage, or the linker
// might keep the copy that the machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "audit_loop.h"
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

constexpr size_t kLine = 64;

inline size_t bytes_to_line(const void* address) {
  return (kLine - reinterpret_cast<uintptr_t>(address) % kLine) % kLine;
}

// Note [Fetching ahead]
// A thread that streams waits for what it reads alone, and a cast has less in flight than a plain move. Measured with
// two threads on 128 tensors of 1 Mi elements, in GB/s read and written, without fetching and with it, medians of three
// runs: float32 to bfloat16 28 and 40, to float16 30 and 38; bfloat16 to float32 33 and 34, float64 to float32 32 and
// 30. Moved bytes lost by it (38 and 35), so they are not fetched.
constexpr int64_t kAhead = 2 << 10;  // bytes

// The lines that hold `kBytes` from an address. May be past the end: fetching faults at no address.
template <int64_t kBytes>
void fetch(const char* from) {
  constexpr int kRead = 0;
  constexpr int kNeededOnce = 0;
  for (int64_t i = 0; i < kBytes; i += static_cast<int64_t>(kLine)) {
    __builtin_prefetch(from + i, kRead, kNeededOnce);
  }
}

template <class Vector, class Src, class Dst, Store kStore>
void cast(const void* src, void* dst, int64_t count) {
  constexpr int64_t kSrc = sizeof(Src);
  constexpr int64_t kDst = sizeof(Dst);
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t i = 0;
  if constexpr (kStore == Store::Streaming) {
    const auto offset = static_cast<int64_t>(bytes_to_line(to));
    if (offset % kDst != 0) {
      return cast<Vector, Src, Dst, Store::Cached>(src, dst, count);
    }
    i = std::min(offset / kDst, count);
    cast_scalar<Src, Dst>(from, to, i);
  }
  for (; i + Vector::kWidth <= count; i += Vector::kWidth) {
    if constexpr (kStore == Store::Streaming) {
      fetch<Vector::kWidth * kSrc>(from + i * kSrc + kAhead);
    }
    Vector::template store<Dst, kStore>(to + i * kDst, Vector::template load<Src>(from + i * kSrc));
  }
  if constexpr (kStore == Store::Streaming) {
    Vector::fence();
  }
  cast_scalar<Src, Dst>(from + i * kSrc, to + i * kDst, count - i);
}

template <class Vector>
void move_cached(const void* src, void* dst, int64_t count) {
  if (count > 0) {  // memcpy takes no null pointer, and an empty tensor may have one
    std::memcpy(dst, src, static_cast<size_t>(count));
  }
}

template <class Vector>
void move_streaming(const void* src, void* dst, int64_t count) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  const int64_t head = std::min(static_cast<int64_t>(bytes_to_line(to)), count);
  move_cached<Vector>(from, to, head);
  int64_t i = head;
  for (; i + static_cast<int64_t>(kLine) <= count; i += kLine) {
    Vector::stream_line(from + i, to + i);
  }
  Vector::fence();
  move_cached<Vector>(from + i, to + i, count - i);
}

template <class Vector, class Src, Store kStore>
constexpr std::array<CastFn, kDTypes> casts_from() {
  return {cast<Vector, Src, float, kStore>, cast<Vector, Src, bfloat16, kStore>, cast<Vector, Src, float16, kStore>,
          cast<Vector, Src, double, kStore>, nullptr};
}

// The order is that of DType. The diagonal is empty: equal dtypes are moved as Byte.
template <class Vector, Store kStore>
constexpr Kernels::Table make_table(CastFn move) {
  Kernels::Table table{casts_from<Vector, float, kStore>(),
                       casts_from<Vector, bfloat16, kStore>(),
                       casts_from<Vector, float16, kStore>(),
                       casts_from<Vector, double, kStore>(),
                       {nullptr, nullptr, nullptr, nullptr, move}};
  for (size_t same = 0; same + 1 < kDTypes; ++same) {
    table[same][same] = nullptr;
  }
  return table;
}

constexpr Kernels::AuditTable make_audit_table() {
  Kernels::AuditTable table{
      audits_from<float>(), audits_from<bfloat16>(), audits_from<float16>(), audits_from<double>(), {}};
  for (size_t same = 0; same + 1 < kDTypes; ++same) {
    table[same][same] = nullptr;
  }
  return table;
}

template <class Vector>
constexpr Kernels make_kernels(const char* target) {
  return {target,
          {make_table<Vector, Store::Cached>(move_cached<Vector>),
           make_table<Vector, Store::Streaming>(move_streaming<Vector>)},
          make_audit_table()};
}

}  // namespace
}  // namespace fastopt
