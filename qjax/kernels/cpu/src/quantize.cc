// Activations to int8 codes, in the order in which the products read them.
#include <cfloat>
#include <cstring>

#include "problem.h"

#if defined(__x86_64__)
#define QJAX_WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#endif

namespace qjax {
namespace {

// The code of one number. Adding 1.5 * 2^23 leaves the rounded number in the low bits of the mantissa.
inline int8_t code(float x, float inverse, float low, float high) {
  float t = __builtin_fabsf(x) < FLT_MIN ? 0.0f : x * inverse;
  t = t < low ? low : t;
  t = t > high ? high : t;
  t = t == t ? t : 0.0f;
  t += 12582912.0f;
  int32_t word;
  std::memcpy(&word, &t, 4);
  return static_cast<int8_t>(word);
}

#define QJAX_QUANTIZE_ROW(NAME, TARGET)                                                                              \
  /* One chunk of a row: `count` numbers at x, or codes, to P runs of 64, zeros behind them. */                      \
  TARGET void NAME(const float* x, const int8_t* codes, int64_t count, float inverse, float low, float high,         \
                   int64_t phases, int8_t* out) {                                                                    \
    int8_t line[256];                                                                                                \
    const int64_t whole = phases * kChunk;                                                                           \
    if (codes) {                                                                                                     \
      for (int64_t i = 0; i < count; i++) line[i] = codes[i];                                                        \
    } else {                                                                                                         \
      for (int64_t i = 0; i < count; i++) line[i] = code(x[i], inverse, low, high);                                  \
    }                                                                                                                \
    for (int64_t i = count; i < whole; i++) line[i] = 0;                                                             \
    if (phases == 1) {                                                                                               \
      std::memcpy(out, line, kChunk);                                                                                \
    } else if (phases == 2) {                                                                                        \
      for (int64_t j = 0; j < kChunk; j++) out[j] = line[2 * j];                                                     \
      for (int64_t j = 0; j < kChunk; j++) out[kChunk + j] = line[2 * j + 1];                                        \
    } else {                                                                                                         \
      for (int64_t p = 0; p < 4; p++)                                                                                \
        for (int64_t j = 0; j < kChunk; j++) out[p * kChunk + j] = line[4 * j + p];                                  \
    }                                                                                                                \
  }                                                                                                                  \
  TARGET int32_t NAME##_sum(const int8_t* codes, int64_t count) {                                                    \
    int32_t sum = 0;                                                                                                 \
    for (int64_t i = 0; i < count; i++) sum += codes[i];                                                             \
    return sum;                                                                                                      \
  }                                                                                                                  \
  /* Bits of the largest magnitude of a row: those of floats are in the order of the floats, NaN behind infinity. */ \
  TARGET int32_t NAME##_top(const float* x, int64_t count) {                                                         \
    int32_t top = 0;                                                                                                 \
    for (int64_t i = 0; i < count; i++) {                                                                            \
      int32_t word;                                                                                                  \
      std::memcpy(&word, x + i, 4);                                                                                  \
      word &= 0x7fffffff;                                                                                            \
      top = word > top ? word : top;                                                                                 \
    }                                                                                                                \
    return top;                                                                                                      \
  }

// The scale that `qjax.formats.Int` fits to a row.
inline float scale_of(int32_t top, float unit) {
  if (top > 0x7f800000) top = 0x7f800000;
  float largest;
  std::memcpy(&largest, &top, 4);
  const float scale = largest * unit;
  return scale > FLT_MIN ? scale : FLT_MIN;
}

QJAX_QUANTIZE_ROW(chunk_plain, )
#if defined(QJAX_WIDE)
QJAX_QUANTIZE_ROW(chunk_wide, QJAX_WIDE)
#endif

}  // namespace

void quantize_rows(const Quantize& what, int64_t first, int64_t last, int isa) {
  const int64_t phases = 8 / what.bits, whole = phases * kChunk, chunks = what.chunks();
  const int64_t groups = what.k == 0 ? 0 : (what.k + what.group - 1) / what.group;
  auto chunk = chunk_plain;
  auto sum = chunk_plain_sum;
  auto top = chunk_plain_top;
#if defined(QJAX_WIDE)
  if (isa >= kAvx512Vnni) {
    chunk = chunk_wide;
    sum = chunk_wide_sum;
    top = chunk_wide_top;
  }
#endif
  (void)isa;
  for (int64_t m = first; m < last; m++) {
    if (what.unit != 0.0f) what.sx[m] = scale_of(top(what.x + m * what.k, what.k), what.unit);
    const float inverse = what.codes ? 0.0f : 1.0f / what.sx[m];
    int8_t* q = what.q + m * chunks * whole;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t k = c * whole, left = what.k - k, count = left < whole ? left : whole;
      chunk(what.x ? what.x + m * what.k + k : nullptr, what.codes ? what.codes + m * what.k + k : nullptr, count,
            inverse, what.low, what.high, phases, q + k);
    }
    // Sums of groups: of whole chunks where groups are, else of the bytes of each phase.
    const int64_t bytes = what.group / phases;
    for (int64_t g = 0; g < groups; g++) {
      int32_t total = 0;
      const int64_t end = groups == 1 ? chunks * kChunk : (g + 1) * bytes;
      for (int64_t b = groups == 1 ? 0 : g * bytes; b < end && b < chunks * kChunk;) {
        const int64_t c = b / kChunk, from = b % kChunk;
        const int64_t to = end - c * kChunk < kChunk ? end - c * kChunk : kChunk;
        for (int64_t p = 0; p < phases; p++) total += sum(q + c * whole + p * kChunk + from, to - from);
        b = c * kChunk + to;
      }
      what.qsum[m * groups + g] = total;
    }
  }
}

}  // namespace qjax
