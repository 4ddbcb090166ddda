// The product with AVX-512 VNNI.
//
// One row of activations: the weight is read once, as it lies, 16 rows at a time; the lanes of a sum are columns, and
// 16 sums are added up together. Several rows: a panel of the weight is laid out in scratch memory such that lanes are
// rows of the weight, and read from the cache for every eight rows of activations.
#include "wide.h"

#if defined(__x86_64__)
namespace qjax {
namespace {

// Sums of a chunk or more for 16 rows of the weight.
template <int kBits, bool kWhole>
QJAX_INLINE512 void add_chunk(__m512i acc[16], const uint8_t* const row[16], int64_t c, __mmask64 there, __m512i flip,
                              const int8_t* q, int64_t ahead) {
  constexpr int kPhases = 8 / kBits;
  __m512i x[kPhases];
  for (int p = 0; p < kPhases; p++) x[p] = _mm512_loadu_si512(q + (c * kPhases + p) * kChunk);
  for (int i = 0; i < 16; i++) {
    const uint8_t* at = row[i] + c * kChunk;
    // The same place of the next 16 rows: rows are too short for the processor to guess where the next one begins.
    __builtin_prefetch(at + ahead, 0, 2);
    __m512i v = kWhole ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(there, at);
    v = _mm512_xor_si512(v, flip);
    for (int p = 0; p < kPhases; p++) acc[i] = _mm512_dpbusd_epi32(acc[i], phase_of<kBits>(v, p), x[p]);
  }
}

template <int kBits>
QJAX_512 void block_of_one(const Dot& d, int64_t n0, int64_t n1) {
  const int64_t groups = d.groups(), bytes = groups == 1 ? d.row_bytes : d.group_bytes(), chunks = d.chunks();
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(d.flip));
  const uint8_t* row[16];
  alignas(64) int32_t scale_at[16];
  for (int i = 0; i < 16; i++) {
    const int64_t n = n0 + i < n1 ? n0 + i : n1 - 1;
    row[i] = d.w + n * d.row_bytes;
    scale_at[i] = static_cast<int32_t>((n - n0) * d.scale_n);
  }
  const __m512i scale_index = _mm512_load_si512(scale_at);
  const float* scale = d.scale + n0 * d.scale_n;
  __m512 total = _mm512_setzero_ps();
  const int64_t in_chunk = bytes < kChunk && groups > 1 ? kChunk / bytes : 1;
  const int64_t ahead = n1 + kBlock <= d.n ? kBlock * d.row_bytes : 0;
  const int64_t per_group = groups > 1 && bytes >= kChunk ? bytes / kChunk : groups > 1 ? 1 : chunks;
  for (int64_t g = 0; g < groups; g += in_chunk) {
    __m512i acc[16];
    for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
    const int64_t first = in_chunk > 1 ? g / in_chunk : g * per_group;
    const int64_t last = first + per_group < chunks ? first + per_group : chunks;
    for (int64_t c = first; c < last; c++) {
      const __mmask64 there = bytes_of(d, c);
      if (there == ~__mmask64{0})
        add_chunk<kBits, true>(acc, row, c, there, flip, d.q, ahead);
      else
        add_chunk<kBits, false>(acc, row, c, there, flip, d.q, ahead);
    }
    transpose16(acc);
    const int64_t width = 16 / in_chunk;  // columns of the sums that belong to one group
    for (int64_t h = 0; h < in_chunk && g + h < groups; h++) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < width; i++) sum = _mm512_add_epi32(sum, acc[h * width + i]);
      __m512i moved;
      if (d.zeros) {
        alignas(64) int32_t zero[16];
        for (int i = 0; i < 16; i++) zero[i] = d.zero_at(n0 + i < n1 ? n0 + i : n1 - 1, g + h);
        moved = _mm512_mullo_epi32(_mm512_load_si512(zero), _mm512_set1_epi32(d.qsum[g + h]));
      } else {
        moved = _mm512_set1_epi32(static_cast<int32_t>(static_cast<uint32_t>(d.zero) *
                                                       static_cast<uint32_t>(d.qsum[g + h])));
      }
      const __m512 number = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, moved));
      const __m512 s = _mm512_i32gather_ps(scale_index, scale + (g + h) * d.scale_g, 4);
      if (groups == 1)
        total = _mm512_mul_ps(_mm512_mul_ps(number, _mm512_set1_ps(d.sx[0])), s);
      else
        total = _mm512_add_ps(total, _mm512_mul_ps(number, s));
    }
  }
  if (groups > 1) total = _mm512_mul_ps(total, _mm512_set1_ps(d.sx[0]));
  _mm512_mask_storeu_ps(d.y + n0, static_cast<__mmask16>((1u << (n1 - n0)) - 1), total);
}

