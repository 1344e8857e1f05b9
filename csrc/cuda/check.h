// Errors of CUDA's.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "queue.h"

namespace fastopt::cuda {

// Throws DeviceError with CUDA's own words. The error is forgotten with that, as far as CUDA forgets errors: the next
// call would report it once more.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw DeviceError(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

}  // namespace fastopt::cuda
