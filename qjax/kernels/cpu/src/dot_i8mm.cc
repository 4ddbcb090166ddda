// The product with FEAT_I8MM, of ARM processors since Armv8.6: one instruction multiplies two rows of activations and two
// of the weight, 8 columns of each. One row alone is left to the instruction of FEAT_DotProd, which wastes nothing there.
#include "problem.h"

#if defined(QJAX_HAS_I8MM)
#define QJAX_128 QJAX_TARGET_I8MM
#define QJAX_INLINE128 QJAX_TARGET_I8MM static inline __attribute__((always_inline))

#include "rows128_dotprod.h"

namespace qjax {
namespace {

// Sums of kRows rows of activations with four rows of the weight: two by two, the first of activations with both first.
template <int kRows>
struct Pairs {
  static constexpr int rows = kRows;
  int32x4_t of[kRows / 2][2];
};

// The first and the second 8 bytes of two rows beside one another.
QJAX_INLINE128 uint8x16_t firsts(uint8x16_t a, uint8x16_t b) { return vcombine_u8(vget_low_u8(a), vget_low_u8(b)); }
QJAX_INLINE128 uint8x16_t seconds(uint8x16_t a, uint8x16_t b) { return vcombine_u8(vget_high_u8(a), vget_high_u8(b)); }

template <int kBits, int kRows>
QJAX_INLINE128 void step(Pairs<kRows>& sums, const uint8_t* const at[4], uint8x16_t flip, const int8_t* q,
                         int64_t stride) {
  uint8x16_t w[2][2];
  for (int i = 0; i < 2; i++) {
    const uint8x16_t a = veorq_u8(vld1q_u8(at[2 * i]), flip), b = veorq_u8(vld1q_u8(at[2 * i + 1]), flip);
    w[i][0] = firsts(a, b);
    w[i][1] = seconds(a, b);
  }
  for (int p = 0; p < 8 / kBits; p++) {
    int8x16_t u[2][2];
    for (int i = 0; i < 2; i++)
      for (int h = 0; h < 2; h++) u[i][h] = phase_of<kBits>(w[i][h], p);
    for (int r = 0; r < kRows / 2; r++) {
      const int8_t* x = q + 2 * r * stride + p * kChunk;
      const uint8x16_t a = vreinterpretq_u8_s8(vld1q_s8(x)), b = vreinterpretq_u8_s8(vld1q_s8(x + stride));
      const int8x16_t both[2] = {vreinterpretq_s8_u8(firsts(a, b)), vreinterpretq_s8_u8(seconds(a, b))};
      for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++) sums.of[r][i] = vmmlaq_s32(sums.of[r][i], both[h], u[i][h]);
    }
  }
}

template <int kRows>
QJAX_INLINE128 void clear(Pairs<kRows>& sums) {
  for (int r = 0; r < kRows / 2; r++)
    for (int i = 0; i < 2; i++) sums.of[r][i] = vdupq_n_s32(0);
}

template <int kRows>
QJAX_INLINE128 void totals(const Pairs<kRows>& sums, int32x4_t out[kRows]) {
  for (int r = 0; r < kRows / 2; r++) {
    out[2 * r] = vcombine_s32(vget_low_s32(sums.of[r][0]), vget_low_s32(sums.of[r][1]));
    out[2 * r + 1] = vcombine_s32(vget_high_s32(sums.of[r][0]), vget_high_s32(sums.of[r][1]));
  }
}

}  // namespace

QJAX_128 void panel_i8mm(const Dot& d, int64_t n0, int64_t n1) { panel_128<8, Pairs>(d, n0, n1); }

}  // namespace qjax
#endif
