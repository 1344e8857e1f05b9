// Kernels for x86-64 with AVX2 and F16C (Haswell, Zen and newer).
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "cast_loop.h"

namespace fastopt {
namespace {

struct Lanes {
  __m256 low;
  __m256 high;
};

inline __m128i load_eight_halves(const char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

template <Store kStore>
void put(char* to, __m256i bits) {
  auto* at = reinterpret_cast<__m256i*>(to);
  kStore == Store::Streaming ? _mm256_stream_si256(at, bits) : _mm256_storeu_si256(at, bits);
}

// The upper half of each lane is the value rounded to bfloat16, if that is no NaN.
inline __m256i rounding_sum(__m256 lanes) {
  const __m256i bits = _mm256_castps_si256(lanes);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// Rounded to bfloat16, in the lower half of each lane.
inline __m256i rounded(__m256 lanes) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(rounding_sum(lanes), 16), _mm256_set1_epi32(0x7fc0), nan);
}

// Two registers, so that a store of 16-bit elements fills a whole one as well.
struct SixteenLanes {
  static constexpr int64_t kWidth = 16;

  template <class T>
  static Lanes load(const char* from) {
    return {load_eight<T>(from), load_eight<T>(from + 8 * sizeof(T))};
  }

  template <class T>
  static __m256 load_eight(const char* from);

  template <class T, Store kStore>
  static void store(char* to, Lanes lanes) {
    if constexpr (std::is_same_v<T, float>) {
      put<kStore>(to, _mm256_castps_si256(lanes.low));
      put<kStore>(to + 32, _mm256_castps_si256(lanes.high));
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      const __m256i packed = _mm256_packus_epi32(rounded(lanes.low), rounded(lanes.high));
      put<kStore>(to, _mm256_permute4x64_epi64(packed, 0xd8));
    } else if constexpr (std::is_same_v<T, float16>) {
      put<kStore>(to, _mm256_set_m128i(_mm256_cvtps_ph(lanes.high, _MM_FROUND_TO_NEAREST_INT),
                                       _mm256_cvtps_ph(lanes.low, _MM_FROUND_TO_NEAREST_INT)));
    } else {
      static_assert(std::is_same_v<T, double>);
      store_eight_doubles<kStore>(to, lanes.low);
      store_eight_doubles<kStore>(to + 64, lanes.high);
    }
  }

  template <Store kStore>
  static void store_eight_doubles(char* to, __m256 lanes) {
    put<kStore>(to, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_castps256_ps128(lanes))));
    put<kStore>(to + 32, _mm256_castpd_si256(_mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1))));
  }

  static void stream_line(const char* from, char* to) {
    const auto* line = reinterpret_cast<const __m256i*>(from);
    put<Store::Streaming>(to, _mm256_loadu_si256(line));
    put<Store::Streaming>(to + 32, _mm256_loadu_si256(line + 1));
  }

  static void fence() { _mm_sfence(); }

  // The largest magnitude of results, the smallest of values less one bit, unsigned, so that zero is the largest, and
  // whether an error was larger than a given one.
  template <class Src, class Dst>
  class Watch {
   public:
    explicit Watch(float largest_error) : largest_error_(_mm256_set1_ps(largest_error)) {}

    void see(const Lanes& lanes) {
      see_eight(lanes.low);
      see_eight(lanes.high);
    }

    bool saw_only_ordinary() const {
      const __m256i largest_finite = _mm256_set1_epi32(static_cast<int>(kInfinity<float>) - 1);
      __m256i odd = _mm256_cmpgt_epi32(largest_, largest_finite);
      if constexpr (!kExact<Src, Dst>) {
        const __m256i below_normal = _mm256_set1_epi32(std::bit_cast<int>(kSmallestNormal<Dst, float>) - 1);
        const __m256i is_normal = _mm256_cmpeq_epi32(_mm256_max_epu32(smallest_, below_normal), smallest_);
        odd = _mm256_or_si256(odd, _mm256_castps_si256(worse_));
        odd = _mm256_or_si256(odd, _mm256_xor_si256(is_normal, _mm256_set1_epi32(-1)));
      }
      return _mm256_movemask_epi8(odd) == 0;
    }

   private:
    void see_eight(__m256 before) {
      const __m256 after = result(before);
      largest_ = _mm256_max_epi32(largest_, _mm256_castps_si256(magnitude(after)));
      if constexpr (!kExact<Src, Dst>) {
        const __m256 size = magnitude(before);
        smallest_ = _mm256_min_epu32(smallest_, _mm256_add_epi32(_mm256_castps_si256(size), _mm256_set1_epi32(-1)));
        const __m256 limit = _mm256_mul_ps(size, largest_error_);
        const __m256 error = magnitude(_mm256_sub_ps(before, after));
        worse_ = _mm256_or_ps(worse_, _mm256_cmp_ps(error, limit, _CMP_GT_OQ));
      }
    }

    // What the cast makes of them; a NaN may become an infinity or zero, which are as little ordinary.
    static __m256 result(__m256 before) {
      if constexpr (std::is_same_v<Dst, bfloat16>) {
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        return _mm256_castsi256_ps(_mm256_and_si256(rounding_sum(before), upper));
      } else if constexpr (std::is_same_v<Dst, float16>) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(before, _MM_FROUND_TO_NEAREST_INT));
      } else {
        return before;
      }
    }

    static __m256 magnitude(__m256 lanes) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), lanes); }

    __m256 largest_error_;
    __m256i largest_ = _mm256_setzero_si256();
    __m256i smallest_ = _mm256_set1_epi32(-1);
    __m256 worse_ = _mm256_setzero_ps();
  };
};

template <>
__m256 SixteenLanes::load_eight<float>(const char* from) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
}

template <>
__m256 SixteenLanes::load_eight<bfloat16>(const char* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight_halves(from)), 16));
}

template <>
__m256 SixteenLanes::load_eight<float16>(const char* from) {
  return _mm256_cvtph_ps(load_eight_halves(from));
}

template <>
__m256 SixteenLanes::load_eight<double>(const char* from) {
  const double* doubles = reinterpret_cast<const double*>(from);
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(doubles + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(doubles)));
}

}  // namespace

constexpr Kernels kAvx2Kernels = make_kernels<SixteenLanes>("avx2");

}  // namespace fastopt

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
