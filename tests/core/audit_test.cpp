// What a job does besides the cast: audits, held to what the kernels make of each value, and sources that go.
#include "audit.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core_test.h"
#include "cpu_target.h"
#include "dtype.h"
#include "huge_pages.h"
#include "kernels.h"
#include "run.h"

namespace core_test {
namespace {

using fastopt::Audit;
using fastopt::DType;
using fastopt::Job;
using fastopt::Kernels;
using fastopt::Store;

constexpr int64_t kValues = 300'000;
constexpr int64_t kPeriod = 1009;  // values of the first so many are odd ones, the others ordinary

void fill(char* at, int64_t count) {
  const std::array<float, 8> odd{
      0.0f,  1e-30f,    -1e30f, std::bit_cast<float>(0x7fffffffu), std::numeric_limits<float>::infinity(),
      1e-5f, -70000.0f, 1e-40f};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = i % kPeriod;
    const float value = place < 8 ? odd[static_cast<size_t>(place)] : 1.0f + static_cast<float>(place) / 4096.0f;
    std::memcpy(at + i * 4, &value, 4);
  }
}

// One value after the other, by the kernels' own results.
Audit expected(const char* src, int64_t count, const Kernels& kernels, DType to = DType::Float16) {
  const float smallest_normal = to == DType::Float16 ? 0x1p-14f : 0x1p-126f;
  Audit audit;
  for (int64_t i = 0; i < count; ++i) {
    float before;
    float after;
    uint16_t half;
    std::memcpy(&before, src + i * 4, 4);
    kernels.find(DType::Float32, to)(&before, &half, 1);
    kernels.find(to, DType::Float32)(&half, &after, 1);
    audit.values += 1;
    audit.nan += std::isnan(before);
    audit.inf += std::isinf(before);
    audit.overflowed += std::isfinite(before) && std::isinf(after);
    audit.underflowed += before != 0 && after == 0;
    audit.subnormal += after != 0 && std::abs(after) < smallest_normal && std::abs(before) >= 0x1p-126f;
    if (std::isfinite(before) && std::isfinite(after) && after != 0) {
      audit.largest_error = std::max(audit.largest_error, static_cast<double>(std::abs((before - after) / before)));
    }
  }
  return audit;
}

void check_same(const Audit& actual, const Audit& wanted, const std::string& target) {
  const auto is = [&](const char* name, auto one, auto other) {
    check(one == other, target, ": ", name, " is ", one, " and not ", other);
  };
  is("values", actual.values, wanted.values);
  is("overflowed", actual.overflowed, wanted.overflowed);
  is("underflowed", actual.underflowed, wanted.underflowed);
  is("subnormal", actual.subnormal, wanted.subnormal);
  is("nan", actual.nan, wanted.nan);
  is("inf", actual.inf, wanted.inf);
  check(std::abs(actual.largest_error - wanted.largest_error) <= 1e-6 * wanted.largest_error, target, ": error ",
        actual.largest_error);
}

void in_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < tasks; ++i) {
    threads.emplace_back(task, i);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

void test_threads_audit_every_value_once() {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    const Kernels& kernels = fastopt::kernels();
    const Buffer src(4 * kValues, /*offset=*/3);
    const Buffer dst(2 * kValues);
    fill(src.data(), kValues);
    const int64_t first = 100'001;
    Audit audit;
    const std::array jobs{
        Job{src.data(), dst.data(), first, DType::Float32, DType::Float16, &audit},
        Job{src.data() + 4 * first, dst.data() + 2 * first, kValues - first, DType::Float32, DType::Float16, &audit}};
    fastopt::run(jobs, kernels, 4, in_threads);
    check_same(audit, expected(src.data(), kValues, kernels), target);
  }
}

// NaNs of such bits that rounding them as numbers gives zero; CUDA makes no others.
void test_a_lone_nan_is_found_wherever_it_is() {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    for (const DType to : {DType::BFloat16, DType::Float16, DType::Float64}) {
      for (int64_t place = 0; place < 1100; place += place < 70 || place > 1000 ? 1 : 61) {
        const Buffer src(4 * 1100);
        const Buffer dst(8 * 1100);
        for (int64_t i = 0; i < 1100; ++i) {
          const uint32_t bits = i == place ? 0x7fffffffu : std::bit_cast<uint32_t>(1.0f);
          std::memcpy(src.data() + 4 * i, &bits, 4);
        }
        for (const double largest_error : {0.0, 0.25}) {  // before and after Note [Settled]
          Audit audit;
          audit.largest_error = largest_error;
          fastopt::kernels().find_audited(DType::Float32, to)(src.data(), dst.data(), 1100, audit);
          check(audit.nan == 1, target, ": found ", audit.nan, " NaNs, where one is at ", place);
        }
      }
    }
  }
}

