// The product in plain C++: what runs where nothing faster does, and what the others are compared with.
#include "problem.h"

namespace qjax {

void panel_portable(const Dot& d, int64_t n0, int64_t n1) {
  const int64_t phases = d.phases(), groups = d.groups(), bytes = groups == 1 ? d.row_bytes : d.group_bytes();
  const uint8_t mask = static_cast<uint8_t>((1 << d.bits) - 1);
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* w = d.w + n * d.row_bytes;
    for (int64_t m = 0; m < d.m; m++) {
      const int8_t* q = d.q + m * d.q_stride();
      float total = 0.0f;
      for (int64_t g = 0; g < groups; g++) {
        const int64_t end = (g + 1) * bytes < d.row_bytes ? (g + 1) * bytes : d.row_bytes;
        uint32_t sum = 0;  // unsigned: wraps around as the vector instructions do
        for (int64_t b = g * bytes; b < end;) {
          const int64_t c = b / kChunk, stop = (c + 1) * kChunk < end ? (c + 1) * kChunk : end;
          for (int64_t p = 0; p < phases; p++) {
            const int8_t* run = q + (c * phases + p) * kChunk - c * kChunk;
            int32_t part = 0;  // of at most 64 products
            for (int64_t i = b; i < stop; i++)
              part += ((static_cast<uint8_t>(w[i] ^ d.flip) >> (p * d.bits)) & mask) * run[i];
            sum += static_cast<uint32_t>(part);
          }
          b = stop;
        }
        const uint32_t moved = static_cast<uint32_t>(d.zero_at(n, g)) * static_cast<uint32_t>(d.qsum[m * groups + g]);
        const float number = static_cast<float>(static_cast<int32_t>(sum - moved));
        if (groups == 1) {
          total = number * d.sx[m] * d.scale_at(n, 0);
        } else {
          total += number * d.scale_at(n, g);
        }
      }
      d.y[m * d.n + n] = groups == 1 ? total : total * d.sx[m];
    }
  }
}

}  // namespace qjax
