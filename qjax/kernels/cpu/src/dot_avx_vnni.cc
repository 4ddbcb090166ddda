// The product with AVX-VNNI, of processors without AVX-512 since Alder Lake and Zen 5: one instruction adds four products.
#include "problem.h"

#if defined(QJAX_HAS_AVX_VNNI)
#include <immintrin.h>

#define QJAX_256 __attribute__((target("avx2,avxvnni")))
#define QJAX_INLINE256 static inline __attribute__((always_inline, target("avx2,avxvnni")))

namespace qjax {
namespace {

template <int kBits>
QJAX_INLINE256 __m256i accumulate(__m256i sums, __m256i u, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sums, u, x);
}

}  // namespace
}  // namespace qjax

#include "rows256.h"

namespace qjax {

void panel_avx_vnni(const Dot& d, int64_t n0, int64_t n1) { panel_256(d, n0, n1); }

}  // namespace qjax
#endif
