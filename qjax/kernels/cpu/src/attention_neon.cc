// Attention over a cache with the vector instructions that every 64-bit ARM processor has: 4 lanes.
#include "attention.h"

#if defined(QJAX_HAS_NEON)
#include <arm_neon.h>

#include <cstring>

#define QJAX_FN
#define QJAX_FN_INLINE static inline __attribute__((always_inline))

namespace qjax {
namespace {

using V = float32x4_t;
constexpr int kLanes = 4, kValueRegisters = 16;

QJAX_FN_INLINE V zeros() { return vdupq_n_f32(0.0f); }
QJAX_FN_INLINE V set1(float x) { return vdupq_n_f32(x); }
QJAX_FN_INLINE V load(const float* p) { return vld1q_f32(p); }
QJAX_FN_INLINE void store(float* p, V x) { vst1q_f32(p, x); }
QJAX_FN_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
QJAX_FN_INLINE V sub(V a, V b) { return vsubq_f32(a, b); }
QJAX_FN_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
QJAX_FN_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
QJAX_FN_INLINE V most_of(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
QJAX_FN_INLINE V nearest(V x) { return vrndnq_f32(x); }
QJAX_FN_INLINE float total(V x) { return vaddvq_f32(x); }
QJAX_FN_INLINE float largest(V x) { return vmaxvq_f32(x); }

QJAX_FN_INLINE V power2(V x, V n) {
  // Unsigned, since sums wrap around where there is no number, which nothing is made of.
  const uint32x4_t e = vaddq_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), vdupq_n_u32(127));
  return mul(x, vreinterpretq_f32_u32(vshlq_n_u32(e, 23)));
}

QJAX_FN_INLINE V keep(V x, V other, int64_t from, int64_t to) {
  const int32_t numbers[4] = {0, 1, 2, 3};
  const int32x4_t lane = vld1q_s32(numbers);
  const int32x4_t low = vdupq_n_s32(static_cast<int32_t>(from < 0 ? 0 : from > 4 ? 4 : from));
  const int32x4_t high = vdupq_n_s32(static_cast<int32_t>(to < 0 ? 0 : to > 4 ? 4 : to));
  return vbslq_f32(vandq_u32(vcgeq_s32(lane, low), vcltq_s32(lane, high)), x, other);
}

QJAX_FN_INLINE V sums(const V* r) { return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3])); }

template <int kBits, bool kSigned>
struct Table {};

// Up to `most` bytes, zeros behind those that may be read.
QJAX_FN_INLINE uint8x8_t bytes_at(const uint8_t* at, int64_t left, int64_t most) {
  uint64_t word = 0;
  if (left >= most)
    std::memcpy(&word, at, static_cast<size_t>(most));
  else if (left > 0)
    std::memcpy(&word, at, static_cast<size_t>(left));
  return vcreate_u8(word);
}

template <int kBits, bool kSigned>
QJAX_FN_INLINE void codes(const uint8_t* at, int64_t left, const Table<kBits, kSigned>&, V* out) {
  if (kBits == 8) {
    const uint8x8_t b = bytes_at(at, left, 8);
    if (kSigned) {
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(b));
      out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
      out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)));
    } else {
      const uint16x8_t wide = vmovl_u8(b);
      out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
      out[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide)));
    }
    return;
  }
  const uint32x4_t b = vmovl_u16(vget_low_u16(vmovl_u8(bytes_at(at, left, 4))));
  if (kSigned) {
    out[0] = vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(vshlq_n_u32(b, 28)), 28));
    out[1] = vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(vshlq_n_u32(b, 24)), 28));
  } else {
    out[0] = vcvtq_f32_u32(vandq_u32(b, vdupq_n_u32(15)));
    out[1] = vcvtq_f32_u32(vshrq_n_u32(b, 4));
  }
}

#include "attention_lanes.h"

}  // namespace

void piece_neon(const Piece& piece) { piece_of(piece); }

}  // namespace qjax
#endif
