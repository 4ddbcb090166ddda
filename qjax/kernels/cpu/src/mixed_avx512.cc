// Weights of 2-bit and 4-bit strips with AVX-512: lanes are 16 rows of the weight, so that a strip's scales are one vector.
#include "mixed.h"
#include "wide.h"

#if defined(__x86_64__)
namespace qjax {
namespace {

// What a block of 16 rows is read from; rows that are not there repeat the last one.
struct Block {
  int64_t row[16];
  const uint32_t* laid;  // [words of 32 bits][16 rows]
};

// Zero points and scales of the rows for three 2-bit strips.
QJAX_512 void scales_of_triple(const Mixed& f, const Block& b, int64_t triple, __m512* zero, __m512* scale) {
  alignas(64) int32_t word[16], offset[16];
  alignas(64) float step[3][16];
  for (int i = 0; i < 16; i++) {
    word[i] = f.words[b.row[i] * f.triples() + triple];
    const int64_t tile = b.row[i] / f.tile;
    if (i > 0 && tile == b.row[i - 1] / f.tile) {
      offset[i] = offset[i - 1];
      for (int j = 0; j < 3; j++) step[j][i] = step[j][i - 1];
    } else {
      offset[i] = f.tile_zero[tile * f.triples() + triple];
      for (int j = 0; j < 3; j++) step[j][i] = from_half(f.tile_scale[(tile * f.triples() + triple) * 3 + j]);
    }
  }
  const __m512i words = _mm512_load_si512(word), offsets = _mm512_load_si512(offset);
  int32_t shift = 6;
  for (int j = 0; j < 3; j++) {
    const __m512i z = _mm512_and_si512(_mm512_srli_epi32(words, 2 * j), _mm512_set1_epi32(3));
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi32((1 << f.scale_bits[j]) - 1));
    const __m512i o = _mm512_and_si512(_mm512_srli_epi32(offsets, 4 * j), _mm512_set1_epi32(15));
    zero[j] = _mm512_cvtepi32_ps(z);
    scale[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(code, o)), _mm512_load_ps(step[j]));
    scale[j] = _mm512_mul_ps(scale[j], _mm512_set1_ps(f.unit));
    shift += f.scale_bits[j];
  }
}

QJAX_512 void scales_of_group(const Mixed& f, const Block& b, int64_t g, __m512* zero, __m512* scale) {
  alignas(64) float z[16], s[16];
  for (int i = 0; i < 16; i++) {
    s[i] = from_half(f.wide_scale[b.row[i] * f.groups() + g]);
    z[i] = static_cast<float>((f.wide_zero[b.row[i] * ((f.groups() + 1) / 2) + g / 2] >> (4 * (g % 2))) & 15);
  }
  *zero = _mm512_load_ps(z);
  *scale = _mm512_mul_ps(_mm512_load_ps(s), _mm512_set1_ps(f.unit));
}

// Codes of one word of each row, times the columns that they meet.
template <int kBits, int kRows>
QJAX_INLINE512 void add_word(__m512i words, __m512 table, __m512 zero, const float* x, int64_t stride, __m512* sum) {
  for (int c = 0; c < 32 / kBits; c++) {
    // The permutation reads four bits of each word, whatever stands above.
    const __m512 number =
        _mm512_sub_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(words, c * kBits), table), zero);
    for (int r = 0; r < kRows; r++) sum[r] = _mm512_fmadd_ps(number, _mm512_set1_ps(x[r * stride + c]), sum[r]);
  }
}

template <int kRows>
QJAX_512 void rows_of_block(const Mixed& f, const Block& b, int64_t m, int64_t n0, int64_t outputs) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; i++) values[i] = static_cast<float>(i & 3);
  const __m512 two = _mm512_load_ps(values);
  for (int i = 0; i < 16; i++) values[i] = static_cast<float>(i);
  const __m512 four = _mm512_load_ps(values);
  const int64_t stride = f.x_stride(), words = f.word() / 4;
  const float* rows = f.x + m * stride;
  __m512 total[kRows], zero[3], scale[3];
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  for (int64_t place = 0; place < f.strips(); place++) {
    const bool is_narrow = place < f.narrow;
    const int64_t j = is_narrow ? place % 3 : place - f.narrow;
    if (is_narrow && j == 0) scales_of_triple(f, b, place / 3, zero, scale);
    if (!is_narrow && j % f.per_group == 0) scales_of_group(f, b, j / f.per_group, zero, scale);
    const float* x = rows + f.column[place];
    const uint32_t* at = b.laid + f.word_of(place) * words * 16;
    __m512 sum[kRows];
    for (int r = 0; r < kRows; r++) sum[r] = _mm512_setzero_ps();
    for (int64_t i = 0; i < words; i++) {
      const __m512i codes = _mm512_load_si512(at + i * 16);
      if (is_narrow)
        add_word<2, kRows>(codes, two, zero[j], x + i * 16, stride, sum);
      else
        add_word<4, kRows>(codes, four, zero[0], x + i * 8, stride, sum);
    }
    for (int64_t i = 0; i < words && !is_narrow; i++)
      add_word<4, kRows>(_mm512_load_si512(b.laid + ((f.strips() + j) * words + i) * 16), four, zero[0],
                         x + f.strip / 2 + i * 8, stride, sum);
    const __m512 factor = scale[is_narrow ? j : 0];
    for (int r = 0; r < kRows; r++) total[r] = _mm512_fmadd_ps(sum[r], factor, total[r]);
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << outputs) - 1);
  for (int r = 0; r < kRows; r++) _mm512_mask_storeu_ps(f.y + (m + r) * f.n + n0, mask, total[r]);
}

}  // namespace

QJAX_512 void mixed_avx512(const Mixed& f, int64_t n0, int64_t n1, char* scratch) {
  uint32_t* laid = reinterpret_cast<uint32_t*>(scratch);
  for (int64_t n = n0; n < n1; n += kBlock) {
    const int64_t outputs = n1 - n < kBlock ? n1 - n : kBlock;
    Block b;
    b.laid = laid;
    for (int i = 0; i < 16; i++) b.row[i] = n + (i < outputs ? i : outputs - 1);
    lay_out_words(f.w, f.row_bytes, b.row, laid);
    int64_t m = 0;
    for (; m + 4 <= f.m; m += 4) rows_of_block<4>(f, b, m, n, outputs);
    for (; m + 2 <= f.m; m += 2) rows_of_block<2>(f, b, m, n, outputs);
    if (m < f.m) rows_of_block<1>(f, b, m, n, outputs);
  }
}

}  // namespace qjax
#endif
