// Pinned memory of the host that all transfers of a process share.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "queue.h"

namespace fastopt::cuda {

class Ring;

// A part of the ring's memory, its holder's alone. What lets it go says when it may be used again: at once (the
// destructor), or behind a transfer that the device has still to make.
class Slot {
 public:
  Slot(Ring& ring, Pinned memory) : ring_(&ring), memory_(std::move(memory)) {}
  ~Slot();
  Slot(Slot&& other) noexcept = default;
  Slot& operator=(Slot&&) = delete;

  char* data() const { return memory_.get(); }

  // Gives the slot back, to be used again once the fence is passed. It holds nothing from then on.
  void release_behind(std::unique_ptr<Fence> fence);

 private:
  Ring* ring_;
  Pinned memory_;
};

// Note [Pinned ring]
// The driver copies from ordinary memory through small buffers of its own; only what is pinned moves at the bus's
// speed, and pinning costs more than many a transfer. So all transfers of the process go through this one ring. Its
// slots are pinned when they are first needed, each once, and never more than a fixed number of them; a slot is used
// again when the device has passed the fence it was given back behind. Where no more memory can be pinned, transfers go
// on with the slots there are.
//
// Any thread may call. A caller that holds a slot takes others without waiting (`take_free`) or not at all: two that
// waited for each other's would wait for ever.
class Ring {
 public:
  static constexpr int64_t kSlotBytes = int64_t{8} << 20;
  static constexpr int64_t kSlots = 32;

  explicit Ring(int64_t slot_bytes = kSlotBytes, int64_t slots = kSlots);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t slots() const { return slots_; }

  // At least one slot, and at most `most` of those that can be had without waiting for the device or for another
  // thread. Throws DeviceError where an earlier transfer has failed, where no memory can be pinned at all, and in a
  // process that was forked off the one that made the ring, where CUDA does not work.
  std::vector<Slot> take(Queue& queue, int64_t most);

  // The same, but none where that would have to wait.
  std::vector<Slot> take_free(Queue& queue, int64_t most);

 private:
  friend class Slot;

  struct Free {
    Pinned memory;
    std::unique_ptr<Fence> fence;  // null where nothing is under way
  };

  void give_back(Free slot) noexcept;
  std::optional<Slot> take_passed();
  std::optional<Slot> take_new(Queue& queue);
  std::optional<Slot> wait_for_one();

  const int64_t slot_bytes_;
  const int64_t slots_;
  const int process_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::vector<Free> free_;  // in the order they came back
  int64_t pinned_ = 0;      // slots that there are: free, held, and being pinned
};

}  // namespace fastopt::cuda
