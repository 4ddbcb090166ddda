// Random problems of weights in formats other than integers with float scales.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "mixed.h"
#include "problem.h"
#include "support.h"
#include "trits.h"
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
    if (isa == 0) {
      expected.assign(d.y, d.y + d.m * d.n);
      support::digest.add(expected);
    }
    if (std::memcmp(expected.data(), d.y, d.m * d.n * 4)) {
      std::printf("two levels, %s differs: bits %ld group %ld after %d m %ld n %ld k %ld\n", qjax::isa_name(isa),
                  long(d.bits), long(t.group), t.after, long(d.m), long(d.n), long(d.k));
      return false;
    }
  }
  return true;
}

// Sums of floats: close to the plain ones, and no memory that is not there.
inline bool mixed(const Draw& draw, Threads& threads) {
  const int64_t all_strips[] = {8, 16, 16, 32, 64};
  qjax::Mixed f{};
  f.strip = all_strips[draw.below(5)];
  f.m = 1 + draw.below(7);
  f.n = 1 + draw.below(100);
  f.aligned = draw.below(2);
  f.wide = draw.below(6);
  f.narrow = f.aligned ? 3 * f.wide : draw.below(9);
  if (f.strips() == 0) f.narrow = 1, f.aligned = false;
  f.k = f.x_stride() - draw.below(f.strip);
  f.tile = draw.below(2) ? 16 : 1 + draw.below(20);
  f.per_group = 1 + draw.below(4);
  f.scale_bits[0] = f.scale_bits[1] = 3;
  f.scale_bits[2] = 4;
  f.row_bytes = (f.strips() + f.wide) * f.word();
  f.unit = 0.25f;
  f.sparse = draw.below(3) ? draw.below(f.n * f.k) : 0;
  f.at_is_long = draw.below(2);
  const int64_t tiles = (f.n + f.tile - 1) / f.tile, zeros = (f.groups() + 1) / 2, numbers = f.m * f.x_stride();
  Guarded w(f.n * f.row_bytes), words(f.n * f.triples() * 2), step(tiles * f.triples() * 6), offset(tiles * f.triples() * 2);
  Guarded scale(f.n * f.groups() * 2), zero(f.n * zeros), value(f.sparse * 2), at(f.sparse * 4), row(f.n * 4 + 4);
  Guarded column(f.strips() * 4), x(numbers * 4);
  draw.bytes(w, f.n * f.row_bytes);
  draw.bytes(words, f.n * f.triples() * 2);
  draw.bytes(offset, tiles * f.triples() * 2);
  draw.bytes(zero, f.n * zeros);
  auto half = [&] { return static_cast<uint16_t>(0x3000 + draw.below(0x0c00)); };  // 0.125 to 1
  for (int64_t i = 0; i < tiles * f.triples() * 3; i++) step.as<uint16_t>()[i] = half();
  for (int64_t i = 0; i < f.n * f.groups(); i++) scale.as<uint16_t>()[i] = half();
  for (int64_t i = 0; i < f.sparse; i++) {
    value.as<uint16_t>()[i] = half();
    if (f.at_is_long)
      at.as<uint32_t>()[i] = static_cast<uint32_t>(draw.random());
    else
      at.as<uint16_t>()[i] = static_cast<uint16_t>(draw.below(f.k + 1));
  }
  for (int64_t i = 0; i <= f.n; i++) row.as<uint32_t>()[i] = static_cast<uint32_t>(i * f.sparse / f.n);
  for (int64_t i = 0; i < f.strips(); i++) column.as<int32_t>()[i] = static_cast<int32_t>((f.strips() - 1 - i) * f.strip);
  for (int64_t i = 0; i < numbers; i++) x.as<float>()[i] = static_cast<float>(draw.below(2001) - 1000) / 1000.0f;
  f.w = w.as<uint8_t>();
  f.words = words.as<uint16_t>();
  f.tile_scale = step.as<uint16_t>();
  f.tile_zero = offset.as<uint16_t>();
  f.wide_scale = scale.as<uint16_t>();
  f.wide_zero = zero.as<uint8_t>();
  f.column = column.as<int32_t>();
  f.value = value.as<uint16_t>();
  f.at = f.at_is_long ? static_cast<const void*>(at.as<uint32_t>()) : at.as<uint16_t>();
  f.row = row.as<uint32_t>();
  f.x = x.as<float>();
  const qjax::Pool pool{3, &threads, support::run};
  std::vector<float> expected;
  for (int isa : {qjax::kPortable, qjax::kAvx512Vnni}) {
    if (!qjax::has_isa(isa)) continue;
    Guarded y(f.m * f.n * 4);
    f.y = y.as<float>();
    Aligned scratch(qjax::scratch_bytes(f) * pool.workers);
    qjax::run_mixed(f, isa, pool, scratch.data);
    if (isa == 0) expected.assign(f.y, f.y + f.m * f.n);
    for (int64_t i = 0; i < f.m * f.n; i++) {
      const float most = 31.0f * 15.0f * static_cast<float>(f.x_stride());
      if (!(std::fabs(expected[i] - f.y[i]) <= 1e-6f * most)) {
        std::printf("strips, %s differs: strip %ld narrow %ld wide %ld m %ld n %ld k %ld\n", qjax::isa_name(isa),
                    long(f.strip), long(f.narrow), long(f.wide), long(f.m), long(f.n), long(f.k));
        return false;
      }
    }
  }
  return true;
}

