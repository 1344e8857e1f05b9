// The ring of pinned slots, on a device that does everything late.
#include "ring.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "core_test.h"
#include "fake_device.h"

namespace core_test {
namespace {

using fastopt::cuda::DeviceError;
using fastopt::cuda::Fence;
using fastopt::cuda::Ring;
using fastopt::cuda::Slot;

constexpr int64_t kSlotBytes = 4096;

// A fence of which the test says when it is passed, and whether work before it failed.
class HandFence final : public Fence {
 public:
  struct State {
    bool is_passed = false;
    bool has_failed = false;
    int64_t waits = 0;
  };

  explicit HandFence(std::shared_ptr<State> state) : state_(std::move(state)) {}

  bool is_passed() override {
    check_work();
    return state_->is_passed;
  }

  void wait() override {
    state_->waits += 1;
    state_->is_passed = true;
    check_work();
  }

 private:
  void check_work() const {
    if (state_->has_failed) {
      throw DeviceError("work has failed");
    }
  }

  std::shared_ptr<State> state_;
};

std::shared_ptr<HandFence::State> give_back_behind_fence(Slot slot) {
  auto state = std::make_shared<HandFence::State>();
  slot.release_behind(std::make_unique<HandFence>(state));
  return state;
}

bool fails(const std::function<void()>& call) {
  try {
    call();
  } catch (const DeviceError&) {
    return true;
  }
  return false;
}

void check_all_slots_can_be_had(Ring& ring, FakeQueue& queue) {
  const auto taken = ring.take(queue, ring.slots() + 1);
  check(static_cast<int64_t>(taken.size()) == ring.slots(), taken.size(), " slots of ", ring.slots());
  std::set<char*> places;
  for (const Slot& slot : taken) {
    places.insert(slot.data());
    std::fill_n(slot.data(), ring.slot_bytes(), 'x');
  }
  check(places.size() == taken.size(), "a slot was handed out twice");
}

void test_a_ring_pins_what_it_needs_and_each_slot_once() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 4);
  check(device.calls("allocate") == 0, "memory was pinned before there was a transfer");
  for (int i = 0; i < 5; ++i) {
    check(ring.take(queue, 1).size() == 1, "no slot");
  }
  check(device.calls("allocate") == 1, device.calls("allocate"), " allocations for one slot");
  for (int i = 0; i < 5; ++i) {
    check_all_slots_can_be_had(ring, queue);
  }
  check(device.calls("allocate") == 4, device.calls("allocate"), " allocations for four slots");
}

void test_a_slot_is_used_again_behind_its_fence() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 2);
  auto both = ring.take(queue, 2);
  char* const places[] = {both[0].data(), both[1].data()};
  const auto first = give_back_behind_fence(std::move(both[0]));
  const auto second = give_back_behind_fence(std::move(both[1]));
  check(ring.take_free(queue, 2).empty(), "a slot was handed out that the device is at");
  second->is_passed = true;
  auto passed = ring.take(queue, 2);
  check(passed.size() == 1 && passed[0].data() == places[1], "the slot that can be had is not what was handed out");
  check(first->waits == 0 && second->waits == 0, "somebody waited without need");
  const auto waited = ring.take(queue, 2);
  check(waited.size() == 1 && waited[0].data() == places[0], "the slot that is waited for is not what was handed out");
  check(first->waits == 1, "the slot was handed out before its fence was passed");
}

void test_the_slot_that_came_back_first_is_waited_for() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 3);
  auto all = ring.take(queue, 3);
  std::vector<std::shared_ptr<HandFence::State>> fences;
  for (Slot& slot : all) {
    fences.push_back(give_back_behind_fence(std::move(slot)));
  }
  check(ring.take(queue, 3).size() == 1, "not one slot, where one had to be waited for");
  check(fences[0]->waits == 1 && fences[1]->waits == 0 && fences[2]->waits == 0, "another was waited for");
}

void test_a_ring_goes_on_with_the_slots_there_are() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 4);
  device.fail("allocate", 0);
  check(fails([&] { ring.take(queue, 1); }), "no slot, and no error");
  check(fails([&] { ring.take_free(queue, 1); }), "no slot, and no error");
  device.fail("allocate", 2);
  auto two = ring.take(queue, 4);
  check(two.size() == 2, two.size(), " slots where two could be pinned");
  give_back_behind_fence(std::move(two[0]));
  check(ring.take(queue, 4).size() == 1, "no slot where one was to be waited for");
  two.clear();
  device.fail_no_more();
  check_all_slots_can_be_had(ring, queue);
}

