// Products of int8 activations with trit-planes (qjax/formats/trit_planes.py has the order of their bytes):
//
//   y[m, n] = sum over groups g, planes p of (sum over k in g of t[p, n, k] * q[m, k]) * s[p, n, g]  * sx[m]
//
// with trits t of -1, 0 and 1. Inner sums are exact integers; floats are added in the order of groups, planes within them,
// multiplied and added apart: the same bits by every instruction set.
//
// Vector instructions read a row in words of 32 bits, of which a group has whole ones and perhaps two that it shares with
// its neighbours. Out of a word come vectors of bytes, four trits + 1 of one plane; what they meet lies beside them in q, 0
// where it belongs to a neighbour.
#pragma once
#include "problem.h"

namespace qjax {

enum TritStore : int64_t { kBase3 = 0, kTwoBit = 1, kNibble = 2 };

struct Trits {
  Dot dot;          // of 8 bits: sizes, groups, q in natural order, qsum [m, groups], sx, y, row_bytes of the weight
  int64_t planes, store;
  const float* scale;  // [planes, n, groups]
  const int8_t* laid;  // [m, groups, words of a group, slots, 4], for vector instructions

  int64_t row_bytes, run;  // elements of a byte of a plane
  const uint8_t* w;        // [n, row_bytes]

  int64_t columns() const { return store == kNibble ? 8 : 4 / planes * run; }  // of a word; not of three planes
  int64_t slots() const { return store == kBase3 ? (planes == 1 ? 6 : 3) : store == kTwoBit && planes == 1 ? 4 : 2; }
  int64_t words() const { return (dot.group + columns() - 2) / columns() + 1; }  // that a group has at most
  int64_t laid_stride() const { return dot.groups() * words() * slots() * 4; }
  float scale_at(int64_t p, int64_t n, int64_t g) const { return scale[(p * dot.n + n) * dot.groups() + g]; }
  // A trit + 1.
  int32_t digit(int64_t n, int64_t k, int64_t p) const {
    static const int32_t powers[5] = {1, 3, 9, 27, 81};
    const uint8_t* row = w + n * row_bytes;
    if (store == kNibble) {
      const int32_t code = (row[k / 2] >> (4 * (k % 2))) & 15, there = code < 8 ? code : 8;
      return p == 0 ? there / 3 : there % 3;
    }
    const int32_t byte = row[k / run * planes + p];
    if (store == kBase3) return byte / powers[k % 5] % 3;
    return (((byte >> (2 * (k % 4))) & 3) + 1) & 3;
  }
};

// Sets `run` and the bytes of a row; `dot.k` is known.
void describe_trits(Trits& t);

// q in natural order to `laid`; only where there are vector instructions for the planes.
void arrange_trits(const Trits& t, int8_t* laid);

int best_isa(const Trits& t);
int64_t scratch_bytes(const Trits& t);
void run_trits(const Trits& t, int isa, const Pool& pool, char* scratch);

void trits_portable(const Trits& t, int64_t n0, int64_t n1, char* scratch);
#if defined(__x86_64__)
void trits_avx512(const Trits& t, int64_t n0, int64_t n1, char* scratch);
#endif

}  // namespace qjax
