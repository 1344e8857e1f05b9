// What transfers between host and device ask of a device. Knows no CUDA, so the tests run them on a device of their
// own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>

#include "../core/run.h"

namespace fastopt::cuda {

// In the device's own words.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A point of a stream. Any thread may ask for it; both throw DeviceError where work has failed on the way there.
class Fence {
 public:
  virtual ~Fence() = default;
  virtual bool is_passed() = 0;
  virtual void wait() = 0;
};

// Memory of the host that devices read and write by themselves.
using Pinned = std::unique_ptr<char, void (*)(char*) noexcept>;

enum class Direction : uint8_t { ToDevice, ToHost };

// Note [Streams of a transfer]
// The work of one call on one device. Transfers alternate between side streams, so that a cast on the device hides
// behind the next transfer; within a stream all comes in order, and with it the use of the stream's staging memory. The
// side streams begin behind what the caller's stream holds (`fork`), which goes on behind all that they do (`join`): to
// everybody else the work stands in the caller's stream. Nothing waits for the device as a whole.
//
// One thread calls all of a queue but for its fences. Whatever it does may throw DeviceError.
class Queue {
 public:
  static constexpr int kStreams = 2;

  virtual ~Queue() = default;

  virtual Pinned allocate_pinned(int64_t bytes) = 0;

  // Whether all of these bytes, at least one, are memory that the device reads and writes by itself.
  virtual bool is_pinned(const void* address, int64_t bytes) = 0;

  // Memory of the device, the same for a stream at every call, until the queue goes; at least `bytes`, which are the
  // same at every call as well. Throws what the allocator does where there is none.
  virtual char* staging(int stream, int64_t bytes) = 0;

  virtual void fork() = 0;
  virtual void join() = 0;

  // In a stream, without waiting for it. The memory on the host's side is pinned.
  virtual void copy(int stream, void* dst, const void* src, int64_t bytes, Direction direction) = 0;

  // As cast.h has it, in a stream.
  virtual void cast(int stream, std::span<const Job> jobs) = 0;

  // The point behind all that a stream holds now.
  virtual std::unique_ptr<Fence> record(int stream) = 0;

  // Waits for all that the side streams hold, whatever has become of it.
  virtual void drain() noexcept = 0;
};

}  // namespace fastopt::cuda