// kRows rows of activations by kVectors blocks of 16 rows of the weight.
template <int kRows, int kVectors>
QJAX_512 void tile(const Dot& d, const Panel& panel, int64_t m, int64_t n0, int64_t n1, int64_t b0) {
  const int64_t stride = d.q_stride(), groups = d.groups(), block = stride * 16;
  const int8_t* q = d.q + m * stride;
  const uint8_t* w = panel.laid + b0 * block;
  __m512 total[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int v = 0; v < kVectors; v++) total[r][v] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512i acc[kRows][kVectors];
    for (int r = 0; r < kRows; r++) {
      const int32_t sum = d.qsum[(m + r) * groups + g];
      for (int v = 0; v < kVectors; v++) {
        const __m512i zero = _mm512_loadu_si512(panel.zero + g * kPanel + (b0 + v) * kBlock);
        acc[r][v] = d.zeros ? _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_mullo_epi32(zero, _mm512_set1_epi32(sum)))
                            : _mm512_set1_epi32(static_cast<int32_t>(0u - static_cast<uint32_t>(d.zero) *
                                                                              static_cast<uint32_t>(sum)));
      }
    }
    const Runs runs = runs_of(d, g);
    for (int64_t run = 0; run < runs.count; run++) {
      const int64_t first = runs.first + run * 16;
      for (int64_t t = first; t < first + runs.length; t++) {
        __m512i wv[kVectors];
        for (int v = 0; v < kVectors; v++) wv[v] = _mm512_load_si512(w + v * block + t * 64);
        for (int r = 0; r < kRows; r++) {
          int32_t four;
          __builtin_memcpy(&four, q + r * stride + t * 4, 4);
          const __m512i x = _mm512_set1_epi32(four);
          for (int v = 0; v < kVectors; v++) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], wv[v], x);
        }
      }
    }
    for (int v = 0; v < kVectors; v++) {
      const __m512 s = _mm512_loadu_ps(panel.scale + g * kPanel + (b0 + v) * kBlock);
      for (int r = 0; r < kRows; r++) {
        const __m512 number = _mm512_cvtepi32_ps(acc[r][v]);
        if (groups == 1)
          total[r][v] = _mm512_mul_ps(_mm512_mul_ps(number, _mm512_set1_ps(d.sx[m + r])), s);
        else
          total[r][v] = _mm512_add_ps(total[r][v], _mm512_mul_ps(number, s));
      }
    }
  }
  for (int v = 0; v < kVectors; v++) {
    const int64_t n = n0 + (b0 + v) * kBlock, left = n1 - n;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    for (int r = 0; r < kRows; r++) {
      const __m512 y = groups == 1 ? total[r][v] : _mm512_mul_ps(total[r][v], _mm512_set1_ps(d.sx[m + r]));
      _mm512_mask_storeu_ps(d.y + (m + r) * d.n + n, mask, y);
    }
  }
}

template <int kRows>
QJAX_512 void rows_of_panel(const Dot& d, const Panel& panel, int64_t m, int64_t n0, int64_t n1) {
  const int64_t blocks = (n1 - n0 + kBlock - 1) / kBlock;
  int64_t b = 0;
  for (; b + 2 <= blocks; b += 2) tile<kRows, 2>(d, panel, m, n0, n1, b);
  if (b < blocks) tile<kRows, 1>(d, panel, m, n0, n1, b);
}

template <int kBits>
QJAX_512 void panel_of_many(const Dot& d, int64_t n0, int64_t n1, char* scratch) {
  const Panel panel = panel_in(scratch, d);
  lay_out<kBits>(d, n0, n1, 0, panel);
  tiles_avx512(d, panel, n0, n1);
}

template <int kBits>
QJAX_512 void panel_bits(const Dot& d, int64_t n0, int64_t n1, char* scratch) {
  if (d.m > 1) return panel_of_many<kBits>(d, n0, n1, scratch);
  for (int64_t n = n0; n < n1; n += kBlock) block_of_one<kBits>(d, n, n + kBlock < n1 ? n + kBlock : n1);
}

}  // namespace

QJAX_512 void tiles_avx512(const Dot& d, const Panel& panel, int64_t n0, int64_t n1) {
  int64_t m = 0;
  for (; m + 8 <= d.m; m += 8) rows_of_panel<8>(d, panel, m, n0, n1);
  for (; m + 4 <= d.m; m += 4) rows_of_panel<4>(d, panel, m, n0, n1);
  for (; m + 2 <= d.m; m += 2) rows_of_panel<2>(d, panel, m, n0, n1);
  if (m < d.m) rows_of_panel<1>(d, panel, m, n0, n1);
}

void panel_avx512(const Dot& d, int64_t n0, int64_t n1, char* scratch) {
  switch (d.bits) {
    case 8:
      return panel_bits<8>(d, n0, n1, scratch);
    case 4:
      return panel_bits<4>(d, n0, n1, scratch);
    default:
      return panel_bits<2>(d, n0, n1, scratch);
  }
}

}  // namespace qjax
#endif
