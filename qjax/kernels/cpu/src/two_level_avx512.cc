// Weights of two levels with AVX-512 VNNI, and with AMX for many rows.
//
// One row of activations: the weight is read once, a row at a time. Several: a panel becomes int8 numbers in scratch memory,
// which are multiplied as those of a weight of 8 bits.
#include "two_level.h"
#include "wide.h"

#if defined(__x86_64__)
namespace qjax {
namespace {

// The numbers of all codes in group g of row n, 16 bytes; `flip` 0x80 makes them unsigned.
QJAX_INLINE512 __m128i table_of(const TwoLevel& t, int64_t n, int64_t g, char flip) {
  const __m256i codes = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i step = _mm256_set1_epi16(static_cast<int16_t>(t.step_at(n, g)));
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(t.zero_at(n, g)));
  const __m256i wide = t.after ? _mm256_sub_epi16(_mm256_mullo_epi16(codes, step), zero)
                               : _mm256_mullo_epi16(_mm256_sub_epi16(codes, zero), step);
  return _mm_xor_si128(_mm256_cvtepi16_epi8(wide), _mm_set1_epi8(flip));
}

// The tables of a row as chunks are read one after the other: 16 bytes of a chunk have one each.
struct Tables {
  __m512i now;
  int64_t until;  // the chunk from which others are needed
};

QJAX_INLINE512 void follow(Tables& tables, const TwoLevel& t, int64_t n, int64_t c, char flip) {
  if (c < tables.until) return;
  const int64_t bytes = t.group_bytes();
  if (t.groups() == 1 || bytes % kChunk == 0) {
    tables.now = _mm512_broadcast_i32x4(table_of(t, n, t.group_of(c * kChunk), flip));
    tables.until = t.groups() == 1 ? t.dot.chunks() : c + bytes / kChunk;
    return;
  }
  __m512i all = _mm512_castsi128_si512(table_of(t, n, t.group_of(c * kChunk), flip));
  all = _mm512_inserti32x4(all, table_of(t, n, t.group_of(c * kChunk + 16), flip), 1);
  all = _mm512_inserti32x4(all, table_of(t, n, t.group_of(c * kChunk + 32), flip), 2);
  tables.now = _mm512_inserti32x4(all, table_of(t, n, t.group_of(c * kChunk + 48), flip), 3);
  tables.until = c + 1;
}

template <int kBits>
QJAX_512 void rows_of_one(const TwoLevel& t, int64_t n0, int64_t n1) {
  constexpr int kPhases = 8 / kBits;
  const Dot& d = t.dot;
  const int64_t chunks = d.chunks();
  const uint32_t moved = 128u * static_cast<uint32_t>(d.qsum[0]);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = d.w + n * d.row_bytes;
    __m512i sum[kPhases];
    for (int p = 0; p < kPhases; p++) sum[p] = _mm512_setzero_si512();
    Tables tables{_mm512_setzero_si512(), 0};
    for (int64_t c = 0; c < chunks; c++) {
      follow(tables, t, n, c, static_cast<char>(0x80));
      __builtin_prefetch(w + c * kChunk + 1024, 0, 2);
      const __m512i v = _mm512_maskz_loadu_epi8(bytes_of(d, c), w + c * kChunk);
      for (int p = 0; p < kPhases; p++)
        sum[p] = _mm512_dpbusd_epi32(sum[p], _mm512_shuffle_epi8(tables.now, phase_of<kBits>(v, p)),
                                     _mm512_loadu_si512(d.q + (c * kPhases + p) * kChunk));
    }
    for (int p = 1; p < kPhases; p++) sum[0] = _mm512_add_epi32(sum[0], sum[p]);
    const uint32_t total = static_cast<uint32_t>(_mm512_reduce_add_epi32(sum[0])) - moved;
    d.y[n] = static_cast<float>(static_cast<int32_t>(total)) * d.sx[0] * d.scale_at(n, 0);
  }
}

template <int kBits>
QJAX_512 void numbers_of_panel(const TwoLevel& t, int64_t n0, int64_t n1, char flip, const Panel& panel) {
  constexpr int kPhases = 8 / kBits;
  const Dot& d = t.dot;
  const int64_t chunks = d.chunks(), blocks = (n1 - n0 + kBlock - 1) / kBlock;
  for (int64_t b = 0; b < blocks; b++) {
    Tables tables[16];
    for (int i = 0; i < 16; i++) tables[i] = Tables{_mm512_setzero_si512(), 0};
    for (int64_t c = 0; c < chunks; c++) {
      const __mmask64 there = bytes_of(d, c);
      __m512i rows[kPhases][16];
      for (int i = 0; i < 16; i++) {
        const int64_t n = n0 + b * kBlock + i < n1 ? n0 + b * kBlock + i : n1 - 1;
        follow(tables[i], t, n, c, flip);
        const __m512i v = _mm512_maskz_loadu_epi8(there, d.w + n * d.row_bytes + c * kChunk);
        for (int p = 0; p < kPhases; p++) rows[p][i] = _mm512_shuffle_epi8(tables[i].now, phase_of<kBits>(v, p));
      }
      for (int p = 0; p < kPhases; p++) {
        transpose16(rows[p]);
        uint8_t* out = panel.laid + ((b * chunks + c) * kPhases + p) * 1024;
        for (int i = 0; i < 16; i++) _mm512_store_si512(out + i * 64, rows[p][i]);
      }
    }
  }
  scales_of_panel(d, n0, n1, panel);
}

template <int kBits>
QJAX_512 void panel_bits(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch, bool amx) {
  if (t.dot.m == 1 && !amx) return rows_of_one<kBits>(t, n0, n1);
  const Panel panel = panel_in(scratch, t.dot);
  numbers_of_panel<kBits>(t, n0, n1, amx ? 0 : static_cast<char>(0x80), panel);
#if defined(QJAX_HAS_AMX)
  if (amx) return tiles_amx(t.dot, panel, n0, n1);
#endif
  tiles_avx512(t.dot, panel, n0, n1);
}

}  // namespace

QJAX_512 void two_level_avx512(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch, bool amx) {
  if (t.dot.bits == 4)
    panel_bits<4>(t, n0, n1, scratch, amx);
  else
    panel_bits<2>(t, n0, n1, scratch, amx);
}

}  // namespace qjax
#endif
