// Losses of candidates with AMX: 32 rows of errors, made in the nearest cache, by tiles of bfloat16.
#include "candidates.h"
#include "tiles.h"

#if defined(QJAX_HAS_AMX)
namespace qjax {
namespace {

// One candidate for one row.
struct Setting {
  __m512 inverse, low, high;  // even
  __m512 start, slope;        // with a table
  const float* table;
  __m512 near0, near1;        // its first 32 entries
};

enum Kind { kEven, kShortTable, kLongTable };

template <Kind kKind>
QJAX_INLINE_BF16 Setting setting_of(const Candidates& c, int64_t row, int64_t n) {
  Setting s{};
  const float scale = c.scale[row * c.count + n], other = c.other[row * c.count + n];
  if (kKind == kEven) {
    s.inverse = _mm512_set1_ps(1.0f / scale);
    s.low = _mm512_set1_ps(-other);
    s.high = _mm512_set1_ps(c.top - other);
  } else {
    s.start = _mm512_set1_ps(scale);
    s.slope = _mm512_set1_ps(-other);
    s.low = _mm512_set1_ps(c.least);
    s.high = _mm512_set1_ps(static_cast<float>(c.entries - 1));
    s.table = c.table + n * c.entries;
    if (kKind == kShortTable) {
      s.near0 = _mm512_maskz_loadu_ps(first(c.entries), s.table);
      s.near1 = _mm512_maskz_loadu_ps(first(c.entries - 16), s.table + 16);
    }
  }
  return s;
}

// Errors of 16 numbers: of an even quantizer in units of its scale.
template <Kind kKind>
QJAX_INLINE_BF16 __m512 errors_of(const Setting& s, const float* x, const float* number, __mmask16 mask) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 given = _mm512_maskz_loadu_ps(mask, x);
  if (kKind == kEven) {
    const __m512 t = _mm512_mul_ps(given, s.inverse);
    const __m512 code = _mm512_min_ps(_mm512_max_ps(_mm512_roundscale_ps(t, kNearest), s.low), s.high);
    return _mm512_maskz_sub_ps(mask, code, t);
  }
  const __m512 u = _mm512_min_ps(_mm512_max_ps(_mm512_sub_ps(given, s.start), s.low), _mm512_setzero_ps());
  const __m512 code = _mm512_min_ps(_mm512_mul_ps(u, s.slope), s.high);  // rounded to the nearest integer below
  const __m512i at = _mm512_cvtps_epi32(code);
  const __m512 value = kKind == kShortTable ? _mm512_permutex2var_ps(s.near0, at, s.near1)
                                            : _mm512_i32gather_ps(at, s.table, 4);
  return _mm512_maskz_sub_ps(mask, value, _mm512_maskz_loadu_ps(mask, number));
}

// The matrix of a slice, as tiles take it: [blocks of 16 p][k / 2][16 p][2 k].
QJAX_BF16 void pack(const Candidates& c, int64_t s, uint16_t* out) {
  const float* b = c.b + s * c.p * c.k;
  const int64_t padded = c.k_padded();
  for (int64_t block = 0; block < c.p_blocks(); block++) {
    uint16_t* to = out + block * 16 * padded;
    for (int64_t p = 0; p < 16; p++) {
      const bool there = block * 16 + p < c.p;
      const float* row = b + (block * 16 + p) * c.k;
      for (int64_t k = 0; k < padded; k += 16) {
        const __m512 x = there ? _mm512_maskz_loadu_ps(first(c.k - k), row + k) : _mm512_setzero_ps();
        uint32_t pairs[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(x));
        for (int64_t i = 0; i < 8; i++) reinterpret_cast<uint32_t*>(to)[(k / 2 + i) * 16 + p] = pairs[i];
      }
    }
  }
}

// Products of 32 rows of errors by two blocks of the matrix: sums [4][16][16], rows 0 to 15 first.
QJAX_INLINE_BF16 void multiply(const uint16_t* e, const uint16_t* b, int64_t padded, bool two_rows, bool two_blocks,
                               float* sums) {
  const int64_t stride = padded * 2, block = padded * 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < padded; k += 32) {
    _tile_loadd(4, e + k, stride);
    _tile_loadd(6, b + k * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (two_blocks) {
      _tile_loadd(7, b + block + k * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (two_rows) {
      _tile_loadd(5, e + 16 * padded + k, stride);
      _tile_dpbf16ps(2, 5, 6);
      if (two_blocks) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (two_blocks) _tile_stored(1, sums + 256, 64);
  if (two_rows) _tile_stored(2, sums + 512, 64);
  if (two_rows && two_blocks) _tile_stored(3, sums + 768, 64);
}

template <Kind kKind, bool kByRow>
QJAX_BF16 void block_of(const Candidates& c, int64_t task, const uint16_t* packed, double* partial, char* scratch) {
  const int64_t s = task / c.row_blocks(), m0 = task % c.row_blocks() * kRowBlock;
  const int64_t rows = c.m - m0 < kRowBlock ? c.m - m0 : kRowBlock, padded = c.k_padded();
  const float* x = c.x + (s * c.m + m0) * c.k;
  const float* number = kKind == kEven ? nullptr : c.number + (s * c.m + m0) * c.k;
  const float* rest = c.form == kOwn ? nullptr : c.rest + (s * c.m + m0) * c.p;
  const uint16_t* b = packed + s * c.p_blocks() * 16 * padded;
  float* sums = reinterpret_cast<float*>(scratch);
  uint16_t* e = reinterpret_cast<uint16_t*>(scratch + 4 * 1024 * 2);
  if (c.form != kOwn) {
    configure_whole_tiles();
    for (int64_t i = rows * padded; i < kRowBlock * padded; i++) e[i] = 0;
  }
  for (int64_t n = 0; n < c.count; n++) {
    const int64_t one = s % c.settings;
    Setting setting = setting_of<kKind>(c, kByRow ? m0 : one, n);
    __m512 total = _mm512_setzero_ps(), by_row[kByRow ? kRowBlock : 1];
    if (kByRow)
      for (int64_t r = 0; r < kRowBlock; r++) by_row[r] = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r++) {
      if (kByRow && r) setting = setting_of<kKind>(c, m0 + r, n);
      const float* from = x + r * c.k;
      const float* off = kKind == kEven ? nullptr : number + r * c.k;
      __m512 sum = _mm512_setzero_ps();
      if (c.form == kOwn) {
        for (int64_t k = 0; k < c.k; k += 16) {
          const __m512 error = errors_of<kKind>(setting, from + k, kKind == kEven ? nullptr : off + k, first(c.k - k));
          sum = _mm512_fmadd_ps(error, error, sum);
        }
        if (kByRow)
          by_row[r] = sum;
        else
          total = _mm512_add_ps(total, sum);
      } else {
        for (int64_t k = 0; k < padded; k += 16) {
          const __m512 error = errors_of<kKind>(setting, from + k, kKind == kEven ? nullptr : off + k, first(c.k - k));
          _mm256_store_si256(reinterpret_cast<__m256i*>(e + r * padded + k), (__m256i)_mm512_cvtneps_pbh(error));
        }
      }
    }
    const auto unit_of = [&](int64_t row) { return kKind == kEven ? c.scale[row * c.count + n] : 1.0f; };
    if (c.form != kOwn) {
      for (int64_t block = 0; block < c.p_blocks(); block += 2) {
        const bool two_rows = rows > 16, two_blocks = block + 1 < c.p_blocks();
        multiply(e, b + block * 16 * padded, padded, two_rows, two_blocks, sums);
        for (int64_t r = 0; r < rows; r++) {
          const __m512 unit = _mm512_set1_ps(unit_of(kByRow ? m0 + r : one));
          __m512 sum = kByRow ? by_row[r] : total;
          for (int64_t v = 0; v < (two_blocks ? 2 : 1); v++) {
            const int64_t p = (block + v) * 16;
            const __mmask16 mask = first(c.p - p);
            const __m512 product = _mm512_load_ps(sums + (r / 16 * 2 + v) * 256 + r % 16 * 16);
            const __m512 off = _mm512_fmadd_ps(product, unit, _mm512_maskz_loadu_ps(mask, rest + r * c.p + p));
            if (c.form == kProduct) {
              sum = _mm512_fmadd_ps(off, off, sum);
            } else {
              const __m512i bits = _mm512_cvtepu16_epi32(
                  _mm256_load_si256(reinterpret_cast<const __m256i*>(e + r * padded + p)));
              sum = _mm512_fmadd_ps(off, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), sum);
            }
          }
          if (kByRow)
            by_row[r] = sum;
          else
            total = sum;
        }
      }
    }
    const auto factor_of = [&](int64_t row) {
      const double unit = unit_of(row);
      return c.form == kOwn ? unit * unit : c.form == kQuadratic ? unit : 1.0;
    };
    if (kByRow) {
      for (int64_t r = 0; r < rows; r++)
        c.loss[(s * c.m + m0 + r) * c.count + n] =
            static_cast<float>(factor_of(m0 + r) * static_cast<double>(_mm512_reduce_add_ps(by_row[r])));
    } else {
      partial[task * c.count + n] = factor_of(one) * static_cast<double>(_mm512_reduce_add_ps(total));
    }
  }
  if (c.form != kOwn) _tile_release();
}

struct Work {
  const Candidates* problem;
  uint16_t* packed;
  double* partial;
  char* scratch;
};

void pack_task(void* argument, int64_t number, int64_t) {
  const Work& w = *static_cast<const Work*>(argument);
  pack(*w.problem, number, w.packed + number * w.problem->p_blocks() * 16 * w.problem->k_padded());
}

template <Kind kKind>
void block_task(void* argument, int64_t number, int64_t worker) {
  const Work& w = *static_cast<const Work*>(argument);
  char* own = w.scratch + worker * ((w.problem->scratch_bytes() + 63) / 64 * 64);
  if (w.problem->by_row)
    block_of<kKind, true>(*w.problem, number, w.packed, w.partial, own);
  else
    block_of<kKind, false>(*w.problem, number, w.packed, w.partial, own);
}

}  // namespace

void run_candidates(const Candidates& c, const Pool& pool, uint16_t* packed, double* partial, char* scratch) {
  Work work{&c, packed, partial, scratch};
  if (c.form != kOwn) pool.run(pool.context, pool.workers, c.slices, pack_task, &work);
  const auto task = c.entries == 0 ? block_task<kEven> : c.entries <= 32 ? block_task<kShortTable> : block_task<kLongTable>;
  pool.run(pool.context, pool.workers, c.tasks(), task, &work);
  if (c.by_row) return;
  for (int64_t s = 0; s < c.slices; s++) {
    for (int64_t n = 0; n < c.count; n++) {
      double sum = 0;
      for (int64_t t = s * c.row_blocks(); t < (s + 1) * c.row_blocks(); t++) sum += partial[t * c.count + n];
      c.loss[s * c.count + n] = static_cast<float>(sum);
    }
  }
}

}  // namespace qjax
#else
namespace qjax {
void run_candidates(const Candidates&, const Pool&, uint16_t*, double*, char*) {}
}  // namespace qjax
#endif
