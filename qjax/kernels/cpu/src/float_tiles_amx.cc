#include "float_tiles.h"

#include "tiles.h"

#if defined(QJAX_HAS_AMX)
#include <cpuid.h>

namespace qjax {

bool has_bf16_tiles() {
  static const bool there = [] {
    unsigned a, b, c, d;
    if (!has_isa(kAmx) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22))) return false;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  }();
  return there;
}

bool fits_tiles(const Dot& d) { return d.k > 0 && (d.groups() == 1 || d.group % kTileColumns == 0); }

namespace {

constexpr int64_t kTile = kTileRows * kTileColumns;  // numbers of a tile

// 16 numbers of a row, cut in parts: the upper half of each is one, and the rest, which is exact, is cut again. Infinity has
// no rest, and NaN stays one whatever half its mark is in.
template <int kParts>
QJAX_INLINE_BF16 void cut(__m512 x, __m256i* out) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  x = _mm512_castsi512_ps(_mm512_mask_or_epi32(_mm512_castps_si512(x), nan, _mm512_castps_si512(x), _mm512_set1_epi32(1 << 22)));
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), infinity, _CMP_LT_OQ);
  for (int p = 0; p < kParts; p++) {
    const __m512i bits = _mm512_castps_si512(x);
    out[p] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
    const __m512 taken = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    x = _mm512_maskz_sub_ps(finite, x, taken);
  }
}

// 16 rows of activations from row m0 on: [steps][parts][16 rows][32 columns].
template <int kParts>
QJAX_BF16 void lay_out_rows(const FloatTiles& f, int64_t m0, uint16_t* out) {
  const Dot& d = f.dot;
  for (int64_t step = 0; step < f.steps(); step++) {
    const int64_t k = step * kTileColumns;
    for (int64_t r = 0; r < kTileRows; r++) {
      const bool there = m0 + r < d.m;
      const float* x = f.x + (m0 + r) * d.k + k;
      for (int64_t half = 0; half < 2; half++) {
        const int64_t left = there ? d.k - k - 16 * half : 0;
        __m256i parts[kParts];
        cut<kParts>(left > 0 ? _mm512_maskz_loadu_ps(first(left), x + 16 * half) : _mm512_setzero_ps(), parts);
        for (int p = 0; p < kParts; p++)
          _mm256_store_si256(reinterpret_cast<__m256i*>(out + (step * kParts + p) * kTile + r * kTileColumns + 16 * half),
                             parts[p]);
      }
    }
  }
}

// What codes stand for in bfloat16: integers from -15 on, of which a zero point picks the first.
struct alignas(64) Integers {
  uint16_t of[64] = {};
  Integers() {
    for (int i = 0; i < 64; i++) {
      const float value = static_cast<float>(i - 15);
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      of[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
};
const Integers kIntegers;

// 32 codes of a row, less their zero point.
template <int kBits>
QJAX_INLINE_BF16 __m512i numbers_of(const uint8_t* at, int64_t bytes, uint8_t flip, int32_t zero) {
  constexpr int64_t kBytes = kTileColumns * kBits / 8;
  const __mmask32 there = bytes >= kBytes ? ~__mmask32{0} : (__mmask32{1} << (bytes < 0 ? 0 : bytes)) - 1;
  if (kBits == 8) {
    const __m256i codes = _mm256_xor_si256(_mm256_maskz_loadu_epi8(there, at), _mm256_set1_epi8(static_cast<char>(flip)));
    const __m512i less = _mm512_set1_epi32(zero);
    const __m512i low = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), less);
    const __m512i high = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)), less);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
  }
  const __m128i given = _mm_maskz_loadu_epi8(static_cast<__mmask16>(there & ((1u << kBytes % 32) - 1)), at);
  const __m128i codes = _mm_xor_si128(given, _mm_set1_epi8(static_cast<char>(flip)));
  __m512i index;
  if (kBits == 4) {
    const __m512i v = _mm512_cvtepu8_epi32(codes);
    index = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 12)), _mm512_set1_epi32(0x000f000f));
  } else {
    const __m512i v = _mm512_cvtepu8_epi64(codes);
    const __m512i both = _mm512_or_si512(v, _mm512_slli_epi64(v, 14));
    index = _mm512_and_si512(_mm512_or_si512(both, _mm512_slli_epi64(both, 28)), _mm512_set1_epi64(0x0003000300030003));
  }
  return _mm512_permutexvar_epi16(index, _mm512_loadu_si512(kIntegers.of + 15 - zero));
}

