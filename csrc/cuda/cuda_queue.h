// A queue on a device of CUDA's.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "queue.h"

namespace fastopt::cuda {

class CudaQueue final : public Queue {
 public:
  // `callers`: the stream that the work stands in for others. `side`: streams of the same device, which only order and
  // drain what the queue itself puts there. `allocate`: memory of the device that lives as long as the queue, and can
  // be used as soon as the caller's stream gets there. The device is the current one of the thread that calls the
  // queue.
  CudaQueue(cudaStream_t callers, std::array<cudaStream_t, kStreams> side,
            std::function<void*(int64_t bytes)> allocate);

  Pinned allocate_pinned(int64_t bytes) override;
  bool is_pinned(const void* address, int64_t bytes) override;
  char* staging(int stream, int64_t bytes) override;
  void fork() override;
  void join() override;
  void copy(int stream, void* dst, const void* src, int64_t bytes, Direction direction) override;
  void cast(int stream, std::span<const Job> jobs) override;
  std::unique_ptr<Fence> record(int stream) override;
  void drain() noexcept override;

 private:
  cudaStream_t at(int stream) const { return side_[static_cast<size_t>(stream)]; }

  const cudaStream_t callers_;
  const std::array<cudaStream_t, kStreams> side_;
  const std::function<void*(int64_t bytes)> allocate_;
  std::array<char*, kStreams> staging_{};
};

}  // namespace fastopt::cuda
