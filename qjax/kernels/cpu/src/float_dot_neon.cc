// Products with activations that stay floats, with the vector instructions that every 64-bit ARM processor has: lanes are
// columns; codes are moved to the top of a word, and from there to its bottom, which extends signs where there are any.
#include "problem.h"

#if defined(QJAX_HAS_NEON)
#include <arm_neon.h>

#include <cstring>

namespace qjax {
namespace {

// Code j of each word as a float.
template <int kBits>
inline __attribute__((always_inline)) float32x4_t number_of(uint32x4_t words, int j, bool is_signed) {
  const uint32x4_t top = vshlq_u32(words, vdupq_n_s32(32 - kBits * (j + 1)));
  if (is_signed) return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(top), 32 - kBits));
  return vcvtq_f32_u32(vshrq_n_u32(top, 32 - kBits));
}

// kRows rows of activations by one row of the weight.
template <int kBits, int kRows>
void row_of(const FloatDot& f, int64_t m, int64_t n) {
  constexpr int kCodes = 32 / kBits;
  const Dot& d = f.dot;
  const int64_t groups = d.groups(), bytes = groups == 1 ? d.row_bytes : d.group_bytes(), stride = f.x_stride();
  const bool is_signed = d.flip != 0;
  const uint8_t* w = d.w + n * d.row_bytes;
  float32x4_t total[kRows];
  for (int r = 0; r < kRows; r++) total[r] = vdupq_n_f32(0.0f);
  for (int64_t b = 0; b < d.row_bytes; b += 16) {  // of one group
    uint8_t tail[16] = {};
    const uint8_t* at = w + b;
    if (d.row_bytes - b < 16) {  // nothing is read behind the end
      std::memcpy(tail, at, static_cast<size_t>(d.row_bytes - b));
      at = tail;
    }
    const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(at));
    const float* x = f.x + m * stride + b / kChunk * (512 / kBits) + b % kChunk / 4;
    const int64_t g = groups == 1 ? 0 : b / bytes;
    const float scale = d.scale_at(n, g);
    const float32x4_t zero = vdupq_n_f32(d.zeros ? static_cast<float>(d.zero_at(n, g)) : 0.0f);
    float32x4_t sum[kRows];
    for (int r = 0; r < kRows; r++) sum[r] = vdupq_n_f32(0.0f);
    for (int j = 0; j < kCodes; j++) {
      const float32x4_t number = vsubq_f32(number_of<kBits>(words, j, is_signed), zero);
      for (int r = 0; r < kRows; r++) sum[r] = vfmaq_f32(sum[r], number, vld1q_f32(x + r * stride + j * 16));
    }
    for (int r = 0; r < kRows; r++) total[r] = vfmaq_n_f32(total[r], sum[r], scale);
  }
  for (int r = 0; r < kRows; r++) d.y[(m + r) * d.n + n] = vaddvq_f32(total[r]);
}

template <int kBits>
void rows_bits(const FloatDot& f, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n++) {
    int64_t m = 0;
    for (; m + 4 <= f.dot.m; m += 4) row_of<kBits, 4>(f, m, n);
    for (; m + 2 <= f.dot.m; m += 2) row_of<kBits, 2>(f, m, n);
    if (m < f.dot.m) row_of<kBits, 1>(f, m, n);
  }
}

}  // namespace

void float_rows_neon(const FloatDot& f, int64_t n0, int64_t n1) {
  switch (f.dot.bits) {
    case 8:
      return rows_bits<8>(f, n0, n1);
    case 4:
      return rows_bits<4>(f, n0, n1);
    default:
      return rows_bits<2>(f, n0, n1);
  }
}

}  // namespace qjax
#endif
