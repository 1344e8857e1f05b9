// Batched copies and casts between host and device. Knows no CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "../core/run.h"
#include "queue.h"
#include "ring.h"

namespace fastopt::cuda {

// What the host casts with.
struct Host {
  const Kernels& kernels;
  int64_t threads;
  const Parallel& parallel;
};

// An error of the device while it was at these jobs, from the first to the last, or at some of them.
class TransferError : public DeviceError {
 public:
  TransferError(const std::string& what, size_t first_job, size_t last_job)
      : DeviceError(what), first_job(first_job), last_job(last_job) {}

  const size_t first_job;
  const size_t last_job;
};

// Copies all jobs from the host to the device, or back, in order with the caller's stream (Note [Streams of a
// transfer]). The sides on the device are aligned to their elements. One of its jobs may be audited, given or in a file
// where it is one to the device.
//
// Memory of the host that is not pinned has been read, or written, when this returns; transfers to the device may still
// be under way then. So may those of pinned memory that the device reads and writes itself: with `waits` they have been
// made as well, and without it the jobs are returned whose memory on the host has to stay as it is.
//
// Throws DeviceError or TransferError, what Queue::staging throws, std::bad_alloc, and ReadError. Nothing is under way
// then, the destinations may have been written in part, and the ring is as good as before.
std::vector<size_t> transfer(std::span<const Job> jobs, Direction direction, Ring& ring, Queue& queue, const Host& host,
                             bool waits);

}  // namespace fastopt::cuda
