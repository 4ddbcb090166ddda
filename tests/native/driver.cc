// The CPU kernels without XLA and Python, for sanitizers: random problems, every instruction set against the plain one
// bit for bit, from several threads at once, each array ending where a page begins that may not be touched.
//
//   c++ -std=c++17 -g -O1 -pthread -ffp-contract=off -fsanitize=... -I qjax/kernels/cpu/src tests/native/driver.cc \
//       $(ls qjax/kernels/cpu/src/*.cc | grep -v /ffi) -o driver && ./driver SECONDS
//
// `./driver digest COUNT` runs as many problems of integer sums, always the same, and prints a digest of the results.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "attention_problems.h"
#include "candidate_problems.h"
#include "float_tiles.h"
#include "formats.h"
#include "problem.h"
#include "support.h"

namespace {

using namespace support;

bool one(std::mt19937& random, Threads& threads) {
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const int64_t all_bits[] = {2, 4, 8}, all_groups[] = {0, 0, 32, 64, 128, 40, 256};
  qjax::Dot d{};
  d.bits = all_bits[below(3)];
  d.m = below(3) ? 1 + below(40) : 1;
  d.n = 1 + below(150);
  d.k = 1 + below(700);
  const int64_t group = all_groups[below(7)];
  d.group = group > 0 && group < d.k ? group : d.k;
  d.row_bytes = (d.k * d.bits + 7) / 8;
  const int64_t groups = d.groups();
  const bool is_signed = below(2), codes = below(4) == 0;
  if (is_signed) {
    d.flip = d.bits == 8 ? 0x80 : d.bits == 4 ? 0x88 : 0xaa;
    d.zero = 1 << (d.bits - 1);
  }
  Guarded w(d.n * d.row_bytes), scale(d.n * groups * 4), zeros(d.n * groups), x(d.m * d.k * (codes ? 1 : 4)), sx(d.m * 4);
  for (int64_t i = 0; i < d.n * d.row_bytes; i++) w.as<uint8_t>()[i] = static_cast<uint8_t>(random());
  for (int64_t i = 0; i < d.n * groups; i++) {
    scale.as<float>()[i] = 0.01f * static_cast<float>(1 + below(100));
    zeros.as<uint8_t>()[i] = static_cast<uint8_t>(below(int64_t{1} << d.bits));
  }
  for (int64_t i = 0; i < d.m * d.k; i++) {
    if (codes)
      x.as<int8_t>()[i] = static_cast<int8_t>(random());
    else
      x.as<float>()[i] = below(50) ? static_cast<float>(below(4001) - 2000) / 300.0f : std::strtof("nan", nullptr);
  }
  for (int64_t i = 0; i < d.m; i++) sx.as<float>()[i] = 0.05f;
  d.w = w.as<uint8_t>();
  d.scale = scale.as<float>();
  d.scale_n = groups;
  d.scale_g = 1;
  if (!is_signed) {
    d.zeros = zeros.as<uint8_t>();
    d.zeros_n = groups;
    d.zeros_g = 1;
  }
  qjax::Quantize quantize{};
  quantize.m = d.m;
  quantize.k = d.k;
  quantize.bits = d.bits;
  quantize.group = d.group;
  if (codes)
    quantize.codes = x.as<int8_t>();
  else
    quantize.x = x.as<float>();
  quantize.sx = sx.as<float>();
  quantize.low = -128;
  quantize.high = 127;
  if (!codes && below(2)) quantize.unit = 1.0f / 127.5f;
  d.sx = sx.as<float>();

  const qjax::Pool pool{3, &threads, run};
  std::vector<float> expected;
  for (int isa = 0; isa < qjax::kIsaCount; isa++) {
    if (!qjax::has_isa(isa)) continue;
    Guarded q(d.m * d.q_stride() + 64), sums(d.m * groups * 4), y(d.m * d.n * 4);
    quantize.q = q.as<int8_t>();
    quantize.qsum = sums.as<int32_t>();
    d.q = quantize.q;
    d.qsum = quantize.qsum;
    d.y = y.as<float>();
    qjax::quantize_rows(quantize, 0, d.m, isa);
    Aligned scratch(qjax::scratch_bytes(d) * pool.workers);
    qjax::run_dot(d, isa, pool, scratch.data);
    if (isa == 0) {
      expected.assign(d.y, d.y + d.m * d.n);
      digest.add(expected);
    }
    if (std::memcmp(expected.data(), d.y, d.m * d.n * 4)) {
      std::printf("%s differs: bits %ld group %ld m %ld n %ld k %ld\n", qjax::isa_name(isa), long(d.bits), long(d.group),
                  long(d.m), long(d.n), long(d.k));
      return false;
    }
  }
  if (codes) return true;
  // With floats: as many bytes are read, and sums agree up to rounding.
  qjax::FloatDot f{};
  f.dot = d;
  std::vector<float> given(x.as<float>(), x.as<float>() + d.m * d.k);
  for (float& v : given) v = v == v ? v : 0.0f;
  const bool tiles = qjax::has_bf16_tiles() && qjax::fits_tiles(d);
  for (int isa = 0; isa < qjax::kIsaCount + tiles; isa++) {
    if (isa < qjax::kIsaCount && !qjax::has_isa(isa)) continue;
    Guarded laid(d.m * f.x_stride() * 4), y(d.m * d.n * 4);
    f.dot.y = y.as<float>();
    if (isa < qjax::kIsaCount) {
      qjax::arrange_floats(given.data(), d.m, d.k, d.bits, laid.as<float>());
      f.x = laid.as<float>();
      qjax::run_float_dot(f, isa, pool);
    } else {
      Guarded rows(d.m * d.k * 4);
      std::memcpy(rows.as<float>(), given.data(), d.m * d.k * 4);
      qjax::FloatTiles product{f.dot, rows.as<float>(), 3};
      Aligned cut(product.laid_bytes()), own((product.scratch_bytes() + 63) / 64 * 64 * pool.workers);
      qjax::run_float_tiles(product, pool, cut.data, own.data);
    }
    if (isa == 0) expected.assign(f.dot.y, f.dot.y + d.m * d.n);
    for (int64_t i = 0; i < d.m * d.n; i++) {
      const float most = 255.0f * 7.0f * static_cast<float>(d.k);
      if (!(std::fabs(expected[i] - f.dot.y[i]) <= 1e-6f * most)) {
        std::printf("floats, %s differs: bits %ld group %ld m %ld n %ld k %ld\n", qjax::isa_name(isa), long(d.bits),
                    long(d.group), long(d.m), long(d.n), long(d.k));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 2 && std::strcmp(argv[1], "digest") == 0) {
    Threads threads(3);
    std::mt19937 random(0);
    digest.wanted = true;
    bool good = true;
    for (long i = 0; i < std::atol(argv[2]) && good; i++)
      good = i % 2 ? one(random, threads) : formats::exact(random, threads);
    std::printf("digest %016llx%s\n", static_cast<unsigned long long>(digest.value), good ? "" : ", FAILED");
    return good ? 0 : 1;
  }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  Threads threads(3);
  std::atomic<long> done{0};
  std::atomic<bool> good{true};
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 3; seed++)
    callers.emplace_back([&, seed] {
      std::mt19937 random(seed);
      while (good && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
        const auto kind = random() % 4;
        if (!(kind == 0   ? one(random, threads)
              : kind == 1 ? formats::one(random, threads)
              : kind == 2 ? candidates::one(random, threads)
                          : attention::one(random, threads)))
          good = false;
        done++;
      }
    });
  for (auto& c : callers) c.join();
  std::printf("%ld problems, instruction sets:", done.load());
  for (int isa = 0; isa < qjax::kIsaCount; isa++)
    if (qjax::has_isa(isa)) std::printf(" %s", qjax::isa_name(isa));
  if (qjax::has_bf16_tiles()) std::printf(" bf16_tiles");  // of which problems of candidates are
  std::printf("%s\n", good ? "" : ", FAILED");
  return good ? 0 : 1;
}
