// Cutting and threads, by kernels that count instead of casting.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "core_test.h"
#include "dtype.h"
#include "kernels.h"
#include "run.h"

namespace core_test {
namespace {

using fastopt::CastFn;
using fastopt::DType;
using fastopt::Job;
using fastopt::kDTypes;
using fastopt::Kernels;
using fastopt::Parallel;
using fastopt::size_of;

// What one visit adds to an element: odd, so that two visits show, and taken from the source, so that a destination
// that got another element's source shows as well.
uint64_t mark_of(uint64_t src_bits) {
  return 1 + 2 * (src_bits & 0x3f);
}

template <int64_t SrcSize, int64_t DstSize>
void mark(const void* src, void* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    char* to = static_cast<char*>(dst) + i * DstSize;
    const uint64_t source = load_bits(static_cast<const char*>(src) + i * SrcSize, SrcSize);
    store_bits(to, DstSize, load_bits(to, DstSize) + mark_of(source));
  }
}

template <int64_t SrcSize>
constexpr std::array<CastFn, kDTypes> marks_from() {
  return {mark<SrcSize, 4>, mark<SrcSize, 2>, mark<SrcSize, 2>, mark<SrcSize, 8>, mark<SrcSize, 1>};
}

constexpr Kernels::Table kMarks{marks_from<4>(), marks_from<2>(), marks_from<2>(), marks_from<8>(), marks_from<1>()};

constexpr Kernels kMarking{"marking", {kMarks, kMarks}, {}};

// Kernels that count the bytes that go through the cache and past it.
std::atomic<int64_t> cached_bytes;
std::atomic<int64_t> streamed_bytes;

constexpr Kernels::Table counting_bytes(CastFn count) {
  Kernels::Table table{};
  table.back().back() = count;
  return table;
}

constexpr Kernels kCountingBytes{"counting",
                                 {counting_bytes([](const void*, void*, int64_t count) { cached_bytes += count; }),
                                  counting_bytes([](const void*, void*, int64_t count) { streamed_bytes += count; })},
                                 {}};

class MarkedBatch {
 public:
  void add(int64_t count, DType src, DType dst) {
    srcs_.emplace_back(count * size_of(src));
    dsts_.emplace_back(count * size_of(dst));
    for (int64_t i = 0; i < count; ++i) {
      store_bits(srcs_.back().data() + i * size_of(src), size_of(src), static_cast<uint64_t>(i * 7 + 1) & 0x3f);
    }
    jobs_.push_back({srcs_.back().data(), dsts_.back().data(), count, src, dst});
  }

  const std::vector<Job>& jobs() const { return jobs_; }

  void check_every_element_visited_once() const {
    for (size_t job = 0; job < jobs_.size(); ++job) {
      const int64_t size = size_of(jobs_[job].dst_dtype);
      for (int64_t i = 0; i < jobs_[job].count; ++i) {
        const uint64_t seen = load_bits(dsts_[job].data() + i * size, size);
        const uint64_t once = mark_of(static_cast<uint64_t>(i * 7 + 1));
        check(seen == once, "job ", job, " of ", jobs_.size(), ", element ", i, " of ", jobs_[job].count, ": mark ",
              seen, " where one visit leaves ", once);
      }
    }
  }

