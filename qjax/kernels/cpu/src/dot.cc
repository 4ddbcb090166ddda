// Which instructions a product runs by, and how it is cut in tasks.
#include "problem.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(QJAX_HAS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(QJAX_HAS_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace qjax {

#if defined(QJAX_HAS_NEON)
namespace {

// What the system says of the processor; nothing more than every one has where it is not known how to ask.
#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
bool says(const char* name) {
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there != 0;
}
bool has_dotprod() { return says("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return says("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace
#endif

bool has_isa(int isa) {
  if (isa == kPortable) return true;
#if defined(__x86_64__)
  if (isa == kAvx2) return __builtin_cpu_supports("avx2");
#if defined(QJAX_HAS_AVX_VNNI)
  if (isa == kAvxVnni) {
    static const bool there = [] {
      unsigned a = 0, b, c, d;
      return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
    }();
    return there;
  }
#endif
  if (isa == kAvx512Vnni || isa == kAmx) {
    static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    if (isa == kAvx512Vnni) return wide;
#if defined(QJAX_HAS_AMX)
    return wide && amx_allowed();
#endif
  }
#endif
#if defined(QJAX_HAS_NEON)
  if (isa == kNeon) return true;
#if defined(QJAX_HAS_DOTPROD)
  static const bool dots = has_dotprod();
  if (isa == kDotprod) return dots;
#if defined(QJAX_HAS_I8MM)
  static const bool matrices = has_i8mm();
  if (isa == kI8mm) return dots && matrices;
#endif
#endif
#endif
  return false;
}

const char* isa_name(int isa) {
  static const char* const names[kIsaCount] = {"portable", "avx2", "avx_vnni", "avx512_vnni", "amx",
                                                 "neon",     "dotprod", "i8mm"};
  return isa >= 0 && isa < kIsaCount ? names[isa] : "unknown";
}

bool regular(const Dot& d) {
  const int64_t bytes = d.group_bytes();
  return d.groups() <= 1 || bytes % kChunk == 0 || bytes == 32 || bytes == 16;
}

int best_isa(const Dot& d) {
  if (!regular(d)) return kPortable;
  for (int isa = kIsaCount - 1; isa > kPortable; isa--) {
    if (isa == kAmx && d.m < 8) continue;  // tiles half empty: level with vectors (benchmarks/cpu_native.py)
    if (has_isa(isa)) return isa;
  }
  return kPortable;
}

// A panel laid out anew, its scales and zero points, and float sums of a tile.
int64_t scratch_bytes(const Dot& d) {
  const int64_t laid = kPanel * d.q_stride(), numbers = 2 * kPanel * (d.groups() + 1) * 4;
  const int64_t bytes = laid + numbers + 64 * 1024;
  return (bytes + 63) / 64 * 64;
}

namespace {

struct Work {
  const Dot* dot;
  int isa;
  int64_t step;
  char* scratch;
  int64_t bytes;
};

void task(void* argument, int64_t number, int64_t worker) {
  const Work& work = *static_cast<const Work*>(argument);
  const Dot& d = *work.dot;
  const int64_t n0 = number * work.step, n1 = n0 + work.step < d.n ? n0 + work.step : d.n;
  char* scratch = work.scratch + worker * work.bytes;
  (void)scratch;
  switch (work.isa) {
#if defined(__x86_64__)
    case kAvx2:
      return panel_avx2(d, n0, n1);
#if defined(QJAX_HAS_AVX_VNNI)
    case kAvxVnni:
      return panel_avx_vnni(d, n0, n1);
#endif
    case kAvx512Vnni:
      return panel_avx512(d, n0, n1, scratch);
#if defined(QJAX_HAS_AMX)
    case kAmx:
      return panel_amx(d, n0, n1, scratch);
#endif
#elif defined(QJAX_HAS_NEON)
    case kNeon:
    case kDotprod:
    case kI8mm:
      return panel_arm(d, n0, n1, work.isa);
#endif
    default:
      return panel_portable(d, n0, n1);
  }
}

}  // namespace

#if defined(QJAX_HAS_NEON)
void panel_arm(const Dot& d, int64_t n0, int64_t n1, int isa) {
#if defined(QJAX_HAS_I8MM)
  if (isa == kI8mm) return panel_i8mm(d, n0, n1);
#endif
#if defined(QJAX_HAS_DOTPROD)
  if (isa == kDotprod) return panel_dotprod(d, n0, n1);
#endif
  (void)isa;
  panel_neon(d, n0, n1);
}
#endif

void run_dot(const Dot& d, int isa, const Pool& pool, char* scratch) {
  if (d.m == 0 || d.n == 0) return;
  if (d.k == 0) {
    for (int64_t i = 0; i < d.m * d.n; i++) d.y[i] = 0.0f;
    return;
  }
  if (!regular(d)) isa = kPortable;
  // Panels for many rows; for one row as many blocks at a time as leave each thread four tasks, to share evenly.
  int64_t step = kPanel;
  if (d.m == 1 && isa != kAmx) {
    const int64_t blocks = (d.n + kBlock - 1) / kBlock, tasks = 4 * pool.workers;
    step = kBlock * ((blocks + tasks - 1) / tasks);
  }
  Work work{&d, isa, step, scratch, scratch_bytes(d)};
  const int64_t count = (d.n + step - 1) / step;
  const bool small = d.m * d.n * d.k < (int64_t{1} << 17);  // less work than waking a thread
  const int64_t workers = small ? 1 : pool.workers < count ? pool.workers : count;
  pool.run(pool.context, workers, count, task, &work);
}

}  // namespace qjax
