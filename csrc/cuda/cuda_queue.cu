#include <utility>

#include "cast.h"
#include "check.h"
#include "cuda_queue.h"

namespace fastopt::cuda {
namespace {

// Of the current device.
class Event final : public Fence {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() override { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream)); }

  void hold_back(cudaStream_t stream) const { check(cudaStreamWaitEvent(stream, event_, 0)); }

  bool is_passed() override {
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    check(error);
    return true;
  }

  void wait() override { check(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Lets nothing in `later` begin before all that `earlier` holds now.
void order(cudaStream_t earlier, cudaStream_t later) {
  Event event;  // CUDA keeps what an event that is gone has still to hold back
  event.record(earlier);
  event.hold_back(later);
}

bool is_pinned_at(const void* address) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, address));
  return attributes.type == cudaMemoryTypeHost;
}

}  // namespace

CudaQueue::CudaQueue(cudaStream_t callers, std::array<cudaStream_t, kStreams> side,
                     std::function<void*(int64_t bytes)> allocate)
    : callers_(callers), side_(side), allocate_(std::move(allocate)) {}

Pinned CudaQueue::allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocPortable));  // for all devices
  return {static_cast<char*>(memory), [](char* address) noexcept { cudaFreeHost(address); }};
}

// What is registered in part only is not: a transfer may not leave it.
bool CudaQueue::is_pinned(const void* address, int64_t bytes) {
  return is_pinned_at(address) && is_pinned_at(static_cast<const char*>(address) + bytes - 1);
}

char* CudaQueue::staging(int stream, int64_t bytes) {
  char*& memory = staging_[static_cast<size_t>(stream)];
  if (memory == nullptr) {
    memory = static_cast<char*>(allocate_(bytes));
    order(callers_, at(stream));  // once more: what is allocated late may have been freed behind later work
  }
  return memory;
}

void CudaQueue::fork() {
  for (const cudaStream_t stream : side_) {
    order(callers_, stream);
  }
}

void CudaQueue::join() {
  for (const cudaStream_t stream : side_) {
    order(stream, callers_);
  }
}

void CudaQueue::copy(int stream, void* dst, const void* src, int64_t bytes, Direction direction) {
  const auto kind = direction == Direction::ToDevice ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
  check(cudaMemcpyAsync(dst, src, static_cast<size_t>(bytes), kind, at(stream)));
}

void CudaQueue::cast(int stream, std::span<const Job> jobs) {
  cuda::cast(jobs, at(stream));
}

std::unique_ptr<Fence> CudaQueue::record(int stream) {
  auto event = std::make_unique<Event>();
  event->record(at(stream));
  return event;
}

void CudaQueue::drain() noexcept {
  for (const cudaStream_t stream : side_) {
    cudaStreamSynchronize(stream);
    cudaGetLastError();  // there is one already that says why
  }
}

}  // namespace fastopt::cuda
