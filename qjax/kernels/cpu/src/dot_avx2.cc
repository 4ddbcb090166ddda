// The product with AVX2, of which no instruction adds four products of bytes.
#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define QJAX_256 __attribute__((target("avx2")))
#define QJAX_INLINE256 static inline __attribute__((always_inline, target("avx2")))

namespace qjax {
namespace {

// Four neighbouring products in each lane of 32 bits. Products of codes of 8 bits are too large for the instruction that
// adds two in 16 bits, and are widened first.
template <int kBits>
QJAX_INLINE256 __m256i products(__m256i u, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (kBits < 8) return _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), ones);
  const __m256i even = _mm256_set1_epi16(0xff);
  const __m256i u0 = _mm256_and_si256(u, even), u1 = _mm256_srli_epi16(u, 8);
  const __m256i x0 = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x1 = _mm256_srai_epi16(x, 8);
  return _mm256_add_epi32(_mm256_madd_epi16(u0, x0), _mm256_madd_epi16(u1, x1));
}

template <int kBits>
QJAX_INLINE256 __m256i accumulate(__m256i sums, __m256i u, __m256i x) {
  return _mm256_add_epi32(sums, products<kBits>(u, x));
}

}  // namespace
}  // namespace qjax

#include "rows256.h"

namespace qjax {

void panel_avx2(const Dot& d, int64_t n0, int64_t n1) { panel_256(d, n0, n1); }

}  // namespace qjax
#endif
