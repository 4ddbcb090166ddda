// Weights of two levels with AVX2: a row of the weight becomes int8 numbers, then meets every row of activations.
#include "two_level.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QJAX_256 __attribute__((target("avx2")))
#define QJAX_INLINE256 static inline __attribute__((always_inline, target("avx2")))

namespace qjax {
namespace {

// The numbers of one row in the order of the activations.
QJAX_256 void numbers_of_row(const TwoLevel& t, int64_t n, int8_t* row) {
  const Dot& d = t.dot;
  const int64_t phases = d.phases();
  const uint8_t* w = d.w + n * d.row_bytes;
  const __m128i mask = _mm_set1_epi8(static_cast<char>((1 << d.bits) - 1));
  const __m256i codes = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i even = _mm256_set1_epi16(0xff);
  int64_t g = -1;
  __m128i table = _mm_setzero_si128();
  for (int64_t b = 0; b < d.chunks() * kChunk; b += 16) {
    if (t.group_of(b) != g) {
      g = t.group_of(b);
      const __m256i step = _mm256_set1_epi16(static_cast<int16_t>(t.step_at(n, g)));
      const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(t.zero_at(n, g)));
      const __m256i wide = t.after ? _mm256_sub_epi16(_mm256_mullo_epi16(codes, step), zero)
                                   : _mm256_mullo_epi16(_mm256_sub_epi16(codes, zero), step);
      const __m256i low = _mm256_and_si256(wide, even);
      table = _mm_packus_epi16(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    }
    alignas(16) uint8_t tail[16] = {};
    const uint8_t* at = w + b;
    if (d.row_bytes - b < 16) {  // nothing is read behind the end
      for (int64_t i = 0; i < 16; i++) tail[i] = i < d.row_bytes - b ? w[b + i] : 0;
      at = tail;
    }
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    int8_t* out = row + b / kChunk * phases * kChunk + b % kChunk;
    for (int64_t p = 0; p < phases; p++) {
      const __m128i u = _mm_and_si128(_mm_srl_epi16(v, _mm_cvtsi32_si128(static_cast<int>(p * d.bits))), mask);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + p * kChunk), _mm_shuffle_epi8(table, u));
    }
  }
}

QJAX_INLINE256 int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

}  // namespace

QJAX_256 void two_level_avx2(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch) {
  const Dot& d = t.dot;
  const int64_t length = d.q_stride();
  int8_t* row = reinterpret_cast<int8_t*>(scratch);
  for (int64_t n = n0; n < n1; n++) {
    numbers_of_row(t, n, row);
    for (int64_t m = 0; m < d.m; m++) {
      const int8_t* q = d.q + m * length;
      __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int64_t i = 0; i < length; i += 32)
        for (int h = 0; h < 2; h++) {
          const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i + 16 * h)));
          const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i + 16 * h)));
          sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(a, b));
        }
      d.y[m * d.n + n] = static_cast<float>(sum_of(_mm256_add_epi32(sum[0], sum[1]))) * d.sx[m] * d.scale_at(n, 0);
    }
  }
}

}  // namespace qjax
#endif
