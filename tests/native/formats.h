// Random problems of weights in formats other than integers with float scales.
#pragma once
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "problem.h"
#include "support.h"
#include "two_level.h"

namespace formats {

using support::Aligned;
using support::Guarded;
using support::Threads;

struct Draw {
  std::mt19937& random;
  int64_t below(int64_t n) const { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }
  void bytes(const Guarded& memory, int64_t count) const {
    for (int64_t i = 0; i < count; i++) memory.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  }
};

// Activations in the order of a product: of floats, quantized by an instruction set.
inline void quantize(const float* x, float* sx, qjax::Dot& d, const Guarded& q, const Guarded& sums, int isa) {
  qjax::Quantize what{};
  what.m = d.m;
  what.k = d.k;
  what.bits = d.bits;
  what.group = d.group;
  what.x = x;
  what.sx = sx;
  what.low = -128;
  what.high = 127;
  what.q = q.as<int8_t>();
  what.qsum = sums.as<int32_t>();
  qjax::quantize_rows(what, 0, d.m, isa);
  d.q = what.q;
  d.qsum = what.qsum;
  d.sx = sx;
}

inline bool two_level(const Draw& draw, Threads& threads) {
  const int64_t all_groups[] = {0, 32, 64, 128, 40, 256};
  qjax::TwoLevel t{};
  qjax::Dot& d = t.dot;
  d.bits = draw.below(3) ? 4 : 2;
  d.m = draw.below(3) ? 1 + draw.below(40) : 1;
  d.n = 1 + draw.below(150);
  d.k = 1 + draw.below(700);
  d.row_bytes = (d.k * d.bits + 7) / 8;
  qjax::as_one_group(d);
  const int64_t group = all_groups[draw.below(6)];
  t.group = group > 0 && group < d.k ? group : d.k;
  t.after = draw.below(2);
  const int64_t groups = t.groups();
  Guarded w(d.n * d.row_bytes), scale(d.n * 4), step(d.n * groups), zeros(d.n * groups), x(d.m * d.k * 4), sx(d.m * 4);
  draw.bytes(w, d.n * d.row_bytes);
  draw.bytes(step, d.n * groups);  // whatever wraps around in a byte has to do so everywhere
  draw.bytes(zeros, d.n * groups);
  for (int64_t i = 0; i < d.n; i++) scale.as<float>()[i] = 0.01f * static_cast<float>(1 + draw.below(100));
  for (int64_t i = 0; i < d.m * d.k; i++) x.as<float>()[i] = static_cast<float>(draw.below(4001) - 2000) / 300.0f;
  for (int64_t i = 0; i < d.m; i++) sx.as<float>()[i] = 0.05f;
  d.w = w.as<uint8_t>();
  d.scale = scale.as<float>();
  d.scale_n = 1;
  t.step = step.as<int8_t>();
  t.zeros = zeros.as<uint8_t>();
  t.step_n = t.zeros_n = groups;
  t.step_g = t.zeros_g = 1;
  const qjax::Pool pool{3, &threads, support::run};
  std::vector<float> expected;
  for (int isa = 0; isa < qjax::kIsaCount; isa++) {
    if (!qjax::has_isa(isa)) continue;
    Guarded q(d.m * d.q_stride() + 64), sums(d.m * 4), y(d.m * d.n * 4);
    quantize(x.as<float>(), sx.as<float>(), d, q, sums, isa);
    d.y = y.as<float>();
    Aligned scratch(qjax::scratch_bytes(d) * pool.workers);
    qjax::run_two_level(t, isa, pool, scratch.data);
    if (isa == 0) expected.assign(d.y, d.y + d.m * d.n);
    if (std::memcmp(expected.data(), d.y, d.m * d.n * 4)) {
      std::printf("two levels, %s differs: bits %ld group %ld after %d m %ld n %ld k %ld\n", qjax::isa_name(isa),
                  long(d.bits), long(t.group), t.after, long(d.m), long(d.n), long(d.k));
      return false;
    }
  }
  return true;
}

inline bool one(std::mt19937& random, Threads& threads) {
  const Draw draw{random};
  return two_level(draw, threads);
}

}  // namespace formats
