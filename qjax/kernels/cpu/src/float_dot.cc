// Products with activations that stay floats: how they are laid out, the plain form, and how work is cut in tasks.
#include <cstring>

#include "problem.h"

namespace qjax {

// Where column k of a row stands in a laid out chunk: word d and code j of it.
static inline int64_t place(int64_t k, int64_t bits) {
  const int64_t per_word = 32 / bits, chunk = k / (16 * per_word), in = k % (16 * per_word);
  return chunk * 16 * per_word + in % per_word * 16 + in / per_word;
}

void arrange_floats(const float* x, int64_t m, int64_t k, int64_t bits, float* out) {
  const int64_t per_chunk = 512 / bits, chunks = ((k * bits + 7) / 8 + kChunk - 1) / kChunk;
  std::memset(out, 0, static_cast<size_t>(m * chunks * per_chunk) * 4);
  for (int64_t r = 0; r < m; r++)
    for (int64_t i = 0; i < k; i++) out[r * chunks * per_chunk + place(i, bits)] = x[r * k + i];
}

void float_rows_portable(const FloatDot& f, int64_t n0, int64_t n1) {
  const Dot& d = f.dot;
  const int64_t per_byte = 8 / d.bits;
  const uint8_t mask = static_cast<uint8_t>((1 << d.bits) - 1);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = d.w + n * d.row_bytes;
    for (int64_t m = 0; m < d.m; m++) {
      const float* x = f.x + m * f.x_stride();
      float total = 0.0f;
      for (int64_t g = 0; g < d.groups(); g++) {
        const int64_t end = (g + 1) * d.group < d.k ? (g + 1) * d.group : d.k;
        const float scale = d.scale_at(n, g);
        const int32_t zero = d.zero_at(n, g);
        for (int64_t k = g * d.group; k < end; k++) {
          const int32_t u = (static_cast<uint8_t>(w[k / per_byte] ^ d.flip) >> (k % per_byte * d.bits)) & mask;
          total += static_cast<float>(u - zero) * scale * x[place(k, d.bits)];
        }
      }
      d.y[m * d.n + n] = total;
    }
  }
}

namespace {

struct Work {
  const FloatDot* dot;
  int isa;
  int64_t step;
};

void task(void* argument, int64_t number, int64_t) {
  const Work& work = *static_cast<const Work*>(argument);
  const int64_t n0 = number * work.step, n = work.dot->dot.n, n1 = n0 + work.step < n ? n0 + work.step : n;
#if defined(__x86_64__)
  if (work.isa >= kAvx512Vnni) return float_rows_avx512(*work.dot, n0, n1);
#elif defined(QJAX_HAS_NEON)
  if (work.isa >= kNeon) return float_rows_neon(*work.dot, n0, n1);
#endif
  float_rows_portable(*work.dot, n0, n1);
}

}  // namespace

void run_float_dot(const FloatDot& f, int isa, const Pool& pool) {
  const Dot& d = f.dot;
  if (d.m == 0 || d.n == 0) return;
  if (!regular(d)) isa = kPortable;
  const int64_t tasks = 4 * pool.workers;
  Work work{&f, isa, (d.n + tasks - 1) / tasks};
  work.step = (work.step + 7) / 8 * 8;
  const int64_t count = (d.n + work.step - 1) / work.step;
  const bool small = d.m * d.n * d.k < (int64_t{1} << 17);
  pool.run(pool.context, small ? 1 : pool.workers < count ? pool.workers : count, count, task, &work);
}

}  // namespace qjax
