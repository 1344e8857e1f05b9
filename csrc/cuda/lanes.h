// Casting a chunk by the lanes of a warp. Lanes share nothing, so the tests can play them one after the other.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../core/scalar.h"
#include "launches.h"

namespace fastopt::cuda {

inline constexpr int kLanes = 32;
inline constexpr int64_t kAccess = 16;  // bytes: the most that a lane reads or writes at once, at a multiple of it
inline constexpr int kDepth = 4;        // packs that a lane has under way

template <class T, int64_t kCount>
struct alignas(kAccess) Pack {
  T at[kCount];
};

FASTOPT_ON_DEVICE int64_t past_access(const void* address) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % kAccess);
}

// Rounds as the CPU's kernels do: Note [Rounding] in core/scalar.h.
template <class Src, class Dst>
FASTOPT_ON_DEVICE void cast_element(const Src& in, Dst& out) {
  if constexpr (std::is_same_v<Src, Dst>) {
    out = in;
  } else {
    from_float(to_float(in), out);
  }
}

template <class Src, class Dst>
FASTOPT_ON_DEVICE void cast_singly(const Src* src, Dst* dst, int64_t count, int lane) {
  for (int64_t i = lane; i < count; i += kLanes) {
    cast_element(src[i], dst[i]);
  }
}

// How many elements to go until both sides stand at a multiple of kAccess; without end where they never do together.
template <class Src, class Dst>
FASTOPT_ON_DEVICE int64_t elements_to_access(const Src* src, const Dst* dst) {
  constexpr int64_t kPeriod = kAccess / static_cast<int64_t>(std::min(sizeof(Src), sizeof(Dst)));
  for (int64_t i = 0; i < kPeriod; ++i) {
    if (past_access(src + i) == 0 && past_access(dst + i) == 0) {
      return i;
    }
  }
  return std::numeric_limits<int64_t>::max();
}

template <class Src, class Dst, int64_t kCount>
FASTOPT_ON_DEVICE Pack<Dst, kCount> cast_pack(const Pack<Src, kCount>& in) {
  Pack<Dst, kCount> out;
  for (int64_t i = 0; i < kCount; ++i) {
    cast_element(in.at[i], out.at[i]);
  }
  return out;
}

template <class Src, class Dst>
FASTOPT_ON_DEVICE void cast_elements(const Src* __restrict__ src, Dst* __restrict__ dst, int64_t count, int lane) {
  constexpr int64_t kPack = kAccess / static_cast<int64_t>(std::min(sizeof(Src), sizeof(Dst)));
  using In = Pack<Src, kPack>;
  using Out = Pack<Dst, kPack>;
  const int64_t to_access = elements_to_access(src, dst);
  const int64_t head = to_access < count ? to_access : count;
  cast_singly(src, dst, head, lane);

  const auto* from = reinterpret_cast<const In*>(src + head);
  auto* to = reinterpret_cast<Out*>(dst + head);
  const int64_t packs = (count - head) / kPack;
  int64_t i = lane;
  for (; i + (kDepth - 1) * kLanes < packs; i += kDepth * kLanes) {
    In in[kDepth];
    for (int j = 0; j < kDepth; ++j) {
      in[j] = from[i + j * kLanes];
    }
    for (int j = 0; j < kDepth; ++j) {
      to[i + j * kLanes] = cast_pack<Src, Dst, kPack>(in[j]);
    }
  }
  for (; i < packs; i += kLanes) {
    to[i] = cast_pack<Src, Dst, kPack>(from[i]);
  }

  const int64_t done = head + packs * kPack;
  cast_singly(src + done, dst + done, count - done, lane);
}

template <class Unit>
FASTOPT_ON_DEVICE void move_units(const Chunk& chunk, int lane) {
  constexpr int64_t kUnit = sizeof(Unit);
  const int64_t units = chunk.count / kUnit;
  cast_singly(reinterpret_cast<const Unit*>(chunk.src), reinterpret_cast<Unit*>(chunk.dst), units, lane);
  cast_singly(chunk.src + units * kUnit, chunk.dst + units * kUnit, chunk.count % kUnit, lane);
}

// Bytes: where the two sides never stand at a multiple of kAccess together, by the widest unit that both are aligned
// to.
FASTOPT_ON_DEVICE void move_bytes(const Chunk& chunk, int lane) {
  const int64_t past = past_access(chunk.src) | past_access(chunk.dst);
  if (past_access(chunk.src) == past_access(chunk.dst)) {
    cast_elements(chunk.src, chunk.dst, chunk.count, lane);
  } else if (past % 8 == 0) {
    move_units<uint64_t>(chunk, lane);
  } else if (past % 4 == 0) {
    move_units<uint32_t>(chunk, lane);
  } else if (past % 2 == 0) {
    move_units<uint16_t>(chunk, lane);
  } else {
    move_units<char>(chunk, lane);
  }
}

// A lane's part of a chunk, whose sides are aligned to their elements. A chunk of bytes is one from char to char.
template <class Src, class Dst>
FASTOPT_ON_DEVICE void cast_chunk(const Chunk& chunk, int lane) {
  if constexpr (std::is_same_v<Src, char> && std::is_same_v<Dst, char>) {
    move_bytes(chunk, lane);
  } else {
    cast_elements(reinterpret_cast<const Src*>(chunk.src), reinterpret_cast<Dst*>(chunk.dst), chunk.count, lane);
  }
}

}  // namespace fastopt::cuda
