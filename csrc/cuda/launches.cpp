#include "launches.h"

#include <array>
#include <cstddef>
#include <vector>

namespace fastopt::cuda {
namespace {

size_t pair_of(const Job& job) {
  return static_cast<size_t>(job.src_dtype) * kDTypes + static_cast<size_t>(job.dst_dtype);
}

// As kChunkElements, of dtypes that are known only now.
int64_t chunks_of(const Job& job) {
  const int64_t elements = kChunkBytes / std::max(size_of(job.src_dtype), size_of(job.dst_dtype));
  return job.count / elements + (job.count % elements != 0);
}

}  // namespace

void for_each_launch(std::span<const Job> jobs, const Launch& launch) {
  std::array<size_t, kDTypes * kDTypes> counts{};
  for (const Job& job : jobs) {
    ++counts[pair_of(job)];
  }
  std::array<std::vector<Item>, kDTypes * kDTypes> pending;
  for (size_t pair = 0; pair < pending.size(); ++pair) {
    pending[pair].reserve(std::min<size_t>(counts[pair], kManyItems));
  }
  const auto flush = [&](size_t pair) {
    launch(static_cast<DType>(pair / kDTypes), static_cast<DType>(pair % kDTypes), pending[pair]);
    pending[pair].clear();
  };
  for (const Job& job : jobs) {
    if (job.count == 0) {
      continue;
    }
    std::vector<Item>& items = pending[pair_of(job)];
    const int64_t before = items.empty() ? 0 : items.back().end;
    items.push_back(
        {static_cast<const char*>(job.src), static_cast<char*>(job.dst), job.count, before + chunks_of(job)});
    if (items.size() == kManyItems) {
      flush(pair_of(job));
    }
  }
  for (size_t pair = 0; pair < pending.size(); ++pair) {
    if (!pending[pair].empty()) {
      flush(pair);
    }
  }
}

}  // namespace fastopt::cuda
