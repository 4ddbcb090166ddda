// Trit-planes with AVX-512 VNNI: lanes are 16 rows of the weight, four columns at a time.
#include "trits.h"
#include "wide.h"

#if defined(__x86_64__)
namespace qjax {
namespace {

QJAX_INLINE512 __m512i bytes_of_both(__m512i low, __m512i high) {
  return _mm512_or_si512(low, _mm512_slli_epi16(high, 8));
}

// Trits + 1 of words, a byte in each half of a word: of base 3, the last digit first, by fractions of 243; 270 is 65536 /
// 243 rounded up, and near enough for all bytes below 243.
template <int kStore>
QJAX_INLINE512 void digits_of(__m512i bytes, __m512i* slot) {
  if (kStore == kBase3) {
    const __m512i three = _mm512_set1_epi16(3);
    __m512i part = _mm512_mullo_epi16(bytes, _mm512_set1_epi16(270)), d[5];
    for (int i = 4; i >= 0; i--) {
      d[i] = _mm512_mulhi_epu16(part, three);
      part = _mm512_mullo_epi16(part, three);
    }
    slot[0] = bytes_of_both(d[0], d[1]);
    slot[1] = bytes_of_both(d[2], d[3]);
    slot[2] = d[4];
  } else {
    const __m512i mask = _mm512_set1_epi16(3), ones = _mm512_set1_epi8(1), bits = _mm512_set1_epi8(3);
    for (int i = 0; i < 2; i++) {
      const __m512i low = _mm512_and_si512(_mm512_srli_epi16(bytes, 4 * i), mask);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4 * i + 2), mask);
      slot[i] = _mm512_and_si512(_mm512_add_epi8(bytes_of_both(low, high), ones), bits);
    }
  }
}

// The vectors of a word for one plane.
template <int kStore, int kPlanes>
QJAX_INLINE512 void slots_of(__m512i words, int p, __m512i* slot) {
  const __m512i even = _mm512_set1_epi16(0xff);
  if (kStore == kNibble) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m128i upper = _mm_set_epi8(2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0);
    const __m128i lower = _mm_set_epi8(2, 2, 2, 2, 2, 2, 2, 2, 1, 0, 2, 1, 0, 2, 1, 0);
    const __m512i table = _mm512_broadcast_i32x4(p == 0 ? upper : lower);
    slot[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(words, mask));
    slot[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(words, 4), mask));
  } else if (kPlanes == 2) {
    digits_of<kStore>(p == 0 ? _mm512_and_si512(words, even) : _mm512_srli_epi16(words, 8), slot);
  } else {
    digits_of<kStore>(_mm512_and_si512(words, even), slot);
    digits_of<kStore>(_mm512_srli_epi16(words, 8), slot + (kStore == kBase3 ? 3 : 2));
  }
}

template <int kStore, int kPlanes, int kRows>
QJAX_512 void rows_of_block(const Trits& t, const uint32_t* laid, const int64_t row[16], int64_t m, int64_t n0,
                            int64_t outputs) {
  constexpr int kSlots = kStore == kBase3 ? (kPlanes == 1 ? 6 : 3) : kStore == kTwoBit && kPlanes == 1 ? 4 : 2;
  const Dot& d = t.dot;
  const int64_t groups = d.groups(), columns = t.columns(), stride = t.laid_stride(), per_group = t.words() * kSlots * 4;
  __m512 total[kRows];
  for (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    const int64_t begin = g * d.group, end = begin + d.group < d.k ? begin + d.group : d.k;
    const int64_t first = begin / columns, last = (end + columns - 1) / columns;
    const int8_t* x = t.laid + m * stride + g * per_group;
    __m512i sum[kPlanes][kRows];
    for (int p = 0; p < kPlanes; p++)
      for (int r = 0; r < kRows; r++) sum[p][r] = _mm512_set1_epi32(-d.qsum[(m + r) * groups + g]);
    for (int64_t i = first; i < last; i++, x += kSlots * 4) {
      const __m512i words = _mm512_load_si512(laid + i * 16);
      for (int p = 0; p < kPlanes; p++) {
        __m512i slot[kSlots];
        slots_of<kStore, kPlanes>(words, p, slot);
        for (int s = 0; s < kSlots; s++)
          for (int r = 0; r < kRows; r++) {
            int32_t four;
            __builtin_memcpy(&four, x + r * stride + s * 4, 4);
            sum[p][r] = _mm512_dpbusd_epi32(sum[p][r], slot[s], _mm512_set1_epi32(four));
          }
      }
    }
    for (int p = 0; p < kPlanes; p++) {
      alignas(64) float scale[16];
      for (int i = 0; i < 16; i++) scale[i] = t.scale_at(p, row[i], g);
      const __m512 factor = _mm512_load_ps(scale);
      for (int r = 0; r < kRows; r++)
        total[r] = _mm512_add_ps(total[r], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[p][r]), factor));
    }
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << outputs) - 1);
  for (int r = 0; r < kRows; r++)
    _mm512_mask_storeu_ps(d.y + (m + r) * d.n + n0, mask, _mm512_mul_ps(total[r], _mm512_set1_ps(d.sx[m + r])));
}

template <int kStore, int kPlanes>
QJAX_512 void rows_of_panel(const Trits& t, int64_t n0, int64_t n1, char* scratch) {
  uint32_t* laid = reinterpret_cast<uint32_t*>(scratch);
  for (int64_t n = n0; n < n1; n += kBlock) {
    const int64_t outputs = n1 - n < kBlock ? n1 - n : kBlock;
    int64_t row[16];
    for (int i = 0; i < 16; i++) row[i] = n + (i < outputs ? i : outputs - 1);
    lay_out_words(t.w, t.row_bytes, row, laid);
    int64_t m = 0;
    for (; m + 4 <= t.dot.m; m += 4) rows_of_block<kStore, kPlanes, 4>(t, laid, row, m, n, outputs);
    for (; m + 2 <= t.dot.m; m += 2) rows_of_block<kStore, kPlanes, 2>(t, laid, row, m, n, outputs);
    if (m < t.dot.m) rows_of_block<kStore, kPlanes, 1>(t, laid, row, m, n, outputs);
  }
}

}  // namespace

QJAX_512 void trits_avx512(const Trits& t, int64_t n0, int64_t n1, char* scratch) {
  if (t.store == kNibble) return rows_of_panel<kNibble, 2>(t, n0, n1, scratch);
  if (t.store == kBase3)
    return t.planes == 1 ? rows_of_panel<kBase3, 1>(t, n0, n1, scratch) : rows_of_panel<kBase3, 2>(t, n0, n1, scratch);
  return t.planes == 1 ? rows_of_panel<kTwoBit, 1>(t, n0, n1, scratch) : rows_of_panel<kTwoBit, 2>(t, n0, n1, scratch);
}

}  // namespace qjax
#endif
