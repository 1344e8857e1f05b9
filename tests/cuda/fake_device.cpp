#include "fake_device.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "core_test.h"
#include "dtype.h"
#include "kernels.h"
#include "lanes.h"
#include "launches.h"

namespace core_test {

using fastopt::bfloat16;
using fastopt::DType;
using fastopt::float16;
using fastopt::Job;
using fastopt::kDTypes;
using fastopt::cuda::DeviceError;
using fastopt::cuda::Direction;
using fastopt::cuda::Fence;
using fastopt::cuda::Item;
using fastopt::cuda::Pinned;

// ---- Kernels ----

namespace {

using PlayFn = void (*)(std::span<const Item>);

template <class Src, class Dst>
void play(std::span<const Item> items) {
  const auto size = static_cast<int64_t>(items.size());
  for (int64_t position = 0; position < items.back().end; ++position) {
    const auto chunk = fastopt::cuda::chunk_at<Src, Dst>(items.data(), size, position);
    check(chunk.count > 0, "chunk ", position, " of ", items.back().end, " has ", chunk.count, " elements");
    for (int lane = 0; lane < fastopt::cuda::kLanes; ++lane) {
      fastopt::cuda::cast_chunk<Src, Dst>(chunk, lane);
    }
  }
}

template <class Src>
constexpr std::array<PlayFn, kDTypes> plays_from() {
  return {play<Src, float>, play<Src, bfloat16>, play<Src, float16>, play<Src, double>, nullptr};
}

constexpr std::array<std::array<PlayFn, kDTypes>, kDTypes> kPlays{
    plays_from<float>(),
    plays_from<bfloat16>(),
    plays_from<float16>(),
    plays_from<double>(),
    {nullptr, nullptr, nullptr, nullptr, play<char, char>},
};

}  // namespace

std::vector<std::pair<DType, DType>> pairs_with_kernels() {
  std::vector<std::pair<DType, DType>> pairs;
  for (const DType src : kAllDTypes) {
    for (const DType dst : kAllDTypes) {
      if (fastopt::kPortableKernels.find(src, dst) != nullptr) {
        pairs.emplace_back(src, dst);
      }
    }
  }
  return pairs;
}

void cast_on_fake_device(std::span<const Job> jobs) {
  fastopt::cuda::for_each_launch(jobs, [](DType src, DType dst, std::span<const Item> items) {
    kPlays[static_cast<size_t>(src)][static_cast<size_t>(dst)](items);
  });
}

// ---- Streams ----

void FakeDevice::synchronize() {
  const std::scoped_lock lock(mutex_);
  while (step()) {
  }
  const bool is_stuck =
      std::any_of(streams_.begin(), streams_.end(), [](const auto& stream) { return !stream->empty(); });
  check(!is_stuck, "streams wait for each other");
}

bool FakeDevice::is_idle() {
  const std::scoped_lock lock(mutex_);
  return std::all_of(streams_.begin(), streams_.end(), [](const auto& stream) {
    return std::none_of(stream->begin(), stream->end(), [](const Work& work) { return bool(work.body); });
  });
}

void FakeDevice::pin(const char* address, int64_t bytes) {
  const std::scoped_lock lock(mutex_);
  const auto begin = reinterpret_cast<uintptr_t>(address);
  pinned_.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
}

void FakeDevice::fail(const std::string& call, int64_t after) {
  const std::scoped_lock lock(mutex_);
  failing_ = call;
  failing_at_ = calls_[call] + after;
}

void FakeDevice::fail_no_more() {
  const std::scoped_lock lock(mutex_);
  failing_.clear();
  has_failed_ = false;
}

int64_t FakeDevice::calls(const std::string& call) {
  const std::scoped_lock lock(mutex_);
  return calls_[call];
}

int64_t FakeDevice::bytes_over_the_bus() {
  const std::scoped_lock lock(mutex_);
  return bytes_;
}

// The following have the mutex.

void FakeDevice::count(const std::string& call) {
  const int64_t before = calls_[call]++;
  if (call == failing_ && before >= failing_at_) {
    throw DeviceError("no " + call);
  }
}

void FakeDevice::add(Stream& stream, Work work) {
  stream.push_back(std::move(work));
}

// Does one thing of some stream. Whether there was one to do.
bool FakeDevice::step() {
  const size_t first = random_() % streams_.size();
  for (size_t i = 0; i < streams_.size(); ++i) {
    Stream& stream = *streams_[(first + i) % streams_.size()];
    if (stream.empty() || (stream.front().waits_for && !*stream.front().waits_for)) {
      continue;
    }
    const Work work = std::move(stream.front());
    stream.pop_front();
    if (work.body) {
      try {
        count("work");
        work.body();
      } catch (const DeviceError&) {
        has_failed_ = true;
      }
    }
    if (work.sets) {
      *work.sets = true;
    }
    return true;
  }
  return false;
}

void FakeDevice::run_until(const std::function<bool()>& is_over) {
  while (!is_over()) {
    check(step(), "what is waited for never happens");
  }
}

bool FakeDevice::is_pinned(const char* address, int64_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  return std::any_of(pinned_.begin(), pinned_.end(), [&](const auto& range) {
    return range.first <= begin && begin + static_cast<uintptr_t>(bytes) <= range.second;
  });
}

class FakeFence final : public Fence {
 public:
  FakeFence(FakeDevice& device, FakeDevice::Event event) : device_(device), event_(std::move(event)) {}

