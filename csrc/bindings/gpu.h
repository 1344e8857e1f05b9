// What copies on GPUs ask of torch's CUDA and of ours. Built without CUDA, kIsBuilt says so, and nothing else is
// called.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <span>
#include <vector>

#include "../core/run.h"
#include "../cuda/queue.h"

namespace fastopt::gpu {

#ifdef FASTOPT_WITH_CUDA
inline constexpr bool kIsBuilt = true;
#else
inline constexpr bool kIsBuilt = false;
#endif

c10::Device current();

// Whether the current stream of a GPU is being captured into a graph.
bool is_capturing(c10::DeviceIndex device);

// A tensor of another's sizes and strides, from torch's allocator, built without the dispatcher. Undefined where there
// is no memory for it.
at::Tensor new_tensor(const at::Tensor& like, at::ScalarType dtype, c10::Device device);

// As of cuda/cast.h and cuda/transfers.h, by the current stream of the GPU and the process's pinned ring. Need no GIL.
// `transfer` may throw c10::Error as well, where there is no memory for staging.
void cast(c10::DeviceIndex device, std::span<const Job> jobs);
std::vector<size_t> transfer(c10::DeviceIndex device, std::span<const Job> jobs, cuda::Direction direction, bool waits);

// Has torch not use the memory of a tensor on the CPU again, if it is pinned memory of torch's, before the current
// stream of the GPU gets to where it is now.
void keep_until_done(c10::DeviceIndex device, const at::Tensor& tensor);

}  // namespace fastopt::gpu
