// Random problems of candidate quantizers: losses against sums in double, by one thread and by several to the same bits.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "candidates.h"
#include "support.h"

namespace candidates {

using support::Guarded;
using support::Threads;

inline float bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline bool one(std::mt19937& random, Threads& threads) {
  if (!qjax::has_bf16_tiles()) return true;
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  auto number = [&] { return static_cast<float>(below(4001) - 2000) / 1000.0f; };
  qjax::Candidates c{};
  c.form = static_cast<int>(below(3));
  c.by_row = below(4) == 0;
  c.slices = c.by_row ? 1 : 1 + below(4);
  c.settings = c.slices;
  c.m = 1 + below(90);
  if (c.by_row) c.settings = c.m;
  c.k = 1 + below(80);
  c.p = c.form == qjax::kQuadratic ? c.k : c.form == qjax::kOwn ? 0 : 1 + below(70);
  c.count = 1 + below(3);
  c.top = 15;
  c.least = -50;
  const int64_t sizes[] = {0, 0, 9, 17, 32, 65, 257};
  c.entries = sizes[below(7)];
  const int64_t results = c.by_row ? c.m : c.slices;
  std::vector<std::unique_ptr<Guarded>> kept;
  auto array = [&](int64_t count) {
    kept.emplace_back(new Guarded(static_cast<size_t>(count) * 4));
    float* out = kept.back()->as<float>();
    for (int64_t i = 0; i < count; i++) out[i] = number();
    return out;
  };
  c.x = array(c.slices * c.m * c.k);
  c.number = c.entries ? array(c.slices * c.m * c.k) : nullptr;
  c.b = array(c.slices * c.p * c.k);
  c.rest = array(c.slices * c.m * c.p);
  float* scale = array(c.settings * c.count);
  float* other = array(c.settings * c.count);
  for (int64_t i = 0; i < c.settings * c.count; i++) {
    scale[i] = c.entries ? number() : 0.1f + std::fabs(number()) / 8;
    other[i] = c.entries ? 0.3f + std::fabs(number()) : static_cast<float>(below(16));
  }
  c.scale = scale;
  c.other = other;
  c.table = array(c.count * c.entries);
  c.loss = array(results * c.count);

  std::vector<double> want(static_cast<size_t>(results * c.count)), most(want.size());
  std::vector<float> e(static_cast<size_t>(c.k));
  for (int64_t s = 0; s < c.slices; s++)
    for (int64_t m = 0; m < c.m; m++)
      for (int64_t n = 0; n < c.count; n++) {
        const int64_t at = (c.by_row ? m : s) * c.count + n;
        const float unit = c.entries ? 1.0f : scale[at], inverse = 1.0f / scale[at];
        for (int64_t k = 0; k < c.k; k++) {
          const float x = c.x[(s * c.m + m) * c.k + k];
          if (c.entries) {
            const float u = std::fmin(std::fmax(x - scale[at], c.least), 0.0f);
            const float code = std::fmin(u * -other[at], static_cast<float>(c.entries - 1));
            e[k] = c.table[n * c.entries + static_cast<int64_t>(std::nearbyint(code))] - c.number[(s * c.m + m) * c.k + k];
          } else {
            const float t = x * inverse;
            e[k] = std::fmin(std::fmax(std::nearbyint(t), -other[at]), c.top - other[at]) - t;
          }
          if (c.form == qjax::kOwn) want[at] += static_cast<double>(e[k]) * e[k] * unit * unit;
          e[k] = bf16(e[k]);
        }
        for (int64_t p = 0; p < c.p; p++) {
          double sum = 0;
          for (int64_t k = 0; k < c.k; k++) sum += static_cast<double>(e[k]) * bf16(c.b[(s * c.p + p) * c.k + k]);
          sum = sum * unit + c.rest[(s * c.m + m) * c.p + p];
          const double term = c.form == qjax::kProduct ? sum * sum : sum * e[p] * unit;
          want[at] += term;
          most[at] += std::fabs(term);
        }
      }
  std::vector<float> alone;
  for (int64_t workers : {int64_t{1}, int64_t{3}}) {
    const qjax::Pool pool{workers, &threads, support::run};
    auto lines = [](int64_t bytes) { return static_cast<size_t>((bytes + 127) / 64 * 64); };
    std::unique_ptr<void, void (*)(void*)> packed(std::aligned_alloc(64, lines(c.packed_elements() * 2)), std::free);
    std::unique_ptr<void, void (*)(void*)> partial(std::aligned_alloc(64, lines(c.tasks() * c.count * 8)), std::free);
    std::unique_ptr<void, void (*)(void*)> scratch(
        std::aligned_alloc(64, static_cast<size_t>((c.scratch_bytes() + 63) / 64 * 64 * workers)), std::free);
    std::memset(c.loss, 0xff, static_cast<size_t>(results * c.count) * 4);
    qjax::run_candidates(c, pool, static_cast<uint16_t*>(packed.get()), static_cast<double*>(partial.get()),
                         static_cast<char*>(scratch.get()));
    if (workers == 1) alone.assign(c.loss, c.loss + results * c.count);
    bool good = std::memcmp(alone.data(), c.loss, static_cast<size_t>(results * c.count) * 4) == 0;
    for (size_t i = 0; i < want.size(); i++)
      good = good && std::fabs(want[i] - c.loss[i]) <= 1e-4 * (most[i] + std::fabs(want[i])) + 1e-4;
    if (good) continue;
    std::printf("candidates with %ld threads differ: %ld x %ld x %ld by %ld, form %d, %ld entries, by row %d\n", long(workers),
                long(c.slices), long(c.m), long(c.k), long(c.p), c.form, long(c.entries), int(c.by_row));
    return false;
  }
  return true;
}

}  // namespace candidates
