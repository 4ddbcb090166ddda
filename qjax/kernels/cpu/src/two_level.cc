// Weights of two levels: the plain product, which instructions others run by, and how they are cut in tasks.
#include "two_level.h"

namespace qjax {

int best_isa(const TwoLevel& t) { return regular(t) ? best_isa(t.dot) : kPortable; }

// Each row becomes numbers in the order of the activations, then meets all of them.
void two_level_portable(const TwoLevel& t, int64_t n0, int64_t n1, char* scratch) {
  const Dot& d = t.dot;
  const int64_t phases = d.phases(), bytes = t.group_bytes(), length = d.q_stride();
  const uint8_t mask = static_cast<uint8_t>((1 << d.bits) - 1);
  int8_t* row = reinterpret_cast<int8_t*>(scratch);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = d.w + n * d.row_bytes;
    for (int64_t i = 0; i < length; i++) row[i] = 0;
    for (int64_t g = 0; g < t.groups(); g++) {
      int8_t table[16];
      for (int u = 0; u <= mask; u++) table[u] = t.number(u, n, g);
      const int64_t end = (g + 1) * bytes < d.row_bytes ? (g + 1) * bytes : d.row_bytes;
      for (int64_t b = g * bytes; b < end; b++)
        for (int64_t p = 0; p < phases; p++)
          row[(b / kChunk * phases + p) * kChunk + b % kChunk] = table[(w[b] >> (p * d.bits)) & mask];
    }
    for (int64_t m = 0; m < d.m; m++) {
      const int8_t* q = d.q + m * length;
      uint32_t sum = 0;
      for (int64_t i = 0; i < length; i += kChunk) {
        int32_t part = 0;  // of 64 products
        for (int64_t j = i; j < i + kChunk; j++) part += row[j] * q[j];
        sum += static_cast<uint32_t>(part);
      }
      d.y[m * d.n + n] = static_cast<float>(static_cast<int32_t>(sum)) * d.sx[m] * d.scale_at(n, 0);
    }
  }
}

namespace {

struct Work {
  const TwoLevel* product;
  int isa;
  int64_t step;
  char* scratch;
  int64_t bytes;
};

void task(void* argument, int64_t number, int64_t worker) {
  const Work& work = *static_cast<const Work*>(argument);
  const TwoLevel& t = *work.product;
  const int64_t n0 = number * work.step, n1 = n0 + work.step < t.dot.n ? n0 + work.step : t.dot.n;
  char* scratch = work.scratch + worker * work.bytes;
#if defined(__x86_64__)
  if (work.isa == kAvx2 || work.isa == kAvxVnni) return two_level_avx2(t, n0, n1, scratch);
  if (work.isa >= kAvx512Vnni) return two_level_avx512(t, n0, n1, scratch, work.isa == kAmx);
#elif defined(QJAX_HAS_NEON)
  if (work.isa >= kNeon) return two_level_neon(t, n0, n1, scratch, work.isa);
#endif
  two_level_portable(t, n0, n1, scratch);
}

}  // namespace

void run_two_level(const TwoLevel& t, int isa, const Pool& pool, char* scratch) {
  const Dot& d = t.dot;
  if (d.m == 0 || d.n == 0) return;
  if (d.k == 0) {
    for (int64_t i = 0; i < d.m * d.n; i++) d.y[i] = 0.0f;
    return;
  }
  if (!regular(t)) isa = kPortable;
  Work work{&t, isa, kPanel, scratch, scratch_bytes(d)};
  const int64_t count = (d.n + kPanel - 1) / kPanel;
  const bool small = d.m * d.n * d.k < (int64_t{1} << 17);  // less work than waking a thread
  const int64_t workers = small ? 1 : pool.workers < count ? pool.workers : count;
  pool.run(pool.context, workers, count, task, &work);
}

}  // namespace qjax
