// The product with AMX: tiles of 16 rows of activations by 16 rows of the weight by 64 columns, one instruction each.
#include "tiles.h"

#if defined(QJAX_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define QJAX_AMX __attribute__((target(QJAX_TARGET512 ",amx-tile,amx-int8")))

namespace qjax {

// Linux gives the tile registers to processes that ask.
bool amx_allowed() {
  static const bool allowed = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & (1u << 24)) || !(d & (1u << 25))) return false;  // tiles, and their products of int8
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
}

namespace {

// Sums in tiles 0 to 3, activations in 4 and 5, the weight in 6 and 7.
QJAX_AMX void configure(int64_t rows0, int64_t rows1, int64_t columns) {
  Shapes s;
  for (int t = 0; t < 4; t++) {
    s.rows[t] = static_cast<uint8_t>(t < 2 ? rows0 : rows1);
    s.bytes[t] = 64;
  }
  for (int t = 4; t < 6; t++) {
    s.rows[t] = static_cast<uint8_t>(t == 4 ? rows0 : rows1);
    s.bytes[t] = static_cast<uint16_t>(columns);
  }
  for (int t = 6; t < 8; t++) {
    s.rows[t] = static_cast<uint8_t>(columns / 4);
    s.bytes[t] = 64;
  }
  // As in tiles.h.
  __asm__ volatile("" : : "r"(&s) : "memory");
  _tile_loadconfig(&s);
}

// Integer sums of a group, scaled, to the float sums of 16 rows of a block.
QJAX_AMX void scale_sums(const Dot& d, const Panel& panel, const int32_t* sums, float* total, int64_t m, int64_t rows,
                         int64_t block, int64_t g) {
  const int64_t groups = d.groups();
  const __m512 s = _mm512_loadu_ps(panel.scale + g * kPanel + block * kBlock);
  const __m512i zero = _mm512_loadu_si512(panel.zero + g * kPanel + block * kBlock);
  for (int64_t r = 0; r < rows; r++) {
    __m512i sum = _mm512_load_si512(sums + r * 16);
    if (d.zeros)
      sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(d.qsum[(m + r) * groups + g])));
    const __m512 number = _mm512_cvtepi32_ps(sum);
    __m512 y;
    if (groups == 1)
      y = _mm512_mul_ps(_mm512_mul_ps(number, _mm512_set1_ps(d.sx[m + r])), s);
    else
      y = _mm512_add_ps(_mm512_load_ps(total + r * 16), _mm512_mul_ps(number, s));
    _mm512_store_ps(total + r * 16, y);
  }
}

template <bool kSigned>
QJAX_AMX inline __attribute__((always_inline)) void multiply(bool two_rows, bool two_blocks) {
  if (kSigned) {
    _tile_dpbssd(0, 4, 6);
    if (two_blocks) _tile_dpbssd(1, 4, 7);
    if (two_rows) _tile_dpbssd(2, 5, 6);
    if (two_rows && two_blocks) _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbsud(0, 4, 6);
    if (two_blocks) _tile_dpbsud(1, 4, 7);
    if (two_rows) _tile_dpbsud(2, 5, 6);
    if (two_rows && two_blocks) _tile_dpbsud(3, 5, 7);
  }
}

