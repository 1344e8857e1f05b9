// Tests of csrc/core by itself. Every buffer is a heap block of exactly the bytes it needs, so that a sanitizer sees
// the first byte too far; `tests/test_core.py` compiles this with AddressSanitizer and with ThreadSanitizer, and runs
// it.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "cpu_target.h"
#include "dtype.h"
#include "kernels.h"
#include "run.h"
#include "slab.h"

namespace {

using fastopt::CastFn;
using fastopt::DType;
using fastopt::Job;
using fastopt::kDTypes;
using fastopt::Kernels;
using fastopt::Parallel;
using fastopt::size_of;

constexpr std::array<DType, kDTypes> kAllDTypes{DType::Float32, DType::BFloat16, DType::Float16, DType::Float64,
                                                DType::Byte};
constexpr std::array<const char*, kDTypes> kNames{"float32", "bfloat16", "float16", "float64", "byte"};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    throw std::runtime_error(text(parts...));
  }
}

const char* name_of(DType dtype) {
  return kNames[static_cast<size_t>(dtype)];
}

// A heap block of exactly `offset + bytes` bytes, of which the last `bytes` are used.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t offset = 0)
      : block_(new char[static_cast<size_t>(offset + bytes)]()), offset_(offset) {}

  char* data() const { return block_.get() + offset_; }

 private:
  std::unique_ptr<char[]> block_;
  int64_t offset_;
};

uint64_t load_bits(const char* at, int64_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(size));
  return bits;
}

void store_bits(char* at, int64_t size, uint64_t bits) {
  std::memcpy(at, &bits, static_cast<size_t>(size));
}

// ---- Cutting: kernels that count instead of casting ----

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

constexpr Kernels kMarking{"marking",
                           {marks_from<4>(), marks_from<2>(), marks_from<2>(), marks_from<8>(), marks_from<1>()}};

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

void run_on_std_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  std::vector<std::jthread> threads;
  for (int64_t i = 0; i < tasks; ++i) {
    threads.emplace_back(task, i);
  }
}

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
  watching.table[static_cast<size_t>(DType::Float32)][static_cast<size_t>(DType::BFloat16)] =
      [](const void* src, void* dst, int64_t count) {
        largest_piece = std::max(largest_piece.load(), count);
        mark<4, 2>(src, dst, count);
      };
  const auto in_order = schedules_on_one_thread().front().parallel;
  fastopt::run(batch.jobs(), watching, 4, in_order);
  batch.check_every_element_visited_once();
  check(largest_piece <= 3'000'000 / 4 + 64, "one thread was left ", largest_piece.load(), " of 3,000,000 elements");
}

// ---- Kernels, held to rounding by arithmetic rather than by bits ----

struct Format {
  int fraction_bits;
  int smallest_exponent;  // of a normal number, as in 2^e
  double largest;
};

constexpr Format kFloat16Format{10, -14, 65504.0};
const Format kBFloat16Format{7, -126, std::ldexp(255.0, 120)};

// The nearest number of the format, ties to even; infinity where that is beyond the largest.
double rounded(double value, const Format& format) {
  if (value == 0 || !std::isfinite(value)) {
    return value;
  }
  const int exponent = std::max(std::ilogb(value), format.smallest_exponent);
  const double unit = std::ldexp(1.0, exponent - format.fraction_bits);
  const double nearest = std::nearbyint(value / unit) * unit;
  return std::abs(nearest) > format.largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : nearest;
}

