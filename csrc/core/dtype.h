// Element types the kernels know, and the types that stand for them in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastopt {

// Byte stands for any dtype that is moved without a cast; a job counts it in bytes.
enum class DType : uint8_t { Float32, BFloat16, Float16, Float64, Byte };
inline constexpr size_t kDTypes = 5;

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) {
  constexpr int64_t sizes[kDTypes] = {4, 2, 2, 8, 1};
  return sizes[static_cast<size_t>(dtype)];
}

}  // namespace fastopt
