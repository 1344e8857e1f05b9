#include "ring.h"

#include <unistd.h>

namespace fastopt::cuda {
namespace {

// After an error nothing is under way any more, so the fence goes.
template <class Ask>
auto asked(std::unique_ptr<Fence>& fence, Ask ask) {
  try {
    return ask(*fence);
  } catch (...) {
    fence.reset();
    throw;
  }
}

}  // namespace

Slot::~Slot() {
  if (memory_) {
    ring_->give_back({std::move(memory_), nullptr});
  }
}

void Slot::release_behind(std::unique_ptr<Fence> fence) {
  ring_->give_back({std::move(memory_), std::move(fence)});
}

Ring::Ring(int64_t slot_bytes, int64_t slots) : slot_bytes_(slot_bytes), slots_(slots), process_(getpid()) {
  free_.reserve(static_cast<size_t>(slots));
}

std::vector<Slot> Ring::take(Queue& queue, int64_t most) {
  std::vector<Slot> taken = take_free(queue, most);
  while (taken.empty()) {
    if (std::optional<Slot> slot = wait_for_one()) {
      taken.push_back(std::move(*slot));
    } else {
      taken = take_free(queue, most);
    }
  }
  return taken;
}

std::vector<Slot> Ring::take_free(Queue& queue, int64_t most) {
  if (getpid() != process_) {  // before the mutex, which another thread may have held at the fork
    throw DeviceError("CUDA does not work in a forked process");
  }
  std::vector<Slot> taken;
  taken.reserve(static_cast<size_t>(most));
  while (static_cast<int64_t>(taken.size()) < most) {
    if (std::optional<Slot> passed = take_passed()) {
      taken.push_back(std::move(*passed));
    } else if (std::optional<Slot> pinned = take_new(queue)) {
      taken.push_back(std::move(*pinned));
    } else {
      break;
    }
  }
  return taken;
}

std::optional<Slot> Ring::take_passed() {
  const std::scoped_lock lock(mutex_);
  for (auto slot = free_.begin(); slot != free_.end(); ++slot) {
    if (!slot->fence || asked(slot->fence, [](Fence& fence) { return fence.is_passed(); })) {
      Slot taken(*this, std::move(slot->memory));
      free_.erase(slot);
      return taken;
    }
  }
  return std::nullopt;
}

// None where the ring has all its slots, or no more memory can be pinned and there are some. Pins without the mutex.
std::optional<Slot> Ring::take_new(Queue& queue) {
  {
    const std::scoped_lock lock(mutex_);
    if (pinned_ == slots_) {
      return std::nullopt;
    }
    ++pinned_;
  }
  try {
    return Slot(*this, queue.allocate_pinned(slot_bytes_));
  } catch (const DeviceError&) {
    const std::scoped_lock lock(mutex_);
    changed_.notify_all();
    if (--pinned_ == 0) {
      throw;
    }
    return std::nullopt;
  }
}

// The slot that came back first, once its fence is passed. None after another change, of which the caller makes what it
// can.
std::optional<Slot> Ring::wait_for_one() {
  std::unique_lock lock(mutex_);
  if (free_.empty()) {
    if (pinned_ > 0) {
      changed_.wait(lock);
    }
    return std::nullopt;
  }
  Free first = std::move(free_.front());
  free_.erase(free_.begin());
  lock.unlock();
  Slot slot(*this, std::move(first.memory));
  if (first.fence) {
    first.fence->wait();
  }
  return slot;
}

void Ring::give_back(Free slot) noexcept {
  const std::scoped_lock lock(mutex_);
  free_.push_back(std::move(slot));  // has room for all
  changed_.notify_all();
}

}  // namespace fastopt::cuda