void test_an_error_on_the_way_to_a_fence_surfaces_once() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 2);
  for (const bool is_waited_for : {false, true}) {
    auto both = ring.take(queue, 2);
    const auto first = give_back_behind_fence(std::move(both[0]));
    const auto second = give_back_behind_fence(std::move(both[1]));
    if (is_waited_for) {
      check(ring.take_free(queue, 2).empty(), "a slot was handed out that the device is at");
    }
    first->has_failed = true;
    second->is_passed = true;
    check(fails([&] { ring.take(queue, 2); }), "an error was lost");
    check_all_slots_can_be_had(ring, queue);
  }
}

void test_a_fork_has_no_ring() {
  FakeDevice device;
  FakeQueue queue(device);
  Ring ring(kSlotBytes, 2);
  const pid_t child = fork();
  if (child == 0) {
    _exit(fails([&] { ring.take(queue, 1); }) ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  check(status == 0, "the child got a slot");
  check_all_slots_can_be_had(ring, queue);
}

void test_threads_share_the_slots_of_a_ring() {
  FakeDevice device;
  Ring ring(kSlotBytes, 3);
  std::atomic<int64_t> spoilt{0};
  run_on_std_threads(4, [&](int64_t thread) {
    FakeQueue queue(device);
    const auto mark = static_cast<char>(thread);
    for (int64_t i = 0; i < 300; ++i) {
      auto slots = ring.take(queue, 1 + i % 3);
      for (const Slot& slot : slots) {
        std::fill_n(slot.data(), kSlotBytes, mark);
      }
      for (Slot& slot : slots) {
        spoilt += std::count(slot.data(), slot.data() + kSlotBytes, mark) != kSlotBytes;
        if (i % 2 == 0) {
          slot.release_behind(queue.record(0));
        }
      }
    }
  });
  check(spoilt == 0, spoilt.load(), " slots were two threads' at once");
  device.synchronize();
  FakeQueue queue(device);
  check_all_slots_can_be_had(ring, queue);
}

void test_threads_wait_for_slots_that_cannot_be_pinned() {
  FakeDevice device;
  Ring ring(kSlotBytes, 3);
  FakeQueue first(device);
  auto only = ring.take(first, 1);
  device.fail("allocate", 0);
  run_on_std_threads(3, [&](int64_t thread) {
    FakeQueue queue(device);
    if (thread == 0) {
      only.clear();
    } else {
      check(ring.take(queue, 2).size() == 1, "not the one slot there is");
    }
  });
}

// A queue that fails to pin, slowly.
class SlowQueue final : public FakeQueue {
 public:
  SlowQueue(FakeDevice& device, std::atomic<bool>& has_begun) : FakeQueue(device), has_begun_(has_begun) {}

  fastopt::cuda::Pinned allocate_pinned(int64_t) override {
    has_begun_ = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    throw DeviceError("no memory to pin");
  }

 private:
  std::atomic<bool>& has_begun_;
};

void test_threads_that_wait_for_a_slot_go_on_where_it_cannot_be_pinned() {
  FakeDevice device;
  Ring ring(kSlotBytes, 1);
  std::atomic<bool> has_begun{false};
  std::atomic<int64_t> taken{0};
  run_on_std_threads(2, [&](int64_t thread) {
    if (thread == 0) {
      SlowQueue queue(device, has_begun);
      taken += fails([&] { ring.take(queue, 1); }) ? 0 : 100;
    } else {
      while (!has_begun) {
        std::this_thread::yield();
      }
      FakeQueue queue(device);
      taken += static_cast<int64_t>(ring.take(queue, 1).size());
    }
  });
  check(taken == 1, taken.load(), " slots where one could be pinned");
}

}  // namespace

std::span<const Test> ring_tests() {
  static constexpr std::array kTests{
      TEST(test_a_ring_pins_what_it_needs_and_each_slot_once),
      TEST(test_a_slot_is_used_again_behind_its_fence),
      TEST(test_the_slot_that_came_back_first_is_waited_for),
      TEST(test_a_ring_goes_on_with_the_slots_there_are),
      TEST(test_an_error_on_the_way_to_a_fence_surfaces_once),
      TEST(test_a_fork_has_no_ring),
      TEST(test_threads_share_the_slots_of_a_ring),
      TEST(test_threads_wait_for_slots_that_cannot_be_pinned),
      TEST(test_threads_that_wait_for_a_slot_go_on_where_it_cannot_be_pinned),
  };
  return kTests;
}

}  // namespace core_test
