// Products of many rows of floats with integer weights, by tiles of bfloat16 (float_tiles_amx.cc).
//
//   y[m, n] = sum over k of (u[n, k] - z[n, g]) * s[n, g] * x[m, k]
//
// Codes less zero points are integers of at most 8 bits and a sign: bfloat16 holds them exactly. A float is cut in `parts`
// numbers of 8 bits of significand that add up to it: three for float32, two for float16, one for bfloat16. So every
// product is exact, and only their sums are rounded, in float32, in an order that depends on k and groups alone.
#pragma once
#include "problem.h"

namespace qjax {

constexpr int64_t kTileRows = 16;      // of activations, of outputs
constexpr int64_t kTileColumns = 32;   // that one instruction sums over
constexpr int64_t kSegment = 512;      // columns that are summed before a scale where a row has one
constexpr int64_t kRowsAtOnce = 256;   // of activations, cut in parts and laid out before they are multiplied
constexpr int64_t kNear = 1 << 20;     // bytes of activations that stay in the second cache while outputs pass

struct FloatTiles {
  Dot dot;          // q, qsum and sx are not used
  const float* x;   // [m, k]
  int64_t parts;    // 1 to 3

  int64_t steps() const { return (dot.k + kTileColumns - 1) / kTileColumns; }
  int64_t segment() const { return dot.groups() == 1 ? kSegment : dot.group; }
  int64_t segments() const { return (dot.k + segment() - 1) / segment(); }
  // Segments that are multiplied while their activations are near.
  int64_t segments_at_once() const {
    const int64_t rows = dot.m < kRowsAtOnce ? dot.m : kRowsAtOnce, fit = kNear / (rows * segment() * parts * 2);
    return fit < 1 ? 1 : fit > segments() ? segments() : fit;
  }
  // Bytes of activations laid out, and of scratch memory for each worker.
  int64_t laid_bytes() const {
    const int64_t rows = dot.m < kRowsAtOnce ? dot.m : kRowsAtOnce;
    return (rows + kTileRows - 1) / kTileRows * steps() * parts * kTileRows * kTileColumns * 2;
  }
  int64_t scratch_bytes() const {
    const int64_t segments = segments_at_once();
    return segments * segment() * 2 * kTileRows * 2 + segments * 2 * kTileRows * 4 + 4 * kTileRows * kTileRows * 4;
  }
};

// Whether this processor has tiles, and products of bfloat16 in them.
bool has_bf16_tiles();

// Whether groups end with tiles.
bool fits_tiles(const Dot& dot);

// `laid` has laid_bytes(), `scratch` scratch_bytes() for each worker, both aligned to 64 bytes.
void run_float_tiles(const FloatTiles& product, const Pool& pool, char* laid, char* scratch);

}  // namespace qjax
