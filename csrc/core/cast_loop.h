// The loop that every kernel is, for vectors of any width.
//
// `Vector` offers `kWidth`, `load<T>(from)` to `kWidth` float32 lanes, and `store<T, how>(to, lanes)` for each floating
// dtype T; `stream_line(from, to)` for the bytes of a cache line; and `fence()`, after which other threads see what was
// streamed. `Watch<Src, Dst>`, where it offers one, looks at lanes while they are cast (Note [Ordinary blocks]). To
// stream, `to` is aligned to the line, and further on to the bytes of a vector. Included by one file per instruction
// set, after that file has set its target: everything here has internal linkage, or the linker might keep the copy that
// the machine cannot run.
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
// A thread that streams waits for what it reads alone, and a cast has less in flight than a plain move. So it asks for
// its input some lines ahead, into the second level of cache. Measured with two threads from 4 KiB pages into warm huge
// pages, in GB/s read and written, medians of 7 on a Xeon (Sapphire Rapids): float32 to bfloat16 without fetching 27,
// into the second level 38, into the first 34, and past the caches (the hint "needed once") 20, as that keeps the
// hardware from fetching by itself; to float16 34, 40, 36 and 24; float64 to float32 -, 40, 39 and 25; bfloat16 to
// float32 -, 44, 44 and 30. 2 and 8 KiB ahead differ from 4 by less than the noise. On a Zen 3, where only the last
// hint was measured, it took float32 to bfloat16 from 28 to 40. Moved bytes gain nothing by it, so they are not
// fetched.
constexpr int64_t kAhead = 4 << 10;  // bytes

// The lines that hold `kBytes` from an address. May be past the end: fetching faults at no address.
template <int64_t kBytes>
void fetch(const char* from) {
  constexpr int kRead = 0;
  constexpr int kSecondLevel = 2;
  for (int64_t i = 0; i < kBytes; i += static_cast<int64_t>(kLine)) {
    __builtin_prefetch(from + i, kRead, kSecondLevel);
  }
}

// Casts whole vectors from one element on, and returns the element after the last.
template <class Vector, class Src, class Dst, Store kStore, class See>
int64_t cast_vectors(const char* from, char* to, int64_t first, int64_t last, See&& see) {
  constexpr int64_t kSrc = sizeof(Src);
  int64_t i = first;
  for (; i + Vector::kWidth <= last; i += Vector::kWidth) {
    if constexpr (kStore == Store::Streaming) {
      fetch<Vector::kWidth * kSrc>(from + i * kSrc + kAhead);
    }
    const auto lanes = Vector::template load<Src>(from + i * kSrc);
    Vector::template store<Dst, kStore>(to + i * static_cast<int64_t>(sizeof(Dst)), lanes);
    see(lanes);
  }
  return i;
}

// Elements before the first that a store can stream to; none can be where the offset is no multiple of the element.
template <class Dst>
constexpr int64_t kNowhere = -1;

template <class Dst>
int64_t elements_to_line(const char* to, int64_t count) {
  const auto offset = static_cast<int64_t>(bytes_to_line(to));
  constexpr auto kDst = static_cast<int64_t>(sizeof(Dst));
  return offset % kDst == 0 ? std::min(offset / kDst, count) : kNowhere<Dst>;
}

template <class Vector, class Src, class Dst, Store kStore>
void cast(const void* src, void* dst, int64_t count) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t i = 0;
  if constexpr (kStore == Store::Streaming) {
    i = elements_to_line<Dst>(to, count);
    if (i < 0) {
      return cast<Vector, Src, Dst, Store::Cached>(src, dst, count);
    }
    cast_scalar<Src, Dst>(from, to, i);
  }
  i = cast_vectors<Vector, Src, Dst, kStore>(from, to, i, count, [](const auto&) {});
  if constexpr (kStore == Store::Streaming) {
    Vector::fence();
  }
  cast_scalar<Src, Dst>(from + i * static_cast<int64_t>(sizeof(Src)), to + i * static_cast<int64_t>(sizeof(Dst)),
                        count - i);
}

