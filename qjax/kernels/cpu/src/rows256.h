// The product with 256-bit vectors: lanes are columns, one row of the weight and one of activations at a time, the weight
// read as it lies. Included once for each instruction set, which says QJAX_256 and QJAX_INLINE256, the targets of functions,
// and `accumulate<bits>(sums, u, x)`, which adds four neighbouring products of unsigned and signed bytes to each lane.

namespace qjax {
namespace {

QJAX_INLINE256 int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// Bytes [from, to) of one row of the weight, within one chunk, times one row of activations.
template <int kBits>
QJAX_INLINE256 void add_bytes(__m256i* acc, const uint8_t* w, int64_t c, int64_t from, int64_t to, uint8_t flip,
                              const int8_t* q) {
  constexpr int kPhases = 8 / kBits;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1));
  alignas(32) uint8_t tail[32];
  for (int64_t b = from; b < to; b += 32) {
    const uint8_t* at = w + c * kChunk + b;
    if (to - b < 32) {  // nothing is read behind the end; codes of 0 stand there, whatever they are multiplied by
      for (int64_t i = 0; i < 32; i++) tail[i] = i < to - b ? at[i] : flip;
      at = tail;
    }
    const __m256i v = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)),
                                       _mm256_set1_epi8(static_cast<char>(flip)));
    for (int p = 0; p < kPhases; p++) {
      const __m256i x =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + (c * kPhases + p) * kChunk + b));
      const __m256i u = kBits == 8 ? v : _mm256_and_si256(_mm256_srli_epi16(v, p * kBits), mask);
      *acc = accumulate<kBits>(*acc, u, x);
    }
  }
}

template <int kBits>
QJAX_256 void panel_bits(const Dot& d, int64_t n0, int64_t n1) {
  const int64_t groups = d.groups(), bytes = groups == 1 ? d.row_bytes : d.group_bytes();
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = d.w + n * d.row_bytes;
    for (int64_t m = 0; m < d.m; m++) {
      const int8_t* q = d.q + m * d.q_stride();
      float total = 0.0f;
      for (int64_t g = 0; g < groups; g++) {
        __m256i acc = _mm256_setzero_si256();
        const int64_t end = (g + 1) * bytes < d.row_bytes ? (g + 1) * bytes : d.row_bytes;
        for (int64_t b = g * bytes; b < end;) {
          const int64_t c = b / kChunk, stop = (c + 1) * kChunk < end ? (c + 1) * kChunk : end;
          add_bytes<kBits>(&acc, w, c, b - c * kChunk, stop - c * kChunk, d.flip, q);
          b = stop;
        }
        const uint32_t moved = static_cast<uint32_t>(d.zero_at(n, g)) * static_cast<uint32_t>(d.qsum[m * groups + g]);
        const float number = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum_of(acc)) - moved));
        if (groups == 1)
          total = number * d.sx[m] * d.scale_at(n, 0);
        else
          total += number * d.scale_at(n, g);
      }
      d.y[m * d.n + n] = groups == 1 ? total : total * d.sx[m];
    }
  }
}

QJAX_256 void panel_256(const Dot& d, int64_t n0, int64_t n1) {
  switch (d.bits) {
    case 8:
      return panel_bits<8>(d, n0, n1);
    case 4:
      return panel_bits<4>(d, n0, n1);
    default:
      return panel_bits<2>(d, n0, n1);
  }
}

}  // namespace
}  // namespace qjax
