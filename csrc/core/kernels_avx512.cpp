// Kernels for x86-64 with AVX-512 F, BW, VL and DQ (Skylake-SP, Zen 4 and newer).
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_*.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c")
#endif

#include "cast_loop.h"

namespace fastopt {
namespace {

template <Store kStore>
void put(char* to, __m512i bits) {
  kStore == Store::Streaming ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits)
                             : _mm512_storeu_si512(to, bits);
}

template <Store kStore>
void put(char* to, __m256i bits) {
  auto* at = reinterpret_cast<__m256i*>(to);
  kStore == Store::Streaming ? _mm256_stream_si256(at, bits) : _mm256_storeu_si256(at, bits);
}

// Rounded to bfloat16, in the lower half of each lane.
inline __m512i rounded(__m512 lanes) {
  const __m512i bits = _mm512_castps_si512(lanes);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
  return _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0x7fc0));
}

struct SixteenLanes {
  static constexpr int64_t kWidth = 16;

  template <class T>
  static __m512 load(const char* from);

  template <class T, Store kStore>
  static void store(char* to, __m512 lanes) {
    if constexpr (std::is_same_v<T, float>) {
      put<kStore>(to, _mm512_castps_si512(lanes));
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      put<kStore>(to, _mm512_cvtepi32_epi16(rounded(lanes)));
    } else if constexpr (std::is_same_v<T, float16>) {
      put<kStore>(to, _mm512_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
    } else {
      static_assert(std::is_same_v<T, double>);
      put<kStore>(to, _mm512_castpd_si512(_mm512_cvtps_pd(_mm512_castps512_ps256(lanes))));
      put<kStore>(to + 64, _mm512_castpd_si512(_mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1))));
    }
  }

  static void stream_line(const char* from, char* to) { put<Store::Streaming>(to, _mm512_loadu_si512(from)); }

  static void fence() { _mm_sfence(); }

  // As that of AVX2.
  template <class Src, class Dst>
  class Watch {
   public:
    explicit Watch(float largest_error) : largest_error_(_mm512_set1_ps(largest_error)) {}

    void see(__m512 before) {
      const __m512 after = result(before);
      largest_ = _mm512_max_epi32(largest_, _mm512_castps_si512(_mm512_abs_ps(after)));
      if constexpr (!kExact<Src, Dst>) {
        const __m512 size = _mm512_abs_ps(before);
        smallest_ = _mm512_min_epu32(smallest_, _mm512_sub_epi32(_mm512_castps_si512(size), _mm512_set1_epi32(1)));
        const __m512 limit = _mm512_mul_ps(size, largest_error_);
        const __m512 error = _mm512_abs_ps(_mm512_sub_ps(before, after));
        worse_ = static_cast<__mmask16>(worse_ | _mm512_cmp_ps_mask(error, limit, _CMP_GT_OQ));
      }
    }

    bool saw_only_ordinary() const {
      constexpr auto kNormal = std::bit_cast<uint32_t>(kSmallestNormal<Dst, float>);
      const bool finite = _mm512_reduce_max_epi32(largest_) < static_cast<int>(kInfinity<float>);
      return finite && (kExact<Src, Dst> || (_mm512_reduce_min_epu32(smallest_) >= kNormal - 1 && worse_ == 0));
    }

   private:
    static __m512 result(__m512 before) {
      if constexpr (std::is_same_v<Dst, bfloat16>) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(rounded(before), 16));
      } else if constexpr (std::is_same_v<Dst, float16>) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(before, _MM_FROUND_TO_NEAREST_INT));
      } else {
        return before;
      }
    }

    __m512 largest_error_;
    __m512i largest_ = _mm512_setzero_si512();
    __m512i smallest_ = _mm512_set1_epi32(-1);
    __mmask16 worse_ = 0;
  };
};

template <>
__m512 SixteenLanes::load<float>(const char* from) {
  return _mm512_loadu_ps(from);
}

template <>
__m512 SixteenLanes::load<bfloat16>(const char* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <>
__m512 SixteenLanes::load<float16>(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <>
__m512 SixteenLanes::load<double>(const char* from) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(from));
  const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(from + 64));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

}  // namespace

constexpr Kernels kAvx512Kernels = make_kernels<SixteenLanes>("avx512");

}  // namespace fastopt

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
