// Random problems of attention over a cache: every instruction set against the plain one, by one thread and by several to
// the same bits.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "attention.h"
#include "support.h"

namespace attention {

using support::Guarded;
using support::Threads;

inline bool one(std::mt19937& random, Threads& threads) {
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  qjax::Attention a{};
  a.sequences = 1 + below(3);
  a.heads = 1 + below(3);
  a.tokens = below(3) ? 1 : 1 + below(9);
  a.group = 1 + below(5);
  a.room = 1 + below(below(3) ? 100 : 800);
  a.k.dim = 1 + below(140);
  a.v.dim = 1 + below(140);
  a.scale = 0.1f;
  const int64_t rows = a.sequences * a.heads * a.tokens * a.group, vectors = a.sequences * a.heads * a.room;
  Guarded q(rows * a.k.dim * 4), lengths(a.sequences * 4), windows(a.sequences * 4), y(rows * a.v.dim * 4);
  for (int64_t i = 0; i < rows * a.k.dim; i++) q.as<float>()[i] = static_cast<float>(below(4001) - 2000) / 1000.0f;
  for (int64_t b = 0; b < a.sequences; b++) {
    lengths.as<int32_t>()[b] = static_cast<int32_t>(below(4) ? below(a.room + 1) : a.room + below(3));
    windows.as<int32_t>()[b] = static_cast<int32_t>(below(2) ? 2147483647 : below(a.room + 1));
  }
  std::vector<std::unique_ptr<Guarded>> kept;
  auto fill = [&](qjax::Codes& c) {
    c.bits = below(2) ? 8 : 4;
    c.is_signed = below(2);
    c.row_bytes = (c.dim * c.bits + 7) / 8;
    c.scale_type = below(2) ? qjax::kF32 : qjax::kF16;
    c.zero_type = static_cast<int>(below(4));
    const auto codes = new Guarded(vectors * c.row_bytes);
    kept.emplace_back(codes);
    for (int64_t i = 0; i < vectors * c.row_bytes; i++) codes->as<uint8_t>()[i] = static_cast<uint8_t>(random());
    c.codes = codes->as<uint8_t>();
    auto numbers = [&](int type, float most) -> const void* {
      if (type == qjax::kNone) return nullptr;
      const auto given = new Guarded(vectors * (type == qjax::kF32 ? 4 : type == qjax::kF16 ? 2 : 1));
      kept.emplace_back(given);
      for (int64_t i = 0; i < vectors; i++) {
        if (type == qjax::kF32)
          given->as<float>()[i] = most * static_cast<float>(1 + below(100)) / 100.0f;
        else if (type == qjax::kF16)
          given->as<uint16_t>()[i] = static_cast<uint16_t>(0x2000 + below(0x400));  // a little below 2^-6
        else
          given->as<uint8_t>()[i] = static_cast<uint8_t>(below(c.bits == 8 ? 256 : 16));
      }
      return given->as<char>();
    };
    c.scale = numbers(c.scale_type, 0.02f);
    c.zero = numbers(c.zero_type, 8.0f);
  };
  fill(a.k);
  fill(a.v);
  a.q = q.as<float>();
  a.lengths = lengths.as<int32_t>();
  a.windows = windows.as<int32_t>();
  a.y = y.as<float>();

  std::vector<float> plain, alone;
  for (int isa = 0; isa < qjax::kIsaCount; isa++) {
    if (!qjax::has_isa(isa)) continue;
    for (int64_t workers : {int64_t{1}, int64_t{3}}) {
      const qjax::Pool pool{workers, &threads, support::run};
      Guarded scratch(qjax::attention_scratch(a) * 4);
      std::memset(y.as<char>(), 0xff, rows * a.v.dim * 4);
      qjax::run_attention(a, isa, pool, scratch.as<float>());
      if (workers == 1) alone.assign(a.y, a.y + rows * a.v.dim);
      if (isa == 0 && workers == 1) plain = alone;
      bool good = std::memcmp(alone.data(), a.y, rows * a.v.dim * 4) == 0;
      for (int64_t i = 0; i < rows * a.v.dim; i++) good = good && std::fabs(plain[i] - a.y[i]) <= 2e-3f;
      if (good) continue;
      std::printf("attention, %s with %ld threads differs: %ld x %ld heads, %ld tokens, group %ld, room %ld, %ld and %ld\n",
                  qjax::isa_name(isa), long(workers), long(a.sequences), long(a.heads), long(a.tokens), long(a.group),
                  long(a.room), long(a.k.dim), long(a.v.dim));
      return false;
    }
  }
  return true;
}

}  // namespace attention