// Casts a block while a watch looks at its vectors; only if that saw what is not ordinary are the values counted.
template <class Vector, class Src, class Dst, Store kStore, bool kSettled>
int64_t watched_cast(const char* from, char* to, int64_t first, int64_t last, Audit& audit) {
  typename Vector::template Watch<Src, Dst, kSettled> watch(static_cast<float>(audit.largest_error));
  const int64_t end =
      cast_vectors<Vector, Src, Dst, kStore>(from, to, first, last, [&](const auto& lanes) { watch.see(lanes); });
  audit.values += end - first;
  if (!watch.saw_only_ordinary()) {
    count_one_by_one<Src, Dst>(from + first * static_cast<int64_t>(sizeof(Src)), end - first, audit);
  }
  return end;
}

// The same cast, with an audit.
template <class Vector, class Src, class Dst, Store kStore>
void audited_cast(const void* src, void* dst, int64_t count, Audit& audit) {
  constexpr int64_t kSrc = sizeof(Src);
  constexpr int64_t kDst = sizeof(Dst);
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
  int64_t i = 0;
  if constexpr (kStore == Store::Streaming) {
    i = elements_to_line<Dst>(to, count);
    if (i < 0) {
      return audited_cast<Vector, Src, Dst, Store::Cached>(src, dst, count, audit);
    }
    audit_cast<Src, Dst>(from, i, audit);
    cast_scalar<Src, Dst>(from, to, i);
  }
  while (i + Vector::kWidth <= count) {
    const int64_t first = i;
    const int64_t last = std::min(first + kAuditedBlock, count);
    if constexpr (kIsWatched<Vector, Src, Dst>) {
      i = is_settled<Dst>(audit.largest_error)
              ? watched_cast<Vector, Src, Dst, kStore, true>(from, to, first, last, audit)
              : watched_cast<Vector, Src, Dst, kStore, false>(from, to, first, last, audit);
    } else {
      audit_cast<Src, Dst>(from + first * kSrc, last - first, audit);
      i = cast_vectors<Vector, Src, Dst, kStore>(from, to, first, last, [](const auto&) {});
      cast_scalar<Src, Dst>(from + i * kSrc, to + i * kDst, last - i);
      i = last;
    }
  }
  if constexpr (kStore == Store::Streaming) {
    Vector::fence();
  }
  audit_cast<Src, Dst>(from + i * kSrc, count - i, audit);
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
constexpr std::array<AuditedCastFn, kDTypes> audited_casts_from() {
  return {audited_cast<Vector, Src, float, kStore>, audited_cast<Vector, Src, bfloat16, kStore>,
          audited_cast<Vector, Src, float16, kStore>, audited_cast<Vector, Src, double, kStore>, nullptr};
}

template <class Vector, class Src, Store kStore>
constexpr std::array<CastFn, kDTypes> casts_from() {
  return {cast<Vector, Src, float, kStore>, cast<Vector, Src, bfloat16, kStore>, cast<Vector, Src, float16, kStore>,
          cast<Vector, Src, double, kStore>, nullptr};
}

// The order is that of DType. The diagonal is empty: equal dtypes are moved as Byte.
template <class Table>
constexpr Table without_diagonal(Table table) {
  for (size_t same = 0; same + 1 < kDTypes; ++same) {
    table[same][same] = nullptr;
  }
  return table;
}

template <class Vector, Store kStore>
constexpr Kernels::Table make_table(CastFn move) {
  return without_diagonal(Kernels::Table{casts_from<Vector, float, kStore>(),
                                         casts_from<Vector, bfloat16, kStore>(),
                                         casts_from<Vector, float16, kStore>(),
                                         casts_from<Vector, double, kStore>(),
                                         {nullptr, nullptr, nullptr, nullptr, move}});
}

template <class Vector, Store kStore>
constexpr Kernels::AuditedTable make_audited_table() {
  return without_diagonal(Kernels::AuditedTable{audited_casts_from<Vector, float, kStore>(),
                                                audited_casts_from<Vector, bfloat16, kStore>(),
                                                audited_casts_from<Vector, float16, kStore>(),
                                                audited_casts_from<Vector, double, kStore>(),
                                                {}});
}

template <class Vector>
constexpr Kernels make_kernels(const char* target) {
  return {target,
          {make_table<Vector, Store::Cached>(move_cached<Vector>),
           make_table<Vector, Store::Streaming>(move_streaming<Vector>)},
          {make_audited_table<Vector, Store::Cached>(), make_audited_table<Vector, Store::Streaming>()}};
}

}  // namespace
}  // namespace fastopt