double float16_value(uint64_t bits) {
  const auto fraction = static_cast<double>(bits & 0x3ff);
  const auto exponent = static_cast<int>(bits >> 10 & 0x1f);
  double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
  if (exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return bits >> 15 ? -magnitude : magnitude;
}

double value_of(const char* at, DType dtype) {
  const uint64_t bits = load_bits(at, size_of(dtype));
  switch (dtype) {
    case DType::Float32:
      return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    case DType::BFloat16:
      return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
    case DType::Float16:
      return float16_value(bits);
    case DType::Float64:
      return std::bit_cast<double>(bits);
    case DType::Byte:
      break;
  }
  throw std::logic_error("a byte has no value");
}

// Note [Rounding] of csrc/core: through float32.
double expected_value(double value, DType dtype) {
  const auto single = static_cast<double>(static_cast<float>(value));
  switch (dtype) {
    case DType::BFloat16:
      return rounded(single, kBFloat16Format);
    case DType::Float16:
      return rounded(single, kFloat16Format);
    default:
      return single;
  }
}

bool same_value(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Bits around every rounding boundary: for a 16-bit dtype all there are.
std::vector<uint64_t> hard_bits(DType dtype) {
  std::vector<uint64_t> all;
  if (size_of(dtype) <= 2) {
    for (uint64_t bits = 0; bits < (1u << (8 * size_of(dtype))); ++bits) {
      all.push_back(bits);
    }
    return all;
  }
  const int fraction_bits = dtype == DType::Float32 ? 23 : 52;
  const uint64_t exponents = dtype == DType::Float32 ? 1 << 9 : 1 << 12;  // with the sign above
  const uint64_t fraction_mask = (uint64_t{1} << fraction_bits) - 1;
  for (uint64_t exponent = 0; exponent < exponents; ++exponent) {
    for (const int tie : {0, 11, fraction_bits - 14, fraction_bits - 11, fraction_bits - 8, fraction_bits - 1}) {
      for (const uint64_t above : {uint64_t{0}, uint64_t{1}, fraction_mask}) {
        for (const uint64_t by : {~uint64_t{0}, uint64_t{0}, uint64_t{1}}) {
          const uint64_t fraction = (above << (tie + 1)) + (uint64_t{1} << tie) + by;
          all.push_back(exponent << fraction_bits | (fraction & fraction_mask));
        }
      }
    }
  }
  return all;
}

// Casts `bits` by one call of the kernel between exact buffers that start at the given offsets.
void check_cast(const Kernels& kernels, DType src, DType dst, const uint64_t* bits, int64_t count, int64_t src_offset,
                int64_t dst_offset) {
  const Buffer from(count * size_of(src), src_offset);
  const Buffer to(count * size_of(dst), dst_offset);
  for (int64_t i = 0; i < count; ++i) {
    store_bits(from.data() + i * size_of(src), size_of(src), bits[i]);
  }
  kernels.find(src, dst)(from.data(), to.data(), count);
  for (int64_t i = 0; i < count; ++i) {
    const char* result = to.data() + i * size_of(dst);
    if (src == DType::Byte) {
      check(load_bits(result, 1) == bits[i], kernels.target, ": byte ", i, " of ", count, " was not moved");
      continue;
    }
    const double value = value_of(from.data() + i * size_of(src), src);
    const double expected = expected_value(value, dst);
    const double actual = value_of(result, dst);
    check(same_value(actual, expected), kernels.target, ": ", name_of(src), " ", value, " became ", name_of(dst), " ",
          actual, " instead of ", expected, " (element ", i, " of ", count, ")");
  }
}

template <class Visit>
void for_each_kernel(Visit visit) {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    for (const DType src : kAllDTypes) {
      for (const DType dst : kAllDTypes) {
        if (fastopt::kernels().find(src, dst) != nullptr) {
          visit(fastopt::kernels(), src, dst);
        }
      }
    }
  }
}

void test_kernels_round_hard_values() {
  for_each_kernel([](const Kernels& kernels, DType src, DType dst) {
    const std::vector<uint64_t> bits = hard_bits(src);
    check_cast(kernels, src, dst, bits.data(), static_cast<int64_t>(bits.size()), 0, 0);
  });
}

void test_kernels_stay_within_any_size_at_any_alignment() {
  std::mt19937 random(3);
  for_each_kernel([&](const Kernels& kernels, DType src, DType dst) {
    const std::vector<uint64_t> bits = hard_bits(src);
    for (int64_t count = 0; count <= 70; ++count) {
      for (int64_t shift = 0; shift < 16; ++shift) {
        const size_t start = random() % (bits.size() - 70);
        check_cast(kernels, src, dst, bits.data() + start, count, shift, shift * 5 % 16);
      }
    }
  });
}

void test_an_empty_tensor_may_have_no_memory() {
  for_each_kernel([](const Kernels& kernels, DType src, DType dst) { kernels.find(src, dst)(nullptr, nullptr, 0); });
}

void test_kernels_exist_where_the_table_says() {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    for (const DType src : kAllDTypes) {
      for (const DType dst : kAllDTypes) {
        const bool moved = src == DType::Byte && dst == DType::Byte;
        const bool cast = src != dst && src != DType::Byte && dst != DType::Byte;
        check((fastopt::kernels().find(src, dst) != nullptr) == (moved || cast), target, ": ", name_of(src), " to ",
              name_of(dst));
      }
    }
  }
}

// ---- Slabs ----

struct Filled {
  fastopt::Piece piece;
  size_t bytes;
  unsigned char content;
};

