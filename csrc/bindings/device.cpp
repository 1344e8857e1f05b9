#include "device.h"

#include "batch.h"

#ifdef FASTOPT_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/cast.h"
#endif

namespace fastopt {
namespace {

#ifdef FASTOPT_WITH_CUDA
constexpr bool kWithCuda = true;

void run_on(c10::DeviceIndex device, const std::vector<Job>& jobs) {
  const c10::cuda::CUDAGuard guard(device);
  cuda::cast(jobs, c10::cuda::getCurrentCUDAStream(device));
}
#else
constexpr bool kWithCuda = false;

void run_on(c10::DeviceIndex, const std::vector<Job>&) {}  // nothing is taken
#endif

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

}  // namespace

bool DeviceBatch::takes(const at::Tensor& dst, const at::Tensor& src) {
  return kWithCuda && dst.is_cuda() && dst.device() == src.device() && is_aligned(dst) && is_aligned(src);
}

void DeviceBatch::copy(const at::Tensor& dst, const at::Tensor& src) {
  jobs_[dst.device().index()].push_back(job_between(dst, src));
}

void DeviceBatch::run() {
  for (const auto& [device, jobs] : jobs_) {
    run_on(device, jobs);
  }
}

}  // namespace fastopt
