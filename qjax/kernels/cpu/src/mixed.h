// Products of floats with weights of 2-bit and 4-bit strips (qjax/formats/mixed_layout.py has the order of their bytes,
// mixed_scales.py their scales):
//
//   y[m, n] = sum over k of w[n, k] * x[m, k],   w[n, k] = (u - zero) * scale * unit, plus sparse numbers * unit
//
// in float32: a sum for each strip, in the order of columns, then strips in the order in which they are stored, 2-bit ones
// first, then sparse numbers. So every instruction set gives sums that differ by no more than whether products are rounded
// before they are added, and a row of activations does not depend on the others.
#pragma once
#include "problem.h"

namespace qjax {

struct Mixed {
  int64_t m, n, k;
  int64_t strip;          // columns
  int64_t narrow, wide;   // strips of 2 and of 4 bits, those of padding among them
  bool aligned;           // words in quads
  int64_t tile;           // rows that share a second scale of a 2-bit strip
  int64_t per_group;      // 4-bit strips that share a scale
  int32_t scale_bits[3];  // of the scale codes of three 2-bit strips
  int64_t row_bytes;

  const uint8_t* w;             // [n, row_bytes]
  const uint16_t* words;        // [n, triples]: zero points and scale codes
  const uint16_t* tile_scale;   // float16 [tiles, 3 triples]
  const uint16_t* tile_zero;    // [tiles, triples]
  const uint16_t* wide_scale;   // float16 [n, groups]
  const uint8_t* wide_zero;     // [n, ceil(groups / 2)], 4 bits each
  const int32_t* column;        // [narrow + wide]: where the columns of each strip, as they are stored, begin
  float unit;

  int64_t sparse;               // numbers; 0 where there are none
  const uint16_t* value;        // float16
  const void* at;               // their columns, 16 or 32 bits
  bool at_is_long;
  const uint32_t* row;          // [n + 1]: where rows begin

  const float* x;               // [m, strips * strip], zeros behind k
  float* y;                     // [m, n]

  int64_t strips() const { return narrow + wide; }
  int64_t triples() const { return (narrow + 2) / 3; }
  int64_t groups() const { return per_group > 0 ? (wide + per_group - 1) / per_group : 0; }
  int64_t x_stride() const { return strips() * strip; }
  int64_t word() const { return strip / 4; }  // bytes of a 2-bit strip, or of half a 4-bit one
  // The word of a strip as they are stored; the other half of a 4-bit strip j is word strips() + j.
  int64_t word_of(int64_t place) const {
    if (!aligned) return place;
    return place < narrow ? place / 3 * 4 + place % 3 : (place - narrow) * 4 + 3;
  }
};

float from_half(uint16_t bits);

// 2 to an exponent of -126 to 127.
float power_of_two(int32_t exponent);

int best_isa(const Mixed& f);
int64_t scratch_bytes(const Mixed& f);
void run_mixed(const Mixed& f, int isa, const Pool& pool, char* scratch);

// Rows [n0, n1) of the weight without the sparse numbers.
void mixed_portable(const Mixed& f, int64_t n0, int64_t n1);
#if defined(__x86_64__)
void mixed_avx512(const Mixed& f, int64_t n0, int64_t n1, char* scratch);
#endif

}  // namespace qjax