// Pieces of all sizes, each filled to its last byte; the arena is gone when this returns, and they are not.
std::vector<Filled> filled_pieces(size_t number) {
  fastopt::SlabArena arena;
  std::mt19937 random(5);
  std::vector<Filled> all;
  for (size_t i = 0; i < number; ++i) {
    const size_t bytes = i % 50 == 0 ? fastopt::SlabArena::kLargestPiece : 1 + random() % 3'000;
    all.push_back({arena.take(bytes), bytes, static_cast<unsigned char>(i % 251)});
    std::memset(all.back().piece.data, all.back().content, bytes);
  }
  return all;
}

void check_content(const Filled& filled) {
  const auto* bytes = static_cast<const unsigned char*>(filled.piece.data);
  check(reinterpret_cast<uintptr_t>(bytes) % 64 == 0, "a piece is not aligned to 64 bytes");
  for (size_t i = 0; i < filled.bytes; ++i) {
    check(bytes[i] == filled.content, "byte ", i, " of a piece of ", filled.bytes, " was overwritten");
  }
}

void test_pieces_share_no_byte_and_outlive_their_arena() {
  std::vector<Filled> all = filled_pieces(3'000);
  std::shuffle(all.begin(), all.end(), std::mt19937(2));
  while (!all.empty()) {
    check_content(all.back());
    fastopt::release(all.back().piece.owner);
    all.pop_back();
  }
}

void test_pieces_are_released_on_many_threads() {
  const std::vector<Filled> all = filled_pieces(2'000);
  run_on_std_threads(4, [&](int64_t thread) {
    for (size_t i = static_cast<size_t>(thread); i < all.size(); i += 4) {
      static_cast<unsigned char*>(all[i].piece.data)[0] += 1;
      fastopt::release(all[i].piece.owner);
    }
  });
}

void test_an_arena_that_gave_nothing_takes_nothing() {
  const fastopt::SlabArena unused;
  fastopt::SlabArena kept_by_nobody;
  fastopt::release(kept_by_nobody.take(1).owner);
}

// ---- The choice of target ----

void test_every_target_can_be_chosen() {
  const std::vector<std::string> targets = fastopt::cpu_targets();
  check(!targets.empty() && targets.back() == "portable", "every machine runs the portable kernels");
  for (const std::string& target : targets) {
    fastopt::use_cpu_target(target);
    check(fastopt::kernels().target == target, "chose ", target, ", got ", fastopt::kernels().target);
  }
}

void test_an_unknown_target_is_refused() {
  const std::string before = fastopt::kernels().target;
  for (const char* wrong : {"", "nonsense", "AVX2", "portable "}) {
    std::string message;
    try {
      fastopt::use_cpu_target(wrong);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    check(message.find(text("'", wrong, "'")) != std::string::npos, "'", wrong, "' went through, or: ", message);
    for (const std::string& target : fastopt::cpu_targets()) {
      check(message.find(target) != std::string::npos, target, " is missing in: ", message);
    }
    check(fastopt::kernels().target == before, "a refused target changed the choice");
  }
}

struct Test {
  const char* name;
  void (*body)();
};

#define TEST(function)  \
  Test {                \
    #function, function \
  }

constexpr std::array kTests{
    TEST(test_cutting_visits_every_element_once),
    TEST(test_threads_visit_every_element_once),
    TEST(test_no_more_tasks_than_threads),
    TEST(test_a_large_tensor_is_shared_among_threads),
    TEST(test_kernels_round_hard_values),
    TEST(test_kernels_stay_within_any_size_at_any_alignment),
    TEST(test_an_empty_tensor_may_have_no_memory),
    TEST(test_kernels_exist_where_the_table_says),
    TEST(test_pieces_share_no_byte_and_outlive_their_arena),
    TEST(test_pieces_are_released_on_many_threads),
    TEST(test_an_arena_that_gave_nothing_takes_nothing),
    TEST(test_every_target_can_be_chosen),
    TEST(test_an_unknown_target_is_refused),
};

}  // namespace

// The tests whose names hold the argument, or all of them.
int main(int count, char** arguments) {
  const std::string_view part = count > 1 ? arguments[1] : "";
  int failures = 0;
  for (const Test& test : kTests) {
    if (std::string_view(test.name).find(part) == std::string_view::npos) {
      continue;
    }
    try {
      test.body();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAILED  %s: %s\n", test.name, error.what());
    }
  }
  return failures == 0 ? 0 : 1;
}
