#include <array>
#include <cstdint>
#include <type_traits>

#include "../core/dtype.h"
#include "cast.h"
#include "check.h"
#include "lanes.h"
#include "launches.h"

namespace fastopt::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

template <class Src, class Dst, int kCapacity>
__global__ void __launch_bounds__(kWarps* kLanes) cast_items(const __grid_constant__ Items<kCapacity> items) {
  const int64_t position = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  if (position < items.at[items.size - 1].end) {
    cast_chunk<Src, Dst>(chunk_at<Src, Dst>(items.at, items.size, position), static_cast<int>(threadIdx.x % kLanes));
  }
}

template <class Src, class Dst, int kCapacity>
void launch_with(std::span<const Item> items, cudaStream_t stream) {
  Items<kCapacity> parameters;
  parameters.size = static_cast<int64_t>(items.size());
  std::copy(items.begin(), items.end(), parameters.at);
  // Fits: 2^31 blocks of chunks are more bytes than any device has.
  const auto blocks = static_cast<unsigned>((items.back().end + kWarps - 1) / kWarps);
  cast_items<Src, Dst, kCapacity><<<blocks, kWarps * kLanes, 0, stream>>>(parameters);
  check(cudaGetLastError());
}

template <class Src, class Dst>
void launch(std::span<const Item> items, cudaStream_t stream) {
  if (items.size() <= kFewItems) {
    launch_with<Src, Dst, kFewItems>(items, stream);
  } else {
    launch_with<Src, Dst, kManyItems>(items, stream);
  }
}

using LaunchFn = void (*)(std::span<const Item>, cudaStream_t);

// Equal dtypes come as Byte.
template <class Src, class Dst>
constexpr LaunchFn between() {
  if constexpr (std::is_same_v<Src, Dst>) {
    return nullptr;
  } else {
    return launch<Src, Dst>;
  }
}

template <class Src>
constexpr std::array<LaunchFn, kDTypes> casts_from() {
  return {between<Src, float>(), between<Src, bfloat16>(), between<Src, float16>(), between<Src, double>(), nullptr};
}

// [src][dst], in the order of DType.
constexpr std::array<std::array<LaunchFn, kDTypes>, kDTypes> kLaunches{
    casts_from<float>(),
    casts_from<bfloat16>(),
    casts_from<float16>(),
    casts_from<double>(),
    {nullptr, nullptr, nullptr, nullptr, launch<char, char>},
};

}  // namespace

void cast(std::span<const Job> jobs, cudaStream_t stream) {
  for_each_launch(jobs, [stream](DType src, DType dst, std::span<const Item> items) {
    kLaunches[static_cast<size_t>(src)][static_cast<size_t>(dst)](items, stream);
  });
}

}  // namespace fastopt::cuda
