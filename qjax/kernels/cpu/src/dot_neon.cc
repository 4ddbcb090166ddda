// The product with the vector instructions that every 64-bit ARM processor has.
#include "problem.h"

#if defined(QJAX_HAS_NEON)
#include <arm_neon.h>

#define QJAX_128
#define QJAX_INLINE128 static inline __attribute__((always_inline))

namespace qjax {
namespace {

// Two products of 8 bits leave room in 16 bits for no more than one; of fewer bits there is room for both.
template <int kBits>
QJAX_INLINE128 int32x4_t accumulate(int32x4_t sums, int8x16_t u, int8x16_t x) {
  const int16x8_t low = vmull_s8(vget_low_s8(u), vget_low_s8(x));
  if (kBits < 8) return vpadalq_s16(sums, vmlal_high_s8(low, u, x));
  return vpadalq_s16(vpadalq_s16(sums, low), vmull_high_s8(u, x));
}

}  // namespace
}  // namespace qjax

#include "rows128.h"

namespace qjax {

void panel_neon(const Dot& d, int64_t n0, int64_t n1) { panel_128<4, Lanes>(d, n0, n1); }

}  // namespace qjax
#endif