 private:
  std::vector<Buffer> srcs_;
  std::vector<Buffer> dsts_;
  std::vector<Job> jobs_;
};

using Shape = std::vector<int64_t>;

Shape random_shape(uint32_t seed) {
  std::mt19937 random(seed);
  Shape counts(1 + random() % 400);
  for (int64_t& count : counts) {
    count = random() % 16 == 0 ? static_cast<int64_t>(random() % 20'000) : static_cast<int64_t>(random() % 130);
  }
  return counts;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all{
      {},
      {0},
      {1},
      {0, 0, 0},
      {0, 5, 0},
      {63, 64, 65},
      {400'003},
      {150'001, 1, 0, 250'001},
      Shape(5'000, 1),
      Shape(3'000, 0),
  };
  Shape one_huge_among_small(1'000, 3);
  one_huge_among_small[500] = 300'017;
  all.push_back(one_huge_among_small);
  for (uint32_t seed = 0; seed < 4; ++seed) {
    all.push_back(random_shape(seed));
  }
  return all;
}

struct NamedParallel {
  const char* name;
  Parallel parallel;
};

std::vector<NamedParallel> schedules_on_one_thread() {
  const auto in_order = [](int64_t tasks, const std::function<void(int64_t)>& task) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
  };
  const auto reversed = [](int64_t tasks, const std::function<void(int64_t)>& task) {
    for (int64_t i = tasks; i-- > 0;) task(i);
  };
  const auto shuffled = [](int64_t tasks, const std::function<void(int64_t)>& task) {
    std::vector<int64_t> order(static_cast<size_t>(tasks));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    for (const int64_t i : order) task(i);
  };
  return {{"in order", in_order}, {"reversed", reversed}, {"shuffled", shuffled}};
}

void check_cutting(const Shape& shape, int64_t threads, const NamedParallel& schedule) {
  std::mt19937 random(1);
  MarkedBatch batch;
  for (const int64_t count : shape) {
    batch.add(count, kAllDTypes[random() % kDTypes], kAllDTypes[random() % kDTypes]);
  }
  fastopt::run(batch.jobs(), kMarking, threads, schedule.parallel);
  try {
    batch.check_every_element_visited_once();
  } catch (const std::exception& error) {
    throw std::runtime_error(text(threads, " threads, ", schedule.name, ": ", error.what()));
  }
}

void test_cutting_visits_every_element_once() {
  for (const Shape& shape : shapes()) {
    for (const int64_t threads : {1, 2, 7, 61}) {
      for (const NamedParallel& schedule : schedules_on_one_thread()) {
        check_cutting(shape, threads, schedule);
      }
    }
  }
}

void test_threads_visit_every_element_once() {
  for (const Shape& shape : shapes()) {
    for (const int64_t threads : {2, 5}) {
      check_cutting(shape, threads, {"one thread a task", run_on_std_threads});
    }
  }
}

void test_no_more_tasks_than_threads() {
  for (const Shape& shape : shapes()) {
    for (const int64_t threads : {1, 2, 5}) {
      MarkedBatch batch;
      for (const int64_t count : shape) {
        batch.add(count, DType::Float32, DType::BFloat16);
      }
      int64_t calls = 0;
      fastopt::run(batch.jobs(), kMarking, threads, [&](int64_t tasks, const std::function<void(int64_t)>& task) {
        calls += 1;
        check(threads > 1, "one thread was allowed, and others were asked for");
        check(tasks >= 1 && tasks <= threads, tasks, " tasks for ", threads, " threads");
        for (int64_t i = 0; i < tasks; ++i) task(i);
      });
      check(calls <= 1, "one batch was split ", calls, " times");
      batch.check_every_element_visited_once();
    }
  }
}

void test_a_large_tensor_is_shared_among_threads() {
  MarkedBatch batch;
  batch.add(3'000'000, DType::Float32, DType::BFloat16);
  static std::atomic<int64_t> largest_piece;
  largest_piece = 0;
  Kernels watching = kMarking;
  for (Kernels::Table& table : watching.tables) {
    table[static_cast<size_t>(DType::Float32)][static_cast<size_t>(DType::BFloat16)] = [](const void* src, void* dst,
                                                                                          int64_t count) {
      largest_piece = std::max(largest_piece.load(), count);
      mark<4, 2>(src, dst, count);
    };
  }
  const auto in_order = schedules_on_one_thread().front().parallel;
  fastopt::run(batch.jobs(), watching, 4, in_order);
  batch.check_every_element_visited_once();
  check(largest_piece <= 3'000'000 / 4 + 64, "one thread was left ", largest_piece.load(), " of 3,000,000 elements");
}

void test_what_would_not_stay_in_the_cache_streams_past_it() {
  const auto in_order = schedules_on_one_thread().front().parallel;
  constexpr int64_t kLarge = 20 << 20;
  const Buffer memory(kLarge);
  const auto run = [&](const std::vector<int64_t>& counts) {
    std::vector<Job> jobs;
    for (const int64_t count : counts) {
      jobs.push_back({memory.data(), memory.data(), count, DType::Byte, DType::Byte});
    }
    cached_bytes = streamed_bytes = 0;
    fastopt::run(jobs, kCountingBytes, 3, in_order);
  };
  run({kLarge, 100, 5000});
  check(streamed_bytes == kLarge + 5000, "streamed ", streamed_bytes.load());
  check(cached_bytes == 100, "cached ", cached_bytes.load());
  run({1 << 20, 100, 5000});
  check(streamed_bytes == 0, "a small batch streamed ", streamed_bytes.load());
  run(std::vector<int64_t>(kLarge / 1000, 1000));
  check(streamed_bytes == 0, "small jobs streamed ", streamed_bytes.load());
}

}  // namespace

std::span<const Test> cutting_tests() {
  static constexpr std::array kTests{
      TEST(test_cutting_visits_every_element_once),
      TEST(test_threads_visit_every_element_once),
      TEST(test_no_more_tasks_than_threads),
      TEST(test_a_large_tensor_is_shared_among_threads),
      TEST(test_what_would_not_stay_in_the_cache_streams_past_it),
  };
  return kTests;
}

}  // namespace core_test