  // Something happens on the device between two questions.
  bool is_passed() override {
    const std::scoped_lock lock(device_.mutex_);
    for (uint32_t steps = device_.random_() % 8; steps > 0; --steps) {
      device_.step();
    }
    check_device();
    return *event_;
  }

  void wait() override {
    const std::scoped_lock lock(device_.mutex_);
    device_.run_until([&] { return *event_; });
    check_device();
  }

 private:
  void check_device() const {
    if (device_.has_failed_) {
      throw DeviceError("work has failed");
    }
  }

  FakeDevice& device_;
  const FakeDevice::Event event_;
};

FakeQueue::FakeQueue(FakeDevice& device) : device_(device), staging_(kStreams, nullptr) {
  const std::scoped_lock lock(device_.mutex_);
  for (int i = 0; i <= kStreams; ++i) {
    side_.push_back(device_.streams_.emplace_back(std::make_unique<FakeDevice::Stream>()).get());
  }
  callers_ = side_.back();
  side_.pop_back();
}

Pinned FakeQueue::allocate_pinned(int64_t bytes) {
  {
    const std::scoped_lock lock(device_.mutex_);
    device_.count("allocate");
  }
  Pinned memory(new char[static_cast<size_t>(bytes)], [](char* address) noexcept { delete[] address; });
  device_.pin(memory.get(), bytes);
  return memory;
}

bool FakeQueue::is_pinned(const void* address, int64_t bytes) {
  const std::scoped_lock lock(device_.mutex_);
  return device_.is_pinned(static_cast<const char*>(address), bytes);
}

char* FakeQueue::staging(int stream, int64_t bytes) {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("staging");
  char*& memory = staging_[static_cast<size_t>(stream)];
  if (memory == nullptr) {
    memory = device_.staging_.emplace_back(new char[static_cast<size_t>(bytes)]).get();
  }
  return memory;
}

FakeDevice::Event FakeQueue::event_behind(FakeDevice::Stream& stream) {
  auto event = std::make_shared<bool>(false);
  device_.add(stream, {nullptr, nullptr, event});
  return event;
}

void FakeQueue::fork() {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("fork");
  const auto event = event_behind(*callers_);
  for (FakeDevice::Stream* stream : side_) {
    device_.add(*stream, {nullptr, event, nullptr});
  }
}

void FakeQueue::join() {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("join");
  for (FakeDevice::Stream* stream : side_) {
    device_.add(*callers_, {nullptr, event_behind(*stream), nullptr});
  }
}

void FakeQueue::copy(int stream, void* dst, const void* src, int64_t bytes, Direction direction) {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("copy");
  const auto* host = static_cast<const char*>(direction == Direction::ToDevice ? src : dst);
  check(bytes > 0 && device_.is_pinned(host, bytes), "a copy of ", bytes,
        " bytes, from or to memory that is not pinned");
  device_.bytes_ += bytes;
  device_.add(*side_[static_cast<size_t>(stream)],
              {[=] { std::memcpy(dst, src, static_cast<size_t>(bytes)); }, nullptr, nullptr});
}

void FakeQueue::cast(int stream, std::span<const Job> jobs) {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("cast");
  std::vector<Job> all(jobs.begin(), jobs.end());
  device_.add(*side_[static_cast<size_t>(stream)],
              {[all = std::move(all)] { cast_on_fake_device(all); }, nullptr, nullptr});
}

std::unique_ptr<Fence> FakeQueue::record(int stream) {
  const std::scoped_lock lock(device_.mutex_);
  device_.count("record");
  return std::make_unique<FakeFence>(device_, event_behind(*side_[static_cast<size_t>(stream)]));
}

void FakeQueue::drain() noexcept {
  const std::scoped_lock lock(device_.mutex_);
  device_.run_until([&] {
    return std::all_of(side_.begin(), side_.end(), [](const FakeDevice::Stream* stream) { return stream->empty(); });
  });
}

void FakeQueue::call_in_callers_stream(std::function<void()> body) {
  const std::scoped_lock lock(device_.mutex_);
  device_.add(*callers_, {std::move(body), nullptr, nullptr});
}

}  // namespace core_test
