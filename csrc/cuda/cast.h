// Batched casts within the memory of one device.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "../core/run.h"

namespace fastopt::cuda {

// Launches all jobs on a stream of the current device, in one launch per dtype pair and thousand jobs; does not wait
// for them. Both sides of a job are memory that the device reaches, aligned to their elements. Throws std::bad_alloc
// before the first launch, or DeviceError.
void cast(std::span<const Job> jobs, cudaStream_t stream);

}  // namespace fastopt::cuda
