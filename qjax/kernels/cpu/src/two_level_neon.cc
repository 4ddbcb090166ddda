// Weights of two levels on ARM: rows of the weight become int8 numbers, 16 codes by one instruction, in the order of the
// activations; what is left is the product of a weight of 8 bits, by whatever instructions that is computed.
#include "two_level.h"

#if defined(QJAX_HAS_NEON)
#include <arm_neon.h>

#include <cstring>

namespace qjax {
namespace {

void numbers_of_row(const TwoLevel& t, int64_t n, int8_t* row) {
  const Dot& d = t.dot;
  const int64_t phases = d.phases();
  const uint8_t* w = d.w + n * d.row_bytes;
  const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>((1 << d.bits) - 1));
  int64_t g = -1;
  int8x16_t table = vdupq_n_s8(0);
  for (int64_t b = 0; b < d.chunks() * kChunk; b += 16) {
    if (t.group_of(b) != g) {
      g = t.group_of(b);
      int8_t numbers[16];
      for (int u = 0; u < 16; u++) numbers[u] = t.number(u, n, g);
      table = vld1q_s8(numbers);
    }
    uint8_t tail[16] = {};
    const uint8_t* at = w + b;
    if (d.row_bytes - b < 16) {  // nothing is read behind the end
      if (d.row_bytes > b) std::memcpy(tail, at, static_cast<size_t>(d.row_bytes - b));
      at = tail;
    }
    const uint8x16_t v = vld1q_u8(at);
    int8_t* out = row + b / kChunk * phases * kChunk + b % kChunk;
    for (int64_t p = 0; p < phases; p++) {
      const uint8x16_t u = vandq_u8(vshlq_u8(v, vdupq_n_s8(static_cast<int8_t>(-p * d.bits))), mask);
      vst1q_s8(out + p * kChunk, vqtbl1q_s8(table, u));
    }
  }
}

}  // namespace

void two_level_neon(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch, int isa) {
  const int64_t length = t.dot.q_stride();
  for (int64_t n = n0; n < n1; n++) numbers_of_row(t, n, reinterpret_cast<int8_t*>(scratch) + (n - n0) * length);
  Dot d = t.dot;
  d.bits = 8;
  d.k = d.group = d.row_bytes = length;
  d.flip = 0x80;  // signed, and so zero is still 128
  d.w = reinterpret_cast<const uint8_t*>(scratch);
  d.scale += n0 * d.scale_n;
  d.y += n0;
  panel_arm(d, 0, n1 - n0, isa);
}

}  // namespace qjax
#endif