// Values on both sides of each bound, alone among ordinary ones, before and after Note [Settled].
void test_a_lone_value_is_counted_on_the_right_side_of_each_bound() {
  constexpr int64_t kCount = 256;
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> bounds{0x1p-14f,
                            0x1p-24f,
                            0x1p-25f,
                            65504.0f,
                            65520.0f,
                            0x1p-126f,
                            0x1p-133f,
                            0x1p-134f,
                            0x1p-149f,
                            0.0f,
                            infinity,
                            1.0f,
                            std::bit_cast<float>(0x7f7f8000u)};
  bounds.push_back(1.0f + 0x1p-11f);  // halfway, and so the largest errors
  bounds.push_back(1.0f + 0x1p-8f);
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    const Kernels& kernels = fastopt::kernels();
    for (const DType to : {DType::BFloat16, DType::Float16}) {
      for (const float bound : bounds) {
        for (const float value : {std::nextafter(bound, 0.0f), bound, std::nextafter(bound, infinity), -bound}) {
          const Buffer src(4 * kCount);
          const Buffer dst(2 * kCount);
          for (int64_t i = 0; i < kCount; ++i) {
            const float other = i == 77 ? value : 1.0f;
            std::memcpy(src.data() + 4 * i, &other, 4);
          }
          const Audit wanted = expected(src.data(), kCount, kernels, to);
          for (const double largest_error : {0.0, 0x1p-11, 0x1p-8, 0.5}) {
            Audit audit;
            audit.largest_error = largest_error;
            kernels.find_audited(DType::Float32, to)(src.data(), dst.data(), kCount, audit);
            Audit all = wanted;
            all.largest_error = std::max(wanted.largest_error, largest_error);
            check_same(audit, all, target);
          }
        }
      }
    }
  }
}

void check_few(const Audit& audit, const char* src, int64_t count, const Kernels& kernels, const std::string& target) {
  if (count > 8) {
    check_same(audit, expected(src, count, kernels), target);
  }
  check(audit.values == count, target, ": ", audit.values, " of ", count);
}

// Which NaN a NaN becomes is not specified.
bool same_halves(const char* one, const char* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint16_t a;
    uint16_t b;
    std::memcpy(&a, one + 2 * i, 2);
    std::memcpy(&b, other + 2 * i, 2);
    const bool both_nan = (a & 0x7fff) > 0x7c00 && (b & 0x7fff) > 0x7c00;
    if (a != b && !both_nan) {
      return false;
    }
  }
  return true;
}

void test_an_audit_of_few_values_reads_no_byte_too_many() {
  for (const std::string& target : fastopt::cpu_targets()) {
    fastopt::use_cpu_target(target);
    const Kernels& kernels = fastopt::kernels();
    for (int64_t count = 1; count < 70; ++count) {
      const Buffer src(4 * count, /*offset=*/1);
      fill(src.data(), count);
      for (const Store store : {Store::Cached, Store::Streaming}) {
        const Buffer dst(2 * count, /*offset=*/count % 4);
        Audit audit;
        kernels.find_audited(DType::Float32, DType::Float16, store)(src.data(), dst.data(), 0, audit);
        kernels.find_audited(DType::Float32, DType::Float16, store)(src.data(), dst.data(), count, audit);
        check_few(audit, src.data(), count, kernels, target);
        const Buffer plain(2 * count);
        kernels.find(DType::Float32, DType::Float16)(src.data(), plain.data(), count);
        check(same_halves(dst.data(), plain.data(), count), target, ": other results");
      }
    }
  }
}

// Three jobs side by side in one mapping, the middle one given: it is read before it goes, and it goes alone.
void test_what_is_given_is_discarded_and_nothing_beside_it() {
  constexpr int64_t kEach = 6'000'003;
  const Kernels& kernels = fastopt::kernels();
  const fastopt::Mapping source = fastopt::map_huge(4 * 3 * kEach);
  char* src = static_cast<char*>(source.address);
  fill(src, 3 * kEach);
  const Buffer before(4 * 3 * kEach);
  std::memcpy(before.data(), src, 4 * 3 * kEach);
  const Buffer dst(2 * 3 * kEach);
  const Buffer wanted(2 * 3 * kEach);
  kernels.find(DType::Float32, DType::BFloat16)(before.data(), wanted.data(), 3 * kEach);

  std::vector<Job> jobs;
  for (int64_t i = 0; i < 3; ++i) {
    jobs.push_back({src + 4 * kEach * i, dst.data() + 2 * kEach * i, kEach, DType::Float32, DType::BFloat16, nullptr,
                    /*is_given=*/i == 1});
  }
  fastopt::run(jobs, kernels, 4, in_threads);
  check(std::memcmp(dst.data(), wanted.data(), 2 * 3 * kEach) == 0, "other results");
  check(std::memcmp(src, before.data(), 4 * kEach) == 0, "the job before was discarded too");
  check(std::memcmp(src + 8 * kEach, before.data() + 8 * kEach, 4 * kEach) == 0, "the job behind was discarded too");
#if defined(__linux__)
  const int64_t zeros = std::count(src + 4 * kEach, src + 8 * kEach, '\0');
  check(zeros > 4 * kEach * 9 / 10, "of what was given, ", zeros, " bytes are zero");
#endif
  fastopt::unmap(source);
}

}  // namespace

std::span<const Test> audit_tests() {
  static constexpr std::array kTests{
      TEST(test_threads_audit_every_value_once),
      TEST(test_a_lone_nan_is_found_wherever_it_is),
      TEST(test_a_lone_value_is_counted_on_the_right_side_of_each_bound),
      TEST(test_an_audit_of_few_values_reads_no_byte_too_many),
      TEST(test_what_is_given_is_discarded_and_nothing_beside_it),
  };
  return kTests;
}

}  // namespace core_test
