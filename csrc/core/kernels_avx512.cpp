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

struct Lanes {
  __m512 low;
  __m512 high;
};

template <Store kStore>
void put(char* to, __m512i bits) {
  kStore == Store::Streaming ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits)
                             : _mm512_storeu_si512(to, bits);
}

inline __m256i load_sixteen_halves(const char* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The upper half of each lane is the value rounded to bfloat16. With masks and the permutation below it takes half the
// instructions of shifts and narrowing, which shows: fetching ahead leaves few cycles to spare.
inline __m512i rounded(__m512 lanes) {
  const __m512i bits = _mm512_castps_si512(lanes);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i sum = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
  const __mmask16 nan = _mm512_cmp_ps_mask(lanes, lanes, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
}

// The upper halves of all lanes, in order.
inline __m512i upper_halves(__m512i low, __m512i high) {
  alignas(64) static constexpr auto kOdd = [] {
    std::array<uint16_t, 32> places{};
    for (size_t i = 0; i < places.size(); ++i) {
      places[i] = static_cast<uint16_t>(2 * i + 1);
    }
    return places;
  }();
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kOdd.data()), high);
}

// Two registers, so that a store of 16-bit elements fills a whole cache line.
struct ThirtyTwoLanes {
  static constexpr int64_t kWidth = 32;

  template <class T>
  static Lanes load(const char* from) {
    return {load_sixteen<T>(from), load_sixteen<T>(from + 16 * sizeof(T))};
  }

  template <class T>
  static __m512 load_sixteen(const char* from);

  template <class T, Store kStore>
  static void store(char* to, Lanes lanes) {
    if constexpr (std::is_same_v<T, float>) {
      put<kStore>(to, _mm512_castps_si512(lanes.low));
      put<kStore>(to + 64, _mm512_castps_si512(lanes.high));
    } else if constexpr (std::is_same_v<T, bfloat16>) {
      put<kStore>(to, upper_halves(rounded(lanes.low), rounded(lanes.high)));
    } else if constexpr (std::is_same_v<T, float16>) {
      const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(lanes.low, _MM_FROUND_TO_NEAREST_INT));
      put<kStore>(to, _mm512_inserti64x4(low, _mm512_cvtps_ph(lanes.high, _MM_FROUND_TO_NEAREST_INT), 1));
    } else {
      static_assert(std::is_same_v<T, double>);
      store_sixteen_doubles<kStore>(to, lanes.low);
      store_sixteen_doubles<kStore>(to + 128, lanes.high);
    }
  }

  template <Store kStore>
  static void store_sixteen_doubles(char* to, __m512 lanes) {
    put<kStore>(to, _mm512_castpd_si512(_mm512_cvtps_pd(_mm512_castps512_ps256(lanes))));
    put<kStore>(to + 64, _mm512_castpd_si512(_mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1))));
  }

  static void stream_line(const char* from, char* to) { put<Store::Streaming>(to, _mm512_loadu_si512(from)); }

  static void fence() { _mm_sfence(); }

  // Which lanes have seen only ordinary values, as that of AVX2.
  template <class Src, class Dst, bool kSettled>
  class Watch {
   public:
    explicit Watch(float largest_error) : tolerated_(_mm512_set1_ps(std::min(largest_error, kTolerated))) {}

    void see(const Lanes& lanes) {
      low_ = see_sixteen(lanes.low, low_);
      high_ = see_sixteen(lanes.high, high_);
    }

    bool saw_only_ordinary() const { return (low_ & high_) == kAll; }

   private:
    static constexpr __mmask16 kAll = 0xffff;

    // The lanes of `ordinary` that still are.
    __mmask16 see_sixteen(__m512 before, __mmask16 ordinary) const {
      constexpr int kNotFinite = 0x99;
      if constexpr (kExact<Src, Dst>) {
        return _kandn_mask16(_mm512_fpclass_ps_mask(before, kNotFinite), ordinary);
      } else if constexpr (kSettled) {
        // less one, zero is the largest of all without a sign, and negative with one
        constexpr auto kNormal = std::bit_cast<int>(kSmallestNormal<Dst, float>);
        constexpr auto kInfinite = std::bit_cast<int>(kRoundsToInfinity<Dst>);
        const __m512i less_one = _mm512_sub_epi32(_mm512_castps_si512(_mm512_abs_ps(before)), _mm512_set1_epi32(1));
        ordinary = _mm512_mask_cmpge_epu32_mask(ordinary, less_one, _mm512_set1_epi32(kNormal - 1));
        return _mm512_mask_cmplt_epi32_mask(ordinary, less_one, _mm512_set1_epi32(kInfinite - 1));
      } else {
        const __m512 size = _mm512_abs_ps(before);
        const __m512 error = _mm512_abs_ps(_mm512_sub_ps(before, result(before)));
        ordinary = _mm512_mask_cmp_ps_mask(ordinary, error, _mm512_mul_ps(size, tolerated_), _CMP_LE_OQ);
        if constexpr (kNarrowsRange<Src, Dst>) {
          constexpr auto kNormal = std::bit_cast<int>(kSmallestNormal<Dst, float>);
          const __m512i less_one = _mm512_sub_epi32(_mm512_castps_si512(size), _mm512_set1_epi32(1));
          ordinary = _mm512_mask_cmpge_epu32_mask(ordinary, less_one, _mm512_set1_epi32(kNormal - 1));
        }
        return ordinary;
      }
    }

    static __m512 result(__m512 before) {
      if constexpr (std::is_same_v<Dst, bfloat16>) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        return _mm512_castsi512_ps(_mm512_and_si512(rounded(before), upper));
      } else if constexpr (std::is_same_v<Dst, float16>) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(before, _MM_FROUND_TO_NEAREST_INT));
      } else {
        return before;
      }
    }

    __m512 tolerated_;
    __mmask16 low_ = kAll;
    __mmask16 high_ = kAll;
  };
};

template <>
__m512 ThirtyTwoLanes::load_sixteen<float>(const char* from) {
  return _mm512_loadu_ps(from);
}

template <>
__m512 ThirtyTwoLanes::load_sixteen<bfloat16>(const char* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_sixteen_halves(from)), 16));
}

template <>
__m512 ThirtyTwoLanes::load_sixteen<float16>(const char* from) {
  return _mm512_cvtph_ps(load_sixteen_halves(from));
}

template <>
__m512 ThirtyTwoLanes::load_sixteen<double>(const char* from) {
  const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(from));
  const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(from + 64));
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

}  // namespace

constexpr Kernels kAvx512Kernels = make_kernels<ThirtyTwoLanes>("avx512");

}  // namespace fastopt

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
