// Attention of few queries over a cache of integer codes, free of XLA.
//
//   s[r, j] = scale * sum over d of q[r, d] * K[j, d]        K[j, d] = (code - zero_j) * scale_j, likewise V
//   p[r, j] = exp(s[r, j] - max) / sum                       over the positions j that r sees
//   y[r, d] = sum over j of p[r, j] * V[j, d]
//
// for the rows r = (token, query head) of each pair of a sequence and a head of keys. Token t of T stands at position
// lengths[sequence] - T + t and sees those up to its own, of them the last `window`. One that sees none gives zeros, and
// what nobody sees is not read.
//
// Positions are cut in splits of kSplit, whatever the threads: each gives its maximum, its sum and its weighted values,
// which are joined in their order. So the same bits come out whoever computes them; instruction sets differ in rounding.
#pragma once
#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace qjax {

constexpr int64_t kSplit = 256;  // positions that a task looks at
constexpr int64_t kRows = 16;    // rows of queries that it looks at together

enum Number : int { kNone = 0, kF32 = 1, kF16 = 2, kU8 = 3 };

// Keys or values of all sequences and heads. A code of 4 bits is the low or, for odd d, the high half of a byte.
struct Codes {
  int64_t dim, bits, row_bytes;
  bool is_signed;
  const uint8_t* codes;  // [sequences, heads, room, row_bytes]
  const void* scale;     // [sequences, heads, room], float32 or float16
  const void* zero;      // likewise, float32, float16 or uint8, or null
  int scale_type, zero_type;
};

struct Attention {
  int64_t sequences, heads, tokens, group, room;
  float scale;
  const float* q;          // [sequences, heads, tokens, group, k.dim]
  const int32_t* lengths;  // [sequences], taken to lie within 0 and room
  const int32_t* windows;  // [sequences]
  Codes k, v;
  float* y;                // [sequences, heads, tokens, group, v.dim]

  int64_t rows() const { return tokens * group; }
  int64_t length(int64_t sequence) const {
    const int64_t n = lengths[sequence];
    return n < 0 ? 0 : n > room ? room : n;
  }
  // The positions [first, last) that a token sees.
  void seen(int64_t sequence, int64_t token, int64_t* first, int64_t* last) const {
    int64_t end = length(sequence) - tokens + token + 1;
    if (end < 0) end = 0;
    const int64_t window = windows[sequence] > 0 ? windows[sequence] : 0;
    *first = end > window ? end - window : 0;
    *last = end;
  }
};

// Dimensions as vector instructions take them: whole pairs of vectors, at most 32 lanes.
constexpr int64_t kDims = 32;
inline int64_t padded(int64_t dim) { return (dim + kDims - 1) / kDims * kDims; }

// What a split found for kRows rows of one sequence and head: for each a maximum, a sum, and padded(v.dim) numbers in the
// order of the instruction set.
struct Part {
  float* most;
  float* sum;
  float* values;
};

// Where dimension d stands among the numbers that vectors of `lanes` floats hold: for codes of 4 bits, of 2 * lanes in a
// row the even ones in front of the odd ones. Without lanes, and for 8 bits, d.
inline int64_t place_of(int64_t d, int64_t bits, int64_t lanes) {
  if (bits == 8 || lanes == 0) return d;
  const int64_t block = d / (2 * lanes) * 2 * lanes, in = d % (2 * lanes);
  return block + in % 2 * lanes + in / 2;
}

// One task: positions [from, to) within a split, rows [row, row + rows) of one sequence and head.
struct Piece {
  const Attention* a;
  int64_t sequence, head, row, rows, from, to;
  const float* q;     // [rows, padded(k.dim)], laid out, zeros behind
  const float* qsum;  // [rows]
  Part out;
};

void piece_portable(const Piece& piece);
#if defined(__x86_64__)
void piece_avx2(const Piece& piece);
void piece_avx512(const Piece& piece);
#elif defined(QJAX_HAS_NEON)
void piece_neon(const Piece& piece);
#endif

// The instruction set by which attention runs where `isa` is the best or the wanted one.
int attention_isa(int isa);

// Floats of scratch memory.
int64_t attention_scratch(const Attention& a);

// Everything.
void run_attention(const Attention& a, int isa, const Pool& pool, float* scratch);

// Scales or zero points [from, from + count) of a sequence and head as float32.
void numbers_of(const void* data, int type, int64_t from, int64_t count, float* out);

}  // namespace qjax
