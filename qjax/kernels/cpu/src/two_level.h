// Products with weights of two levels, of which a row is int8 numbers under one scale:
//
//   y[m, n] = (sum over k of w[n, k] * q[m, k]) * sx[m] * s[n],
//   w[n, k] = (u - zero[n, g]) * step[n, g],  or  u * step[n, g] - zero[n, g] where zeros come after
//
// with u the 2- or 4-bit codes. The sum is one exact integer over the row. Numbers that would leave int8, which a fitted
// weight has none of, wrap around in a byte.
//
// All numbers that a code stands for in one group are a table of 16 bytes, from which vector instructions take 16 or 64 at a
// time, so that codes become int8 numbers in one instruction and the product is that of a weight with one scale a row.
#pragma once
#include "problem.h"

namespace qjax {

struct TwoLevel {
  Dot dot;               // one group; scale [n or 1]; q, qsum [m, 1] and sx as ever
  int64_t group;         // codes that share a step
  bool after;            // whether zeros come after
  const int8_t* step;
  int64_t step_n, step_g;
  const uint8_t* zeros;
  int64_t zeros_n, zeros_g;

  int64_t groups() const { return dot.k == 0 ? 0 : (dot.k + group - 1) / group; }
  int64_t group_bytes() const { return groups() > 1 ? group * dot.bits / 8 : dot.row_bytes; }
  int32_t step_at(int64_t n, int64_t g) const { return step[n * step_n + g * step_g]; }
  int32_t zero_at(int64_t n, int64_t g) const { return zeros[n * zeros_n + g * zeros_g]; }
  int8_t number(int32_t u, int64_t n, int64_t g) const {
    const int32_t wide = after ? u * step_at(n, g) - zero_at(n, g) : (u - zero_at(n, g)) * step_at(n, g);
    return static_cast<int8_t>(static_cast<uint8_t>(wide));
  }
  // The group of 16 bytes from `at`, where groups are made of them.
  int64_t group_of(int64_t at) const {
    const int64_t g = at / group_bytes();
    return g < groups() ? g : groups() - 1;
  }
};

// Sets up the product of int8 numbers that is left: a zero point of 128, as if they were unsigned.
inline void as_one_group(Dot& d) {
  d.group = d.k > 0 ? d.k : 1;
  d.flip = 0;
  d.zero = 128;
  d.zeros = nullptr;
}

// Whether groups are whole runs of 16 bytes, as the vector kernels have it; the portable one takes all.
inline bool regular(const TwoLevel& t) { return t.groups() <= 1 || t.group_bytes() % 16 == 0; }

int best_isa(const TwoLevel& t);

// Everything: y from q. `scratch` has scratch_bytes(t.dot) for each worker, aligned to 64 bytes.
void run_two_level(const TwoLevel& t, int isa, const Pool& pool, char* scratch);

// Rows [n0, n1) of the weight, at most a panel, by an instruction set.
void two_level_portable(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch);
#if defined(__x86_64__)
void two_level_avx2(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch);
void two_level_avx512(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch, bool amx);
#elif defined(QJAX_HAS_NEON)
void two_level_neon(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch, int isa);
#endif

}  // namespace qjax
