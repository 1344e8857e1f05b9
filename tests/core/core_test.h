// What the tests of csrc/core share. Every buffer is a heap block of exactly the bytes it needs, so that a sanitizer
// sees the first byte too far.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dtype.h"

namespace core_test {

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

// ---- Tests ----

struct Test {
  const char* name;
  void (*body)();
};

#define TEST(function)  \
  Test {                \
    #function, function \
  }

// One list a file; main.cpp runs them in the order of the files' names.
std::span<const Test> audit_tests();
std::span<const Test> cpu_target_tests();
std::span<const Test> cutting_tests();
std::span<const Test> file_tests();
std::span<const Test> kernels_tests();
std::span<const Test> launches_tests();
std::span<const Test> ring_tests();
std::span<const Test> slab_tests();
std::span<const Test> torch_zip_tests();
std::span<const Test> transfers_tests();

// ---- Elements and the memory they stand in ----

inline constexpr std::array<fastopt::DType, fastopt::kDTypes> kAllDTypes{
    fastopt::DType::Float32, fastopt::DType::BFloat16, fastopt::DType::Float16, fastopt::DType::Float64,
    fastopt::DType::Byte};

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

inline uint64_t load_bits(const char* at, int64_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(size));
  return bits;
}

inline void store_bits(char* at, int64_t size, uint64_t bits) {
  std::memcpy(at, &bits, static_cast<size_t>(size));
}

// ---- Threads ----

inline void run_on_std_threads(int64_t tasks, const std::function<void(int64_t)>& task) {
  std::vector<std::jthread> threads;
  for (int64_t i = 0; i < tasks; ++i) {
    threads.emplace_back(task, i);
  }
}

}  // namespace core_test
