// Pieces that the kernels with 512-bit vectors share. Plain C: what is inlined here must not exist elsewhere without
// these instructions.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "problem.h"

#define QJAX_TARGET512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define QJAX_512 __attribute__((target(QJAX_TARGET512)))
#define QJAX_INLINE512 static inline __attribute__((always_inline, target(QJAX_TARGET512)))

namespace qjax {

// A panel of the weight, laid out for many rows of activations.
//
//   laid   [blocks][chunks][phases][16][16 rows][4] codes, a vector of 64 bytes for four columns of 16 rows
//   scale  [groups][64], zero [groups][64]
struct Panel {
  uint8_t* laid;
  float* scale;
  int32_t* zero;
  float* tile;    // sums of a tile
  int32_t* sums;  // integer sums of a tile
};

QJAX_INLINE512 Panel panel_in(char* scratch, const Dot& d) {
  Panel p;
  p.laid = reinterpret_cast<uint8_t*>(scratch);
  p.scale = reinterpret_cast<float*>(scratch + kPanel * d.q_stride());
  p.zero = reinterpret_cast<int32_t*>(p.scale + kPanel * (d.groups() + 1));
  p.tile = reinterpret_cast<float*>(p.zero + kPanel * (d.groups() + 1));
  p.sums = reinterpret_cast<int32_t*>(p.tile + 4096);
  return p;
}

// Rows and columns of 16 x 16 words change places.
QJAX_INLINE512 void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4 i + j] has, in its four quarters, columns j, 4 + j, 8 + j, 12 + j of rows 4 i .. 4 i + 3.
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
  }
}

// 16 rows of bytes side by side: words of 32 bits, [words in whole chunks][16 rows].
QJAX_512 static inline void lay_out_words(const uint8_t* w, int64_t row_bytes, const int64_t row[16], uint32_t* laid) {
  for (int64_t from = 0; from < row_bytes; from += kChunk) {
    const int64_t left = row_bytes - from;
    const __mmask64 there = left >= kChunk ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi8(there, w + row[i] * row_bytes + from);
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_store_si512(laid + (from / 4 + i) * 16, r[i]);
  }
}

// The bytes of a chunk that a row has.
QJAX_INLINE512 __mmask64 bytes_of(const Dot& d, int64_t chunk) {
  const int64_t left = d.row_bytes - chunk * kChunk;
  return left >= kChunk ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
}

template <int kBits>
QJAX_INLINE512 __m512i phase_of(__m512i bytes, int p) {
  if (kBits == 8) return bytes;
  return _mm512_and_si512(_mm512_srli_epi16(bytes, p * kBits), _mm512_set1_epi8((1 << kBits) - 1));
}

// Scales and zero points of rows [n0, n1).
QJAX_512 static inline void scales_of_panel(const Dot& d, int64_t n0, int64_t n1, const Panel& panel) {
  const int64_t blocks = (n1 - n0 + kBlock - 1) / kBlock, groups = d.groups();
  for (int64_t i = 0; i < blocks * kBlock; i++) {
    const int64_t n = n0 + i < n1 ? n0 + i : n1 - 1;
    for (int64_t g = 0; g < groups; g++) {
      panel.scale[g * kPanel + i] = d.scale_at(n, g);
      panel.zero[g * kPanel + i] = d.zero_at(n, g);
    }
  }
}

// Lays out rows [n0, n1), with `minus` subtracted from every code; rows that are not there repeat the last one.
template <int kBits>
QJAX_512 static void lay_out(const Dot& d, int64_t n0, int64_t n1, int8_t minus, const Panel& panel) {
  constexpr int kPhases = 8 / kBits;
  const int64_t chunks = d.chunks(), blocks = (n1 - n0 + kBlock - 1) / kBlock;
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(d.flip)), less = _mm512_set1_epi8(minus);
  for (int64_t b = 0; b < blocks; b++) {
    for (int64_t c = 0; c < chunks; c++) {
      const __mmask64 there = bytes_of(d, c);
      __m512i r[16];
      for (int i = 0; i < 16; i++) {
        const int64_t n = n0 + b * kBlock + i;
        const uint8_t* row = d.w + (n < n1 ? n : n1 - 1) * d.row_bytes + c * kChunk;
        r[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, row), flip);
      }
      transpose16(r);
      uint8_t* out = panel.laid + (b * chunks + c) * kPhases * 1024;
      for (int p = 0; p < kPhases; p++)
        for (int i = 0; i < 16; i++)
          _mm512_store_si512(out + p * 1024 + i * 64, _mm512_sub_epi8(phase_of<kBits>(r[i], p), less));
    }
  }
  scales_of_panel(d, n0, n1, panel);
}

// The runs of vectors of a block that group g covers: `count` runs of `length`, from `first` in steps of 16.
struct Runs {
  int64_t first, count, length;
};

QJAX_INLINE512 Runs runs_of(const Dot& d, int64_t g) {
  const int64_t phases = d.phases(), vectors = d.chunks() * phases * 16;
  if (d.groups() == 1) return {0, 1, vectors};
  const int64_t bytes = d.group_bytes();
  if (bytes % kChunk == 0) {
    const int64_t first = g * (bytes / kChunk) * phases * 16, length = bytes / kChunk * phases * 16;
    return {first, 1, first + length < vectors ? length : vectors - first};
  }
  const int64_t start = g * bytes, chunk = start / kChunk;
  return {chunk * phases * 16 + start % kChunk / 4, phases, bytes / 4};
}

// All rows of activations by a panel that is laid out: unsigned codes, or int8 numbers with AMX.
void tiles_avx512(const Dot& d, const Panel& panel, int64_t n0, int64_t n1);
#if defined(QJAX_HAS_AMX)
void tiles_amx(const Dot& d, const Panel& panel, int64_t n0, int64_t n1);
#endif

}  // namespace qjax
#endif
