// rows128.h with one instruction that adds four products: for sets of instructions that have FEAT_DotProd. Included once for
// each, which says QJAX_128 and QJAX_INLINE128.
#pragma once
#include <arm_neon.h>

namespace qjax {
namespace {

template <int kBits>
QJAX_INLINE128 int32x4_t accumulate(int32x4_t sums, int8x16_t u, int8x16_t x) {
  return vdotq_s32(sums, u, x);
}

}  // namespace
}  // namespace qjax

#include "rows128.h"
