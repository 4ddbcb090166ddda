// Products with activations that stay floats, with AVX-512: lanes are columns; codes become floats by a permutation of a
// table of all numbers that a code stands for, or by conversion where they have 8 bits. What a zero point is subtracted from
// is exact, so that nothing is lost where they are close.
#include "wide.h"

#if defined(__x86_64__)
namespace qjax {
namespace {

// The numbers of a chunk's codes, one vector for each code of a word, before zero points are subtracted.
template <int kBits>
QJAX_INLINE512 void numbers_of(__m512i words, bool is_signed, __m512 table, __m512* out) {
  for (int j = 0; j < 32 / kBits; j++) {
    if (kBits < 8)  // the permutation reads four bits of each word, whatever stands above
      out[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, j * kBits), table);
    else if (is_signed)
      out[j] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * j), 24));
    else
      out[j] = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, 8 * j), _mm512_set1_epi32(255)));
  }
}

// kRows rows of activations by kOutputs rows of the weight.
template <int kBits, int kRows, int kOutputs>
QJAX_512 void block(const FloatDot& f, int64_t m, int64_t n, int64_t outputs) {
  constexpr int kCodes = 32 / kBits;
  const Dot& d = f.dot;
  const int64_t chunks = d.chunks(), groups = d.groups(), bytes = d.group_bytes(), stride = f.x_stride();
  const bool is_signed = d.flip != 0;
  alignas(64) float values[16];
  for (int i = 0; i < 16; i++) {
    const int u = i & ((1 << (kBits < 4 ? kBits : 4)) - 1);
    values[i] = static_cast<float>(is_signed && u >= 1 << (kBits - 1) ? u - (1 << kBits) : u);
  }
  const __m512 table = _mm512_load_ps(values);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i quarters = _mm512_srli_epi32(lane, 2), halves = _mm512_srli_epi32(lane, 3);
  __m512 total[kOutputs][kRows];
  for (int o = 0; o < kOutputs; o++)
    for (int r = 0; r < kRows; r++) total[o][r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < chunks; c++) {
    const __mmask64 there = bytes_of(d, c);
    const float* x = f.x + m * stride + c * (512 / kBits);
    for (int o = 0; o < kOutputs; o++) {
      const int64_t row = n + (o < outputs ? o : outputs - 1);
      const uint8_t* at = d.w + row * d.row_bytes + c * kChunk;
      __m512 w[kCodes], sum[kRows];
      numbers_of<kBits>(_mm512_maskz_loadu_epi8(there, at), is_signed, table, w);
      __m512 scale, zero = _mm512_setzero_ps();
      if (groups == 1 || bytes >= kChunk) {
        const int64_t g = groups == 1 ? 0 : c / (bytes / kChunk);
        scale = _mm512_set1_ps(d.scale_at(row, g));
        if (d.zeros) zero = _mm512_set1_ps(static_cast<float>(d.zero_at(row, g)));
      } else {  // several groups in a chunk, 16 or 32 bytes each: four or eight lanes
        const int64_t in_chunk = kChunk / bytes, width = 16 / in_chunk;
        const int64_t first = c * in_chunk, left = groups - first < in_chunk ? groups - first : in_chunk;
        if (d.scale_g == 1) {
          const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
          scale = _mm512_permutexvar_ps(in_chunk == 4 ? quarters : halves,
                                        _mm512_maskz_loadu_ps(mask, d.scale + row * d.scale_n + first));
        } else {
          scale = _mm512_set1_ps(d.scale_at(row, 0));
        }
        if (d.zeros) {
          alignas(64) float z[16];
          for (int64_t i = 0; i < 16; i++)
            z[i] = static_cast<float>(d.zero_at(row, first + (i / width < left ? i / width : left - 1)));
          zero = _mm512_load_ps(z);
        }
      }
      if (d.zeros)
        for (int j = 0; j < kCodes; j++) w[j] = _mm512_sub_ps(w[j], zero);
      for (int r = 0; r < kRows; r++) {
        sum[r] = _mm512_mul_ps(w[0], _mm512_loadu_ps(x + r * stride));
        for (int j = 1; j < kCodes; j++) sum[r] = _mm512_fmadd_ps(w[j], _mm512_loadu_ps(x + r * stride + j * 16), sum[r]);
        total[o][r] = _mm512_fmadd_ps(sum[r], scale, total[o][r]);
      }
    }
  }
  for (int o = 0; o < kOutputs && o < outputs; o++)
    for (int r = 0; r < kRows; r++) d.y[(m + r) * d.n + n + o] = _mm512_reduce_add_ps(total[o][r]);
}

template <int kBits>
QJAX_512 void rows_bits(const FloatDot& f, int64_t n0, int64_t n1) {
  const Dot& d = f.dot;
  for (int64_t n = n0; n < n1; n += 4) {
    const int64_t outputs = n1 - n < 4 ? n1 - n : 4;
    int64_t m = 0;
    for (; m + 4 <= d.m; m += 4) block<kBits, 4, 4>(f, m, n, outputs);
    for (; m + 2 <= d.m; m += 2) block<kBits, 2, 4>(f, m, n, outputs);
    if (m < d.m) block<kBits, 1, 4>(f, m, n, outputs);
  }
}

}  // namespace

QJAX_512 void float_rows_avx512(const FloatDot& f, int64_t n0, int64_t n1) {
  switch (f.dot.bits) {
    case 8:
      return rows_bits<8>(f, n0, n1);
    case 4:
      return rows_bits<4>(f, n0, n1);
    default:
      return rows_bits<2>(f, n0, n1);
  }
}

}  // namespace qjax
#endif