// Columns [k0, k1) of 16 rows of the weight, as tiles take them: [steps][2 of 16 rows][16 pairs of columns][16 rows][2].
template <int kBits>
QJAX_BF16 void lay_out_weight(const Dot& d, int64_t n0, int64_t k0, int64_t k1, uint16_t* out) {
  const int64_t groups = d.groups();
  for (int64_t k = k0; k < k1; k += kTileColumns) {
    const int64_t from = k * kBits / 8, g = groups == 1 ? 0 : k / d.group;
    __m512i r[16];
    for (int64_t i = 0; i < kTileRows; i++) {
      const int64_t n = n0 + i < d.n ? n0 + i : d.n - 1;
      r[i] = numbers_of<kBits>(d.w + n * d.row_bytes + from, d.row_bytes - from, d.flip, d.zero_at(n, g));
    }
    transpose16(r);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(out + (k - k0) / kTileColumns * 2 * kTile + i * 32, r[i]);
  }
}

// Sums of 32 rows of activations by 32 outputs over `steps` steps: [4][16][16], activations 0 to 15 first.
template <int kParts>
QJAX_INLINE_BF16 void multiply(const uint16_t* x, int64_t next_rows, const uint16_t* w, int64_t steps, bool two_rows,
                               float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(6, w + step * 2 * kTile, 64);
    _tile_loadd(7, w + step * 2 * kTile + kTile, 64);
    for (int p = 0; p < kParts; p++) {
      const uint16_t* at = x + (step * kParts + p) * kTile;
      _tile_loadd(4, at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two_rows) {
        _tile_loadd(5, at + next_rows, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (two_rows) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

struct Work {
  const FloatTiles* product;
  int64_t m0, m1;  // rows of activations that are laid out
  int64_t step;    // outputs of a task
  char *laid, *scratch;
};

template <int kParts>
QJAX_BF16 void rows_task(void* argument, int64_t number, int64_t) {
  const Work& work = *static_cast<const Work*>(argument);
  const FloatTiles& f = *work.product;
  uint16_t* out = reinterpret_cast<uint16_t*>(work.laid) + number * f.steps() * kParts * kTile;
  lay_out_rows<kParts>(f, work.m0 + number * kTileRows, out);
}

template <int kBits, int kParts>
QJAX_BF16 void outputs_task(void* argument, int64_t number, int64_t worker) {
  const Work& work = *static_cast<const Work*>(argument);
  const FloatTiles& f = *work.product;
  const Dot& d = f.dot;
  const int64_t segment = f.segment(), at_once = f.segments_at_once(), segments = f.segments();
  const int64_t from = number * work.step, to = from + work.step < d.n ? from + work.step : d.n;
  const int64_t rows_apart = f.steps() * kParts * kTile;
  char* own = work.scratch + worker * ((f.scratch_bytes() + 63) / 64 * 64);
  uint16_t* w = reinterpret_cast<uint16_t*>(own);
  float* scale = reinterpret_cast<float*>(own + at_once * segment * 2 * kTileRows * 2);
  float* sums = scale + at_once * 2 * kTileRows;
  const uint16_t* laid = reinterpret_cast<const uint16_t*>(work.laid);
  configure_whole_tiles();
  for (int64_t s0 = 0; s0 < segments; s0 += at_once) {
    const int64_t s1 = s0 + at_once < segments ? s0 + at_once : segments;
    const int64_t k0 = s0 * segment, k1 = s1 * segment < d.k ? s1 * segment : d.k;
    for (int64_t n = from; n < to; n += 2 * kTileRows) {
      lay_out_weight<kBits>(d, n, k0, k1, w);
      lay_out_weight<kBits>(d, n + kTileRows, k0, k1, w + kTile);
      for (int64_t s = s0; s < s1; s++)
        for (int64_t i = 0; i < 2 * kTileRows; i++)
          scale[(s - s0) * 2 * kTileRows + i] = d.scale_at(n + i < d.n ? n + i : d.n - 1, d.groups() == 1 ? 0 : s);
      const __mmask16 there0 = first(d.n - n), there1 = first(d.n - n - 16);
      for (int64_t m = work.m0; m < work.m1; m += 2 * kTileRows) {
        const int64_t rows = work.m1 - m < 2 * kTileRows ? work.m1 - m : 2 * kTileRows;
        const uint16_t* x = laid + (m - work.m0) / kTileRows * rows_apart;
        for (int64_t s = s0; s < s1; s++) {
          const int64_t start = s * segment, end = start + segment < d.k ? start + segment : d.k;
          multiply<kParts>(x + start / kTileColumns * kParts * kTile, rows_apart,
                           w + (start - k0) / kTileColumns * 2 * kTile, (end - start + kTileColumns - 1) / kTileColumns,
                           rows > kTileRows, sums);
          const __m512 scale0 = _mm512_loadu_ps(scale + (s - s0) * 2 * kTileRows);
          const __m512 scale1 = _mm512_loadu_ps(scale + (s - s0) * 2 * kTileRows + 16);
          for (int64_t r = 0; r < rows; r++) {
            const float* sum = sums + r / 16 * 512 + r % 16 * 16;
            float* y = d.y + (m + r) * d.n + n;
            __m512 y0 = _mm512_setzero_ps(), y1 = y0;
            if (s > 0) {
              y0 = _mm512_maskz_loadu_ps(there0, y);
              if (there1) y1 = _mm512_maskz_loadu_ps(there1, y + 16);
            }
            _mm512_mask_storeu_ps(y, there0, _mm512_fmadd_ps(_mm512_load_ps(sum), scale0, y0));
            if (there1) _mm512_mask_storeu_ps(y + 16, there1, _mm512_fmadd_ps(_mm512_load_ps(sum + 256), scale1, y1));
          }
        }
      }
    }
  }
  _tile_release();
}

using Task = void (*)(void*, int64_t, int64_t);

template <int kParts>
Task outputs_of(int64_t bits) {
  return bits == 8 ? outputs_task<8, kParts> : bits == 4 ? outputs_task<4, kParts> : outputs_task<2, kParts>;
}

}  // namespace

void run_float_tiles(const FloatTiles& f, const Pool& pool, char* laid, char* scratch) {
  const Dot& d = f.dot;
  const Task rows = f.parts == 1 ? rows_task<1> : f.parts == 2 ? rows_task<2> : rows_task<3>;
  const Task outputs = f.parts == 1 ? outputs_of<1>(d.bits) : f.parts == 2 ? outputs_of<2>(d.bits) : outputs_of<3>(d.bits);
  for (int64_t m0 = 0; m0 < d.m; m0 += kRowsAtOnce) {
    Work work{&f, m0, m0 + kRowsAtOnce < d.m ? m0 + kRowsAtOnce : d.m, 0, laid, scratch};
    pool.run(pool.context, pool.workers, (work.m1 - m0 + kTileRows - 1) / kTileRows, rows, &work);
    const int64_t tasks = 2 * pool.workers, wide = 2 * kTileRows;
    work.step = ((d.n + tasks - 1) / tasks + wide - 1) / wide * wide;
    pool.run(pool.context, pool.workers, (d.n + work.step - 1) / work.step, outputs, &work);
  }
}

}  // namespace qjax
#else
namespace qjax {
bool has_bf16_tiles() { return false; }
bool fits_tiles(const Dot&) { return false; }
void run_float_tiles(const FloatTiles&, const Pool&, char*, char*) {}
}  // namespace qjax
#endif
