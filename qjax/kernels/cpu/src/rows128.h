// The product with 128-bit vectors of ARM: lanes are columns, four rows of the weight by several of activations, the weight
// read as it lies. Included once for each instruction set, which says QJAX_128 and QJAX_INLINE128, the targets of functions,
// and `accumulate<bits>(sums, u, x)`, which adds products of 16 signed bytes to four lanes, four to each, in any order.
//
// Codes of 8 bits are made signed by subtracting 128, and so are their zero points: the difference of both is the same.
#include <arm_neon.h>

#include <cstring>

namespace qjax {
namespace {

// Integer sums of kRows rows of activations with four rows of the weight.
template <int kRows>
struct Lanes {
  static constexpr int rows = kRows;
  int32x4_t of[kRows][4];
};

template <int kBits>
QJAX_INLINE128 int8x16_t phase_of(uint8x16_t bytes, int p) {
  uint8x16_t u = bytes;
  if (kBits == 4 && p == 1) u = vshrq_n_u8(bytes, 4);
  if (kBits == 2 && p == 1) u = vshrq_n_u8(bytes, 2);
  if (kBits == 2 && p == 2) u = vshrq_n_u8(bytes, 4);
  if (kBits == 2 && p == 3) u = vshrq_n_u8(bytes, 6);
  if (p < 8 / kBits - 1) u = vandq_u8(u, vdupq_n_u8((1 << kBits) - 1));  // behind the last there is nothing else
  return vreinterpretq_s8_u8(u);
}

// 16 bytes of each row of the weight, and what they meet, of which the first row has phase 0 at q.
template <int kBits, int kRows>
QJAX_INLINE128 void step(Lanes<kRows>& sums, const uint8_t* const at[4], uint8x16_t flip, const int8_t* q,
                         int64_t stride) {
  uint8x16_t w[4];
  for (int i = 0; i < 4; i++) w[i] = veorq_u8(vld1q_u8(at[i]), flip);
  for (int p = 0; p < 8 / kBits; p++) {
    int8x16_t u[4];
    for (int i = 0; i < 4; i++) u[i] = phase_of<kBits>(w[i], p);
    for (int r = 0; r < kRows; r++) {
      const int8x16_t x = vld1q_s8(q + r * stride + p * kChunk);
      for (int i = 0; i < 4; i++) sums.of[r][i] = accumulate<kBits>(sums.of[r][i], u[i], x);
    }
  }
}

template <int kRows>
QJAX_INLINE128 void clear(Lanes<kRows>& sums) {
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < 4; i++) sums.of[r][i] = vdupq_n_s32(0);
}

// Of each row of activations the sums with the four rows of the weight.
template <int kRows>
QJAX_INLINE128 void totals(const Lanes<kRows>& sums, int32x4_t out[kRows]) {
  for (int r = 0; r < kRows; r++)
    out[r] = vpaddq_s32(vpaddq_s32(sums.of[r][0], sums.of[r][1]), vpaddq_s32(sums.of[r][2], sums.of[r][3]));
}

// Where the activations stand that meet byte b of a row first.
template <int kBits>
QJAX_INLINE128 uint64_t met_by(int64_t b) {
  const uint64_t byte = static_cast<uint64_t>(b);
  return byte / kChunk * (8 / kBits * kChunk) + byte % kChunk;
}

// Rows of activations from m on, as many as Sums has, by rows n0 .. n0 + 3 of the weight, those below n1.
template <int kBits, class Sums>
QJAX_128 void tile(const Dot& d, int64_t m, int64_t n0, int64_t n1) {
  constexpr int kRows = Sums::rows, kLess = kBits == 8 ? 128 : 0;
  const int64_t groups = d.groups(), bytes = groups == 1 ? d.row_bytes : d.group_bytes(), stride = d.q_stride();
  const uint8x16_t flip = vdupq_n_u8(static_cast<uint8_t>(d.flip ^ kLess));
  const int8_t* q = d.q + m * stride;
  int64_t row[4];
  for (int i = 0; i < 4; i++) row[i] = n0 + i < n1 ? n0 + i : n1 - 1;
  float32x4_t total[kRows];
  for (int r = 0; r < kRows; r++) total[r] = vdupq_n_f32(0.0f);
  for (int64_t g = 0; g < groups; g++) {
    Sums sums;
    clear(sums);
    const uint8_t* at[4];
    for (int i = 0; i < 4; i++) at[i] = d.w + row[i] * d.row_bytes + g * bytes;
    const int64_t end = (g + 1) * bytes < d.row_bytes ? (g + 1) * bytes : d.row_bytes;
    int64_t b = g * bytes;
    for (; b + 16 <= end; b += 16) {
      step<kBits>(sums, at, flip, q + met_by<kBits>(b), stride);
      for (int i = 0; i < 4; i++) at[i] += 16;
    }
    if (b < end) {  // nothing is read behind the end; whatever stands there meets zeros
      uint8_t tail[4][16] = {};
      const uint8_t* const copied[4] = {tail[0], tail[1], tail[2], tail[3]};
      for (int i = 0; i < 4; i++) std::memcpy(tail[i], at[i], static_cast<size_t>(end - b));
      step<kBits>(sums, copied, flip, q + met_by<kBits>(b), stride);
    }
    float scale[4];
    uint32_t zero[4];  // unsigned: wraps around
    for (int i = 0; i < 4; i++) {
      scale[i] = d.scale_at(row[i], g);
      zero[i] = static_cast<uint32_t>(d.zero_at(row[i], g) - kLess);
    }
    const float32x4_t s = vld1q_f32(scale);
    const uint32x4_t z = vld1q_u32(zero);
    int32x4_t sum[kRows];
    totals(sums, sum);
    for (int r = 0; r < kRows; r++) {
      const uint32x4_t moved = vmulq_u32(z, vdupq_n_u32(static_cast<uint32_t>(d.qsum[(m + r) * groups + g])));
      const uint32x4_t exact = vsubq_u32(vreinterpretq_u32_s32(sum[r]), moved);
      const float32x4_t number = vcvtq_f32_s32(vreinterpretq_s32_u32(exact));
      if (groups == 1)
        total[r] = vmulq_f32(vmulq_f32(number, vdupq_n_f32(d.sx[m + r])), s);
      else
        total[r] = vaddq_f32(total[r], vmulq_f32(number, s));
    }
  }
  for (int r = 0; r < kRows; r++) {
    if (groups > 1) total[r] = vmulq_f32(total[r], vdupq_n_f32(d.sx[m + r]));
    float y[4];
    vst1q_f32(y, total[r]);
    std::memcpy(d.y + (m + r) * d.n + n0, y, static_cast<size_t>(n1 - n0 < 4 ? n1 - n0 : 4) * sizeof(float));
  }
}

template <int kBits, class Sums>
QJAX_128 void tiles(const Dot& d, int64_t m, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += 4) tile<kBits, Sums>(d, m, n, n1);
}

// All rows of activations, kMost at a time and those left by `Many`, one alone by `Lanes`.
template <int kBits, int kMost, template <int> class Many>
QJAX_128 void panel_bits(const Dot& d, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + kMost <= d.m; m += kMost) tiles<kBits, Many<kMost>>(d, m, n0, n1);
  for (; m + 4 <= d.m; m += 4) tiles<kBits, Many<4>>(d, m, n0, n1);
  for (; m + 2 <= d.m; m += 2) tiles<kBits, Many<2>>(d, m, n0, n1);
  if (m < d.m) tiles<kBits, Lanes<1>>(d, m, n0, n1);
}

template <int kMost, template <int> class Many>
QJAX_128 void panel_128(const Dot& d, int64_t n0, int64_t n1) {
  switch (d.bits) {
    case 8:
      return panel_bits<8, kMost, Many>(d, n0, n1);
    case 4:
      return panel_bits<4, kMost, Many>(d, n0, n1);
    default:
      return panel_bits<2, kMost, Many>(d, n0, n1);
  }
}

}  // namespace
}  // namespace qjax
