// What candidate quantizers of an operand cost: squared errors of the products that it enters (qjax/passes/fpcs_losses.py).
//
//   e[m, k] = what candidate c makes of x[m, k], minus it
//   loss[c] = sum over m and p of (sum over k of e[m, k] b[p, k] + rest[m, p])^2            form "product"
//   loss[c] = sum over m and k of (sum over l of e[m, l] b[k, l] + rest[m, k]) e[m, k]      form "quadratic", b is [k, k]
//   loss[c] = sum over m and k of e[m, k]^2                                                 form "own"
//
// e and b are rounded to bfloat16 and their products added in float32, in an order that depends on k alone; sums over rows are
// float32 within a block of 32 rows, and double, in the order of blocks, over all. So every number of threads gives the same
// bits. Nothing is written but 32 rows of e at a time, which stay in the nearest cache.
#pragma once
#include "float_tiles.h"

namespace qjax {

enum Form : int { kProduct = 0, kQuadratic = 1, kOwn = 2 };

constexpr int64_t kRowBlock = 32;

struct Candidates {
  int64_t slices, m, k, p, count;
  int64_t settings;     // rows of `scale` and `other`: slice s has row s % settings, or row m of a slice has row m
  bool by_row;          // whether each row has its own candidates, and its own loss
  int form;
  float top;            // the last code of an even quantizer
  int64_t entries;      // of a table; 0 for an even quantizer

  const float* x;       // [slices, m, k]; logarithms to base 2 where there is a table
  const float* number;  // with a table: [slices, m, k], what the table stands for
  const float* b;       // [slices, p, k]
  const float* rest;    // [slices, m, p]
  // Even: e = (clip(rint(x / scale), -other, top - other) - x / scale) scale.
  // Table: e = table[min(rint(-clip(x - scale, least, 0) * other), entries - 1)] - number.
  const float* scale;   // [settings, count]
  const float* other;   // [settings, count]
  const float* table;   // [count, entries]
  float least;
  float* loss;          // [slices, count], or [slices * m, count] by row

  int64_t k_padded() const { return (k + 31) / 32 * 32; }
  int64_t p_blocks() const { return (p + 15) / 16; }
  int64_t row_blocks() const { return (m + kRowBlock - 1) / kRowBlock; }
  int64_t packed_elements() const { return form == kOwn ? 0 : slices * p_blocks() * 16 * k_padded(); }
  int64_t tasks() const { return slices * row_blocks(); }
  // Bytes for each worker, for all, and for partial sums.
  int64_t scratch_bytes() const { return kRowBlock * k_padded() * 2 + 4 * 1024 * 2; }
};

// For processors that have `has_bf16_tiles`. `packed` has packed_elements() of 2 bytes, `partial` tasks() * count doubles, `scratch` scratch_bytes() for each worker,
// all aligned to 64 bytes.
void run_candidates(const Candidates& problem, const Pool& pool, uint16_t* packed, double* partial, char* scratch);

}  // namespace qjax
