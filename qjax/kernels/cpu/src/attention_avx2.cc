// Attention over a cache with AVX2 and FMA: 8 lanes.
#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#define QJAX_FN __attribute__((target("avx2,fma")))
#define QJAX_FN_INLINE static inline __attribute__((always_inline, target("avx2,fma")))

namespace qjax {
namespace {

using V = __m256;
constexpr int kLanes = 8, kValueRegisters = 8;

QJAX_FN_INLINE V zeros() { return _mm256_setzero_ps(); }
QJAX_FN_INLINE V set1(float x) { return _mm256_set1_ps(x); }
QJAX_FN_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
QJAX_FN_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
QJAX_FN_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
QJAX_FN_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
QJAX_FN_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
QJAX_FN_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
QJAX_FN_INLINE V most_of(V a, V b) { return _mm256_max_ps(a, b); }
QJAX_FN_INLINE V nearest(V x) { return _mm256_round_ps(x, 8); }

QJAX_FN_INLINE V power2(V x, V n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}

QJAX_FN_INLINE float total(V x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

QJAX_FN_INLINE float largest(V x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

QJAX_FN_INLINE V keep(V x, V other, int64_t from, int64_t to) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const int low = static_cast<int>(from < 0 ? 0 : from > 8 ? 8 : from);
  const int high = static_cast<int>(to < 0 ? 0 : to > 8 ? 8 : to);
  const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                                         _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(in));
}

QJAX_FN_INLINE V sums(const V* r) {
  const V a = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const V b = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

template <int kBits, bool kSigned>
struct Table {};

QJAX_FN_INLINE __m128i bytes8(const uint8_t* at, int64_t left) {
  uint64_t word = 0;
  if (left >= 8)
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  if (left > 0) std::memcpy(&word, at, static_cast<size_t>(left));
  return _mm_cvtsi64_si128(static_cast<long long>(word));
}

template <int kBits, bool kSigned>
QJAX_FN_INLINE void codes(const uint8_t* at, int64_t left, const Table<kBits, kSigned>&, V* out) {
  if (kBits == 8) {
    for (int i = 0; i < 2; i++) {
      const __m128i b = bytes8(at + 8 * i, left - 8 * i);
      out[i] = _mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
    }
    return;
  }
  const __m256i b = _mm256_cvtepu8_epi32(bytes8(at, left));
  __m256i low, high;
  if (kSigned) {
    low = _mm256_srai_epi32(_mm256_slli_epi32(b, 28), 28);
    high = _mm256_srai_epi32(_mm256_slli_epi32(b, 24), 28);
  } else {
    low = _mm256_and_si256(b, _mm256_set1_epi32(15));
    high = _mm256_srli_epi32(b, 4);
  }
  out[0] = _mm256_cvtepi32_ps(low);
  out[1] = _mm256_cvtepi32_ps(high);
}

#include "attention_lanes.h"

}  // namespace

QJAX_FN void piece_avx2(const Piece& piece) { piece_of(piece); }

}  // namespace qjax
#endif
