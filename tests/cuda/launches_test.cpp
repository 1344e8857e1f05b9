// Batches cut into launches, chunks and lanes, on a device that plays them one after the other.
#include "launches.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "core_test.h"
#include "dtype.h"
#include "fake_device.h"
#include "kernels.h"
#include "run.h"

namespace core_test {
namespace {

using fastopt::bfloat16;
using fastopt::DType;
using fastopt::Job;
using fastopt::size_of;
using fastopt::cuda::for_each_launch;
using fastopt::cuda::Item;

// Random bytes into fresh memory, both at an offset from an allocation's start; and what the CPU's kernels make of
// them.
class Batch {
 public:
  void add(int64_t count, DType src, DType dst, int64_t src_offset = 0, int64_t dst_offset = 0) {
    srcs_.emplace_back(count * size_of(src), src_offset);
    dsts_.emplace_back(count * size_of(dst), dst_offset);
    expected_.emplace_back(count * size_of(dst));
    for (int64_t i = 0; i < count * size_of(src); ++i) {
      srcs_.back().data()[i] = static_cast<char>(random_());
    }
    jobs_.push_back({srcs_.back().data(), dsts_.back().data(), count, src, dst});
    fastopt::kPortableKernels.find(src, dst)(srcs_.back().data(), expected_.back().data(), count);
  }

  void check_on_fake_device() const {
    cast_on_fake_device(jobs_);
    for (size_t job = 0; job < jobs_.size(); ++job) {
      const int64_t bytes = jobs_[job].count * size_of(jobs_[job].dst_dtype);
      check(std::memcmp(dsts_[job].data(), expected_[job].data(), static_cast<size_t>(bytes)) == 0, "job ", job, " of ",
            jobs_.size(), ", ", jobs_[job].count, " elements from dtype ", static_cast<int>(jobs_[job].src_dtype),
            " to ", static_cast<int>(jobs_[job].dst_dtype), ": not what the CPU makes of it");
    }
  }

 private:
  std::mt19937 random_{1};
  std::vector<Buffer> srcs_;
  std::vector<Buffer> dsts_;
  std::vector<Buffer> expected_;
  std::vector<Job> jobs_;
};

void test_lanes_cast_at_every_alignment() {
  for (const auto& [src, dst] : pairs_with_kernels()) {
    Batch batch;
    for (int64_t src_offset = 0; src_offset < 16; src_offset += size_of(src)) {
      for (int64_t dst_offset = 0; dst_offset < 16; dst_offset += size_of(dst)) {
        for (const int64_t count : {1, 2, 7, 15, 16, 17, 31, 33, 500, 2'111}) {
          batch.add(count, src, dst, src_offset, dst_offset);
        }
      }
    }
    batch.check_on_fake_device();
  }
}

void test_lanes_cast_around_the_ends_of_chunks() {
  constexpr int64_t kChunk = fastopt::cuda::kChunkBytes;
  for (const auto& [src, dst] : pairs_with_kernels()) {
    const int64_t chunk = kChunk / std::max(size_of(src), size_of(dst));
    Batch batch;
    for (const int64_t chunks : {1, 2, 3}) {
      for (const int64_t more : {-17, -1, 0, 1, 17}) {
        batch.add(chunks * chunk + more, src, dst);
        batch.add(chunks * chunk + more, src, dst, size_of(src), size_of(dst));
      }
    }
    batch.check_on_fake_device();
  }
}

void test_launches_take_any_mix() {
  std::mt19937 random(3);
  const auto pairs = pairs_with_kernels();
  for (const int64_t jobs : {0, 1, 2, 64, 65, 3'000}) {
    Batch batch;
    for (int64_t i = 0; i < jobs; ++i) {
      const auto& [src, dst] = pairs[random() % pairs.size()];
      const auto count = static_cast<int64_t>(random() % 64 == 0 ? random() % 20'000 : random() % 70);
      batch.add(count, src, dst);
    }
    batch.check_on_fake_device();
  }
}

void test_one_launch_a_pair_and_thousand_jobs() {
  const Buffer memory(1);
  for (const int64_t jobs : {1, 999, 1'000, 1'001, 5'000}) {
    std::vector<Job> all(static_cast<size_t>(jobs), Job{memory.data(), memory.data(), 1, DType::Byte, DType::Byte});
    all.insert(all.end(), static_cast<size_t>(jobs), {memory.data(), memory.data(), 0, DType::Byte, DType::Byte});
    int64_t launches = 0;
    int64_t items = 0;
    for_each_launch(all, [&](DType, DType, std::span<const Item> some) {
      check(!some.empty() && some.size() <= fastopt::cuda::kManyItems, some.size(), " items in a launch");
      launches += 1;
      items += static_cast<int64_t>(some.size());
    });
    check(items == jobs, items, " items of ", jobs, " jobs that are not empty");
    check(launches == (jobs + 999) / 1'000, launches, " launches for ", jobs, " jobs");
  }
}

// No memory is that large; only its addresses are computed.
void test_chunks_beyond_32_bits() {
  constexpr int64_t kHuge = int64_t{1} << 40;
  const Job job{reinterpret_cast<const void*>(uintptr_t{1} << 44), reinterpret_cast<void*>(uintptr_t{1} << 45),
                kHuge + 5, DType::Float32, DType::BFloat16};
  for_each_launch({&job, 1}, [](DType, DType, std::span<const Item> items) {
    const auto last = fastopt::cuda::chunk_at<float, bfloat16>(items.data(), 1, items.back().end - 1);
    check(last.count == 5, "the last chunk has ", last.count, " elements");
    check(last.src - items[0].src == kHuge * 4, "and is read at ", last.src - items[0].src);
    check(last.dst - items[0].dst == kHuge * 2, "and written at ", last.dst - items[0].dst);
  });
}

void test_an_error_of_a_launch_reaches_the_caller() {
  const Buffer memory(1);
  const Job job{memory.data(), memory.data(), 1, DType::Byte, DType::Byte};
  bool caught = false;
  try {
    for_each_launch({&job, 1}, [](DType, DType, std::span<const Item>) { throw std::runtime_error("CUDA: no"); });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  check(caught, "an error was lost");
}

}  // namespace

std::span<const Test> launches_tests() {
  static constexpr std::array kTests{
      TEST(test_lanes_cast_at_every_alignment), TEST(test_lanes_cast_around_the_ends_of_chunks),
      TEST(test_launches_take_any_mix),         TEST(test_one_launch_a_pair_and_thousand_jobs),
      TEST(test_chunks_beyond_32_bits),         TEST(test_an_error_of_a_launch_reaches_the_caller),
  };
  return kTests;
}

}  // namespace core_test
