// Trit-planes: the plain product, the order of activations, and how work is cut in tasks.
#include "trits.h"

namespace qjax {

void describe_trits(Trits& t) {
  const int64_t k = t.dot.k;
  t.run = t.store == kBase3 ? 5 : t.store == kTwoBit ? 4 : 2;
  t.row_bytes = (k + t.run - 1) / t.run * (t.store == kNibble ? 1 : t.planes);
}

void arrange_trits(const Trits& t, int8_t* laid) {
  const Dot& d = t.dot;
  const int64_t columns = t.columns(), slots = t.slots(), words = t.words(), groups = d.groups();
  for (int64_t m = 0; m < d.m; m++) {
    const int8_t* q = d.q + m * d.q_stride();
    for (int64_t g = 0; g < groups; g++) {
      const int64_t begin = g * d.group, end = begin + d.group < d.k ? begin + d.group : d.k;
      for (int64_t i = 0; i < words; i++)
        for (int64_t s = 0; s < slots; s++)
          for (int64_t b = 0; b < 4; b++) {
            // Byte b of vector s of a word: which trit of which run, or nothing.
            int64_t at;
            if (t.store == kNibble) {
              at = 2 * b + s;
            } else {
              const int64_t half = (t.run + 1) / 2, first = t.planes == 1 ? s / half : 0;
              const int64_t run = t.planes == 1 ? b / 2 * 2 + first : b / 2, trit = 2 * (s % half) + b % 2;
              at = trit < t.run ? run * t.run + trit : -1;
            }
            const int64_t k = (begin / columns + i) * columns + at;
            *laid++ = at >= 0 && k >= begin && k < end ? q[k] : int8_t{0};
          }
    }
  }
}

int best_isa(const Trits& t) { return t.planes < 3 && has_isa(kAvx512Vnni) ? kAvx512Vnni : kPortable; }

int64_t scratch_bytes(const Trits& t) {
  const int64_t words = (t.row_bytes + 63) / 64 * 64 * kBlock, trits = (t.dot.k + 63) / 64 * 64;
  return (words > trits ? words : trits) + 64;
}

void trits_portable(const Trits& t, int64_t n0, int64_t n1, char* scratch) {
  const Dot& d = t.dot;
  int8_t* row = reinterpret_cast<int8_t*>(scratch);
  for (int64_t m = 0; m < d.m; m++)
    for (int64_t n = n0; n < n1; n++) d.y[m * d.n + n] = 0.0f;
  for (int64_t n = n0; n < n1; n++) {
    for (int64_t g = 0; g < d.groups(); g++) {
      const int64_t begin = g * d.group, end = begin + d.group < d.k ? begin + d.group : d.k;
      for (int64_t p = 0; p < t.planes; p++) {
        for (int64_t k = begin; k < end; k++) row[k] = static_cast<int8_t>(t.digit(n, k, p) - 1);
        for (int64_t m = 0; m < d.m; m++) {
          const int8_t* q = d.q + m * d.q_stride();
          int32_t sum = 0;
          for (int64_t k = begin; k < end; k++) sum += row[k] * q[k];
          d.y[m * d.n + n] += static_cast<float>(sum) * t.scale_at(p, n, g);
        }
      }
    }
    for (int64_t m = 0; m < d.m; m++) d.y[m * d.n + n] *= d.sx[m];
  }
}

namespace {

struct Work {
  const Trits* product;
  int isa;
  char* scratch;
  int64_t bytes;
};

void task(void* argument, int64_t number, int64_t worker) {
  const Work& work = *static_cast<const Work*>(argument);
  const Trits& t = *work.product;
  const int64_t n0 = number * kPanel, n1 = n0 + kPanel < t.dot.n ? n0 + kPanel : t.dot.n;
  char* scratch = work.scratch + worker * work.bytes;
#if defined(__x86_64__)
  if (work.isa >= kAvx512Vnni) return trits_avx512(t, n0, n1, scratch);
#endif
  trits_portable(t, n0, n1, scratch);
}

}  // namespace

void run_trits(const Trits& t, int isa, const Pool& pool, char* scratch) {
  const Dot& d = t.dot;
  if (d.m == 0 || d.n == 0) return;
  if (t.planes == 3) isa = kPortable;
  Work work{&t, isa, scratch, scratch_bytes(t)};
  const int64_t count = (d.n + kPanel - 1) / kPanel;
  const bool small = d.m * d.n * d.k < (int64_t{1} << 17);  // less work than waking a thread
  pool.run(pool.context, small ? 1 : pool.workers < count ? pool.workers : count, count, task, &work);
}

}  // namespace qjax
