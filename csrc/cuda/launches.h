// How a batch of jobs becomes launches of a kernel. Knows no CUDA, so the tests run it beside a device of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>

#include "../core/dtype.h"
#include "../core/run.h"

// Of functions that run on the device, and in the tests on the host.
#if defined(__CUDACC__)
#define FASTOPT_ON_DEVICE __host__ __device__ __forceinline__
#else
#define FASTOPT_ON_DEVICE inline
#endif

namespace fastopt::cuda {

// Note [Launches]
// One launch casts up to a thousand tensors of one dtype pair, whatever their sizes are. They stand in the parameters
// of the kernel itself: nothing is uploaded, nothing has to outlive the call, and a CUDA graph that records the launch
// owns what it needs. The tensors are laid end to end in chunks, each the work of one warp, which finds its tensor by
// bisection: a million small tensors and one huge one both fill the device.
struct Item {
  const char* src;
  char* dst;
  int64_t count;  // elements
  int64_t end;    // chunks of this item and of those before it
};

// Kernel parameters may take 32,764 bytes, and a launch costs more where it has more of them.
inline constexpr int kFewItems = 64;
inline constexpr int kManyItems = 1000;

template <int kCapacity>
struct Items {
  int64_t size;
  Item at[kCapacity];
};
static_assert(sizeof(Items<kManyItems>) <= 32'764);

inline constexpr int64_t kChunkBytes = 16 << 10;  // of the wider side; divided by an element, a multiple of any access

struct Chunk {
  const char* src;
  char* dst;
  int64_t count;
};

template <class Src, class Dst>
inline constexpr int64_t kChunkElements = kChunkBytes / static_cast<int64_t>(std::max(sizeof(Src), sizeof(Dst)));

// The chunk at a position below the last item's end.
template <class Src, class Dst>
FASTOPT_ON_DEVICE Chunk chunk_at(const Item* items, int64_t size, int64_t position) {
  int64_t low = 0;
  int64_t high = size - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (position < items[middle].end) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const Item& item = items[low];
  const int64_t before = low == 0 ? 0 : items[low - 1].end;
  const int64_t first = (position - before) * kChunkElements<Src, Dst>;
  const int64_t left = item.count - first;
  return {item.src + first * static_cast<int64_t>(sizeof(Src)), item.dst + first * static_cast<int64_t>(sizeof(Dst)),
          left < kChunkElements<Src, Dst> ? left : kChunkElements<Src, Dst>};
}

// Calls `launch` with the items of one dtype pair, at most kManyItems at a time and never none; their order is not that
// of the jobs. Throws std::bad_alloc before the first call, or what `launch` throws.
using Launch = std::function<void(DType src, DType dst, std::span<const Item> items)>;
void for_each_launch(std::span<const Job> jobs, const Launch& launch);

}  // namespace fastopt::cuda
