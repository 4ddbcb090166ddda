// Weights of 2-bit and 4-bit strips: the plain product, sparse numbers, and how work is cut in tasks.
#include "mixed.h"

#include <cstring>

namespace qjax {

float from_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, rest = bits & 0x3ff;
  if (exponent == 0) {
    const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
  const uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (rest << 13);
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

float power_of_two(int32_t exponent) {
  const uint32_t word = static_cast<uint32_t>(exponent + 127) << 23;
  float out;
  std::memcpy(&out, &word, 4);
  return out;
}

int best_isa(const Mixed& f) {
  // Strips of 8 columns have words of 16 bits, which are left to the plain form.
  return f.strip >= 16 && has_isa(kAvx512Vnni) ? kAvx512Vnni : kPortable;
}

// A block of the weight with its rows side by side, and numbers of 16 rows.
int64_t scratch_bytes(const Mixed& f) { return ((f.row_bytes + 63) / 64 * 64) * kBlock + 4096; }

void mixed_portable(const Mixed& f, int64_t n0, int64_t n1) {
  for (int64_t m = 0; m < f.m; m++)
    for (int64_t n = n0; n < n1; n++) f.y[m * f.n + n] = 0.0f;
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = f.w + n * f.row_bytes;
    for (int64_t place = 0; place < f.strips(); place++) {
      float scale, numbers[64];
      const uint8_t* at = w + f.word_of(place) * f.word();
      if (place < f.narrow) {
        const int64_t triple = place / 3, j = place % 3, tile = n / f.tile;
        const int32_t word = f.words[n * f.triples() + triple];
        int32_t shift = 6;
        for (int64_t i = 0; i < j; i++) shift += f.scale_bits[i];
        const int32_t zero = (word >> (2 * j)) & 3, code = (word >> shift) & ((1 << f.scale_bits[j]) - 1);
        const int32_t offset = (f.tile_zero[tile * f.triples() + triple] >> (4 * j)) & 15;
        scale = static_cast<float>(code + offset) * from_half(f.tile_scale[tile * 3 * f.triples() + place]);
        for (int64_t c = 0; c < f.strip; c++)
          numbers[c] = static_cast<float>(((at[c / 4] >> (2 * (c % 4))) & 3) - zero);
      } else {
        const int64_t j = place - f.narrow, g = j / f.per_group;
        const uint8_t* tail = w + (f.strips() + j) * f.word();
        scale = from_half(f.wide_scale[n * f.groups() + g]);
        const int32_t zero = (f.wide_zero[n * ((f.groups() + 1) / 2) + g / 2] >> (4 * (g % 2))) & 15;
        for (int64_t c = 0; c < f.strip; c++) {
          const uint8_t byte = c < f.strip / 2 ? at[c / 2] : tail[(c - f.strip / 2) / 2];
          numbers[c] = static_cast<float>(((byte >> (4 * (c % 2))) & 15) - zero);
        }
      }
      scale *= f.unit;
      for (int64_t m = 0; m < f.m; m++) {
        const float* x = f.x + m * f.x_stride() + f.column[place];
        float sum = 0.0f;
        for (int64_t c = 0; c < f.strip; c++) sum += numbers[c] * x[c];
        f.y[m * f.n + n] += sum * scale;
      }
    }
  }
}

namespace {

// What sparse numbers add to rows [n0, n1). Rows and columns that are not there, which no fitted weight has, add nothing.
void add_sparse(const Mixed& f, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n++) {
    const int64_t first = f.row[n], last = f.row[n + 1] < f.sparse ? f.row[n + 1] : f.sparse;
    for (int64_t i = first; i < last; i++) {
      const int64_t at = f.at_is_long ? static_cast<const uint32_t*>(f.at)[i] : static_cast<const uint16_t*>(f.at)[i];
      if (at >= f.k) continue;
      const float number = from_half(f.value[i]) * f.unit;
      for (int64_t m = 0; m < f.m; m++) f.y[m * f.n + n] += number * f.x[m * f.x_stride() + at];
    }
  }
}

struct Work {
  const Mixed* product;
  int isa;
  char* scratch;
  int64_t bytes;
};

void task(void* argument, int64_t number, int64_t worker) {
  const Work& work = *static_cast<const Work*>(argument);
  const Mixed& f = *work.product;
  const int64_t n0 = number * kPanel, n1 = n0 + kPanel < f.n ? n0 + kPanel : f.n;
  char* scratch = work.scratch + worker * work.bytes;
  (void)scratch;
#if defined(__x86_64__)
  if (work.isa >= kAvx512Vnni)
    mixed_avx512(f, n0, n1, scratch);
  else
#endif
    mixed_portable(f, n0, n1);
  if (f.sparse > 0) add_sparse(f, n0, n1);
}

}  // namespace

void run_mixed(const Mixed& f, int isa, const Pool& pool, char* scratch) {
  if (f.m == 0 || f.n == 0) return;
  if (f.strip < 16) isa = kPortable;
  Work work{&f, isa, scratch, scratch_bytes(f)};
  const int64_t count = (f.n + kPanel - 1) / kPanel;
  const bool small = f.m * f.n * f.k < (int64_t{1} << 17);  // less work than waking a thread
  pool.run(pool.context, small ? 1 : pool.workers < count ? pool.workers : count, count, task, &work);
}

}  // namespace qjax