// Up to 32 rows of activations by up to two blocks.
template <bool kSigned>
QJAX_AMX void tile(const Dot& d, const Panel& panel, int64_t m, int64_t rows, int64_t n0, int64_t n1, int64_t b0,
                   int64_t blocks) {
  const int64_t stride = d.q_stride(), groups = d.groups(), block = stride * 16;
  const int64_t rows0 = rows < 16 ? rows : 16, rows1 = rows - rows0;
  const bool two_rows = rows1 > 0, two_blocks = blocks > 1;
  const int8_t* q = d.q + m * stride;
  const uint8_t* w = panel.laid + b0 * block;
  float* total = panel.tile;   // [2 blocks][32][16]
  int32_t* sums = panel.sums;  // [16][16]
  for (int64_t i = 0; i < 2 * 32 * 16; i += 16) _mm512_store_ps(total + i, _mm512_setzero_ps());
  for (int64_t g = 0; g < groups; g++) {
    _tile_zero(0);
    if (two_blocks) _tile_zero(1);
    if (two_rows) _tile_zero(2);
    if (two_rows && two_blocks) _tile_zero(3);
    const Runs runs = runs_of(d, g);
    for (int64_t run = 0; run < runs.count; run++) {
      const int64_t first = runs.first + run * 16;
      for (int64_t t = first; t < first + runs.length; t += 16) {
        _tile_loadd(4, q + t * 4, stride);
        if (two_rows) _tile_loadd(5, q + 16 * stride + t * 4, stride);
        _tile_loadd(6, w + t * 64, 64);
        if (two_blocks) _tile_loadd(7, w + block + t * 64, 64);
        multiply<kSigned>(two_rows, two_blocks);
      }
    }
    _tile_stored(0, sums, 64);
    scale_sums(d, panel, sums, total, m, rows0, b0, g);
    if (two_blocks) {
      _tile_stored(1, sums + 256, 64);
      scale_sums(d, panel, sums + 256, total + 512, m, rows0, b0 + 1, g);
    }
    if (two_rows) {
      _tile_stored(2, sums + 512, 64);
      scale_sums(d, panel, sums + 512, total + 256, m + 16, rows1, b0, g);
    }
    if (two_rows && two_blocks) {
      _tile_stored(3, sums + 768, 64);
      scale_sums(d, panel, sums + 768, total + 768, m + 16, rows1, b0 + 1, g);
    }
  }
  for (int64_t v = 0; v < blocks; v++) {
    const int64_t n = n0 + (b0 + v) * kBlock, left = n1 - n;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    for (int64_t r = 0; r < rows; r++) {
      __m512 y = _mm512_load_ps(total + v * 512 + r * 16);
      if (groups > 1) y = _mm512_mul_ps(y, _mm512_set1_ps(d.sx[m + r]));
      _mm512_mask_storeu_ps(d.y + (m + r) * d.n + n, mask, y);
    }
  }
}

template <bool kSigned>
QJAX_AMX void tiles_of_panel(const Dot& d, const Panel& panel, int64_t n0, int64_t n1) {
  const int64_t blocks = (n1 - n0 + kBlock - 1) / kBlock, groups = d.groups(), bytes = d.group_bytes();
  const int64_t columns = groups > 1 && bytes < kChunk ? bytes : kChunk;
  for (int64_t m = 0; m < d.m; m += 32) {
    const int64_t rows = d.m - m < 32 ? d.m - m : 32;
    if (m == 0 || rows < 32) configure(rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 1, columns);
    for (int64_t b = 0; b < blocks; b += 2)
      tile<kSigned>(d, panel, m, rows, n0, n1, b, blocks - b < 2 ? blocks - b : 2);
  }
}

template <int kBits>
QJAX_AMX void panel_bits(const Dot& d, int64_t n0, int64_t n1, char* scratch) {
  const Panel panel = panel_in(scratch, d);
  // A zero point that all share is subtracted from the codes here: they are int8 then, and sums need no correction.
  const bool centred = d.zeros == nullptr && (kBits < 8 || d.zero == 128);
  lay_out<kBits>(d, n0, n1, centred ? static_cast<int8_t>(d.zero) : 0, panel);
  if (centred)
    tiles_of_panel<true>(d, panel, n0, n1);
  else
    tiles_of_panel<false>(d, panel, n0, n1);
}

}  // namespace

QJAX_AMX void tiles_amx(const Dot& d, const Panel& panel, int64_t n0, int64_t n1) {
  tiles_of_panel<true>(d, panel, n0, n1);
  _tile_release();
}

QJAX_AMX void panel_amx(const Dot& d, int64_t n0, int64_t n1, char* scratch) {
  switch (d.bits) {
    case 8:
      panel_bits<8>(d, n0, n1, scratch);
      break;
    case 4:
      panel_bits<4>(d, n0, n1, scratch);
      break;
    default:
      panel_bits<2>(d, n0, n1, scratch);
  }
  _tile_release();
}

}  // namespace qjax
#endif
