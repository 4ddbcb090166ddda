// Tiles of bfloat16: how functions that use them are compiled, and the shape of all eight.
#pragma once
#include "wide.h"

#if defined(QJAX_HAS_AMX)
#define QJAX_BF16_TARGET QJAX_TARGET512 ",avx512bf16,amx-tile,amx-bf16"
#define QJAX_BF16 __attribute__((target(QJAX_BF16_TARGET)))
#define QJAX_INLINE_BF16 static inline __attribute__((always_inline, target(QJAX_BF16_TARGET)))

namespace qjax {

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes; what is not there of a matrix is zeros in memory.
QJAX_BF16 static inline void configure_whole_tiles() {
  Shapes s;
  for (int t = 0; t < 8; t++) {
    s.rows[t] = 16;
    s.bytes[t] = 64;
  }
  // GCC's headers say that eight bytes are read: without this, stores of the others may be taken for dead ones.
  __asm__ volatile("" : : "r"(&s) : "memory");
  _tile_loadconfig(&s);
}

// The first lanes, as many as are left of a row.
QJAX_INLINE_BF16 __mmask16 first(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

}  // namespace qjax
#endif
