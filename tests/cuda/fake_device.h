// A device that does everything late: what is asked of it waits in its streams until somebody waits for it, and is then
// done in an order of chance. So memory that is used again too early shows as wrong values.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "queue.h"
#include "run.h"

namespace core_test {

// From each dtype to each, equal ones included, where the CPU has a kernel.
std::vector<std::pair<fastopt::DType, fastopt::DType>> pairs_with_kernels();

// As the kernels of the device do it: lane after lane.
void cast_on_fake_device(std::span<const fastopt::Job> jobs);

class FakeQueue;

// Any thread may call.
class FakeDevice {
 public:
  explicit FakeDevice(uint32_t seed = 1) : random_(seed) {}
  FakeDevice(const FakeDevice&) = delete;
  FakeDevice& operator=(const FakeDevice&) = delete;

  // Does all that is left in all streams.
  void synchronize();

  // Whether all copies and casts have been made.
  bool is_idle();

  // Makes memory of the host pinned.
  void pin(const char* address, int64_t bytes);

  // From now on, lets the call of that name fail which comes after so many others of the name: allocate, copy, cast,
  // record, fork, join, staging; or the work of that name: work.
  void fail(const std::string& call, int64_t after);
  void fail_no_more();

  int64_t calls(const std::string& call);
  int64_t bytes_over_the_bus();

 private:
  friend class FakeQueue;
  friend class FakeFence;

  using Event = std::shared_ptr<bool>;

  struct Work {
    std::function<void()> body;
    Event waits_for;  // may be null
    Event sets;       // may be null
  };

  using Stream = std::deque<Work>;

  void count(const std::string& call);
  void add(Stream& stream, Work work);
  bool step();
  void run_until(const std::function<bool()>& is_over);
  bool is_pinned(const char* address, int64_t bytes) const;

  std::mutex mutex_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<std::pair<uintptr_t, uintptr_t>> pinned_;
  std::vector<std::unique_ptr<char[]>> staging_;
  std::map<std::string, int64_t> calls_;
  std::string failing_;
  int64_t failing_at_ = 0;
  bool has_failed_ = false;  // some work: fences say so until `fail_no_more`
  int64_t bytes_ = 0;
};

class FakeQueue : public fastopt::cuda::Queue {
 public:
  explicit FakeQueue(FakeDevice& device);

  fastopt::cuda::Pinned allocate_pinned(int64_t bytes) override;
  bool is_pinned(const void* address, int64_t bytes) override;
  char* staging(int stream, int64_t bytes) override;
  void fork() override;
  void join() override;
  void copy(int stream, void* dst, const void* src, int64_t bytes, fastopt::cuda::Direction direction) override;
  void cast(int stream, std::span<const fastopt::Job> jobs) override;
  std::unique_ptr<fastopt::cuda::Fence> record(int stream) override;
  void drain() noexcept override;

  // Something of the caller's own, in its stream.
  void call_in_callers_stream(std::function<void()> body);

 private:
  FakeDevice::Event event_behind(FakeDevice::Stream& stream);

  FakeDevice& device_;
  FakeDevice::Stream* callers_;
  std::vector<FakeDevice::Stream*> side_;
  std::vector<char*> staging_;
};

}  // namespace core_test