inline bool trits(const Draw& draw, Threads& threads) {
  const int64_t all_groups[] = {0, 32, 64, 128, 33, 7};
  qjax::Trits t{};
  qjax::Dot& d = t.dot;
  t.planes = 1 + draw.below(3);
  t.store = draw.below(t.planes == 2 ? 3 : 2);
  d.m = 1 + draw.below(7);
  d.n = 1 + draw.below(100);
  d.k = d.row_bytes = 1 + draw.below(500);
  d.bits = 8;
  const int64_t group = all_groups[draw.below(6)];
  d.group = group > 0 && group < d.k ? group : d.k;
  qjax::describe_trits(t);
  const int64_t groups = d.groups(), scales = t.planes * d.n * groups;
  Guarded w(d.n * t.row_bytes), scale(scales * 4), x(d.m * d.k * 4), sx(d.m * 4);
  for (int64_t i = 0; i < d.n * t.row_bytes; i++) {
    const int64_t byte = draw.below(t.store == qjax::kBase3 ? 243 : 256);
    w.as<uint8_t>()[i] = static_cast<uint8_t>(byte);
    if (t.store == qjax::kTwoBit)  // 10 stands for no trit
      w.as<uint8_t>()[i] = static_cast<uint8_t>(byte & ~(byte & 0xaa & ~((byte & 0x55) << 1)));
  }
  for (int64_t i = 0; i < scales; i++) scale.as<float>()[i] = 0.01f * static_cast<float>(1 + draw.below(100));
  for (int64_t i = 0; i < d.m * d.k; i++) x.as<float>()[i] = static_cast<float>(draw.below(4001) - 2000) / 300.0f;
  for (int64_t i = 0; i < d.m; i++) sx.as<float>()[i] = 0.05f;
  t.w = w.as<uint8_t>();
  t.scale = scale.as<float>();
  const qjax::Pool pool{3, &threads, support::run};
  std::vector<float> expected;
  for (int isa : {qjax::kPortable, qjax::kAvx512Vnni}) {
    if (!qjax::has_isa(isa)) continue;
    Guarded q(d.m * d.q_stride() + 64), sums(d.m * groups * 4), y(d.m * d.n * 4);
    Guarded laid(t.planes < 3 ? d.m * t.laid_stride() : 1);
    quantize(x.as<float>(), sx.as<float>(), d, q, sums, isa);
    if (t.planes < 3) qjax::arrange_trits(t, laid.as<int8_t>());
    t.laid = laid.as<int8_t>();
    d.y = y.as<float>();
    Aligned scratch(qjax::scratch_bytes(t) * pool.workers);
    qjax::run_trits(t, isa, pool, scratch.data);
    if (isa == 0) {
      expected.assign(d.y, d.y + d.m * d.n);
      support::digest.add(expected);
    }
    if (std::memcmp(expected.data(), d.y, d.m * d.n * 4)) {
      std::printf("trits, %s differs: planes %ld store %ld group %ld m %ld n %ld k %ld\n", qjax::isa_name(isa),
                  long(t.planes), long(t.store), long(d.group), long(d.m), long(d.n), long(d.k));
      return false;
    }
  }
  return true;
}

// Those of which every processor has the same bits.
inline bool exact(std::mt19937& random, Threads& threads) {
  const Draw draw{random};
  return draw.below(2) ? two_level(draw, threads) : trits(draw, threads);
}

inline bool one(std::mt19937& random, Threads& threads) {
  const Draw draw{random};
  switch (draw.below(3)) {
    case 0:
      return two_level(draw, threads);
    case 1:
      return mixed(draw, threads);
    default:
      return trits(draw, threads);
  }
}

}  // namespace formats
