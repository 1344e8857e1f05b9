// Kernels for x86-64 with AVX2 and F16C (Haswell, Zen and newer).
#if defined(__x86_64__)

#include <immintrin.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#include "cast_loop.h"

namespace fastopt {
namespace {

struct EightLanes {
  static constexpr int64_t kWidth = 8;

  template <class T>
  static __m256 load(const char* from);

  template <class T>
  static void store(char* to, __m256 lanes);
};

inline const __m128i* as_m128(const char* at) {
  return reinterpret_cast<const __m128i*>(at);
}

inline __m128i* as_m128(char* at) {
  return reinterpret_cast<__m128i*>(at);
}

template <>
__m256 EightLanes::load<float>(const char* from) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
}

template <>
__m256 EightLanes::load<bfloat16>(const char* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(as_m128(from))), 16));
}

template <>
__m256 EightLanes::load<float16>(const char* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(as_m128(from)));
}

template <>
__m256 EightLanes::load<double>(const char* from) {
  const double* doubles = reinterpret_cast<const double*>(from);
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(doubles + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(doubles)));
}

template <>
void EightLanes::store<float>(char* to, __m256 lanes) {
  _mm256_storeu_ps(reinterpret_cast<float*>(to), lanes);
}

template <>
void EightLanes::store<bfloat16>(char* to, __m256 lanes) {
  const __m256i bits = _mm256_castps_si256(lanes);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(lanes, lanes, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
  _mm_storeu_si128(as_m128(to), _mm256_castsi256_si128(packed));
}

template <>
void EightLanes::store<float16>(char* to, __m256 lanes) {
  _mm_storeu_si128(as_m128(to), _mm256_cvtps_ph(lanes, _MM_FROUND_TO_NEAREST_INT));
}

template <>
void EightLanes::store<double>(char* to, __m256 lanes) {
  double* doubles = reinterpret_cast<double*>(to);
  _mm256_storeu_pd(doubles, _mm256_cvtps_pd(_mm256_castps256_ps128(lanes)));
  _mm256_storeu_pd(doubles + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1)));
}

}  // namespace

constexpr Kernels kAvx2Kernels = make_kernels<EightLanes>("avx2");

}  // namespace fastopt

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
