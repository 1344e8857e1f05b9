#include "gpu.h"

#ifdef FASTOPT_WITH_CUDA

#include <ATen/Parallel.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../core/cpu_target.h"
#include "../cuda/cast.h"
#include "../cuda/check.h"
#include "../cuda/cuda_queue.h"
#include "../cuda/ring.h"
#include "../cuda/transfers.h"
#include "jobs.h"

namespace fastopt::gpu {
namespace {

// Never destroyed: when the process ends, CUDA may be gone already.
cuda::Ring& ring() {
  static auto& ring = *new cuda::Ring;
  return ring;
}

}  // namespace

c10::Device current() {
  return {c10::kCUDA, c10::cuda::current_device()};
}

bool is_capturing(c10::DeviceIndex device) {
  auto status = cudaStreamCaptureStatusNone;
  cuda::check(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device), &status));
  return status != cudaStreamCaptureStatusNone;
}

at::Tensor new_tensor(const at::Tensor& like, at::ScalarType dtype, c10::Device device) {
  try {
    return at::Tensor(at::detail::empty_strided_cuda(like.sizes(), like.strides(), dtype, device));
  } catch (const c10::OutOfMemoryError&) {
    return {};
  }
}

void cast(c10::DeviceIndex device, std::span<const Job> jobs) {
  const c10::cuda::CUDAGuard guard(device);
  cuda::cast(jobs, c10::cuda::getCurrentCUDAStream(device));
}

std::vector<size_t> transfer(c10::DeviceIndex device, std::span<const Job> jobs, cuda::Direction direction,
                             bool waits) {
  static const Parallel parallel = over_torch_threads;
  const c10::cuda::CUDAGuard guard(device);
  std::vector<c10::DataPtr>
      staging;  // goes back to the allocator, and with that to the current stream, after the queue
  cuda::CudaQueue queue(c10::cuda::getCurrentCUDAStream(device),
                        {c10::cuda::getStreamFromPool(false, device), c10::cuda::getStreamFromPool(false, device)},
                        [&staging](int64_t bytes) {
                          auto* allocator = c10::cuda::CUDACachingAllocator::get();
                          return staging.emplace_back(allocator->allocate(static_cast<size_t>(bytes))).get();
                        });
  return cuda::transfer(jobs, direction, ring(), queue, {kernels(), at::get_num_threads(), parallel}, waits);
}

void keep_until_done(c10::DeviceIndex device, const at::Tensor& tensor) {
  const c10::DataPtr& memory = tensor.storage().data_ptr();
  at::getHostAllocator(c10::kCUDA)
      ->record_event(memory.get(), memory.get_context(), c10::cuda::getCurrentCUDAStream(device));
}

}  // namespace fastopt::gpu

#else

#include <c10/util/Exception.h>

namespace fastopt::gpu {
namespace {

[[noreturn]] void refuse() {
  TORCH_CHECK(false, "fastopt was built without CUDA");
}

}  // namespace

c10::Device current() {
  refuse();
}

bool is_capturing(c10::DeviceIndex) {
  refuse();
}

at::Tensor new_tensor(const at::Tensor&, at::ScalarType, c10::Device) {
  refuse();
}

void cast(c10::DeviceIndex, std::span<const Job>) {
  refuse();
}

std::vector<size_t> transfer(c10::DeviceIndex, std::span<const Job>, cuda::Direction, bool) {
  refuse();
}

void keep_until_done(c10::DeviceIndex, const at::Tensor&) {
  refuse();
}

}  // namespace fastopt::gpu

#endif
