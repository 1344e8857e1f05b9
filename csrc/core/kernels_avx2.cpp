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

  // Which lanes have seen only ordinary values.
  template <class Src, class Dst, bool kSettled>
  class Watch {
   public:
    explicit Watch(float largest_error) : tolerated_(_mm256_set1_ps(std::min(largest_error, kTolerated))) {}

    void see(const Lanes& lanes) {
      low_ = see_eight(lanes.low, low_);
      high_ = see_eight(lanes.high, high_);
    }

    bool saw_only_ordinary() const { return _mm256_movemask_ps(_mm256_or_ps(low_, high_)) == 0; }

   private:
    // The lanes of `odd`, and those that are now: by their sign bits.
    __m256 see_eight(__m256 before, __m256 odd) const {
      const __m256 size = magnitude(before);
      if constexpr (kExact<Src, Dst>) {
        return _mm256_or_ps(odd,
                            _mm256_cmp_ps(size, _mm256_set1_ps(std::numeric_limits<float>::infinity()), _CMP_NLT_UQ));
      } else if constexpr (kSettled) {
        const __m256i large = _mm256_cmpgt_epi32(_mm256_castps_si256(size),
                                                 _mm256_set1_epi32(std::bit_cast<int>(kRoundsToInfinity<Dst>) - 1));
        return _mm256_or_ps(odd, _mm256_or_ps(_mm256_castsi256_ps(large), below_normal(size)));
      } else {
        const __m256 error = magnitude(_mm256_sub_ps(before, result(before)));
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(error, _mm256_mul_ps(size, tolerated_), _CMP_NLE_UQ));
        if constexpr (kNarrowsRange<Src, Dst>) {
          odd = _mm256_or_ps(odd, below_normal(size));
        }
        return odd;
      }
    }

    // Which are smaller than the smallest normal number, but not zero: zero less one bit is negative, and so is neither
    // between zero and the smallest normal number less one bit.
    static __m256 below_normal(__m256 size) {
      const __m256i less_one = _mm256_add_epi32(_mm256_castps_si256(size), _mm256_set1_epi32(-1));
      const __m256i small =
          _mm256_cmpgt_epi32(_mm256_set1_epi32(std::bit_cast<int>(kSmallestNormal<Dst, float>) - 1), less_one);
      return _mm256_andnot_ps(_mm256_castsi256_ps(less_one), _mm256_castsi256_ps(small));
    }

    // What the cast makes of them; a NaN may become anything.
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

    __m256 tolerated_;
    __m256 low_ = _mm256_setzero_ps();
    __m256 high_ = _mm256_setzero_ps();
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
