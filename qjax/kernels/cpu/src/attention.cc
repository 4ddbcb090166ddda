// How attention over a cache is cut in tasks and joined again, and its plain form.
#include "attention.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace qjax {
namespace {

float from_half(uint16_t h) {
  // The exponent is shifted by a multiplication, which makes subnormal numbers right as well.
  uint32_t bits = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 5192296858534827628530496329220096.0f;  // 2^112
  std::memcpy(&bits, &f, 4);
  bits |= special | static_cast<uint32_t>(h & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

int64_t lanes_of(int isa) { return isa == kAvx512Vnni ? 16 : isa == kAvx2 ? 8 : isa == kNeon ? 4 : 0; }

int64_t part_floats(const Attention& a) { return kRows * (2 + padded(a.v.dim)); }

int64_t blocks(const Attention& a) { return (a.rows() + kRows - 1) / kRows; }

Part part_in(const Attention& a, float* parts, int64_t number) {
  float* at = parts + number * part_floats(a);
  return {at, at + kRows, at + 2 * kRows};
}

struct Work {
  const Attention* a;
  int isa;
  int64_t first_split, splits;
  float *q, *qsum, *parts;
};

// Numbers of tasks run over sequences, heads, blocks of rows, splits.
void look(void* argument, int64_t number, int64_t) {
  const Work& w = *static_cast<const Work*>(argument);
  const Attention& a = *w.a;
  const int64_t split = w.first_split + number % w.splits, block = number / w.splits % blocks(a);
  const int64_t pair = number / w.splits / blocks(a);
  Piece p{};
  p.a = &a;
  p.sequence = pair / a.heads;
  p.head = pair % a.heads;
  p.row = block * kRows;
  p.rows = a.rows() - p.row < kRows ? a.rows() - p.row : kRows;
  p.out = part_in(a, w.parts, number);
  // The first token of the block sees the farthest back, the last one the farthest ahead.
  int64_t first, last, ignored;
  a.seen(p.sequence, p.row / a.group, &first, &ignored);
  a.seen(p.sequence, (p.row + p.rows - 1) / a.group, &ignored, &last);
  p.from = first > split * kSplit ? first : split * kSplit;
  p.to = last < (split + 1) * kSplit ? last : (split + 1) * kSplit;
  p.q = w.q + (pair * a.rows() + p.row) * padded(a.k.dim);
  p.qsum = w.qsum + pair * a.rows() + p.row;
  if (p.from >= p.to) {
    for (int64_t r = 0; r < p.rows; r++) p.out.sum[r] = 0.0f;
    return;
  }
#if defined(__x86_64__)
  if (w.isa >= kAvx512Vnni) return piece_avx512(p);
  if (w.isa == kAvx2) return piece_avx2(p);
#elif defined(QJAX_HAS_NEON)
  if (w.isa == kNeon) return piece_neon(p);
#endif
  piece_portable(p);
}

// One sequence and head: the results of its splits together, in their order.
void join(void* argument, int64_t pair, int64_t) {
  const Work& w = *static_cast<const Work*>(argument);
  const Attention& a = *w.a;
  const int64_t lanes = lanes_of(w.isa);
  for (int64_t row = 0; row < a.rows(); row++) {
    const int64_t begin = (pair * blocks(a) + row / kRows) * w.splits, r = row % kRows;
    float* y = a.y + (pair * a.rows() + row) * a.v.dim;
    float most = -std::numeric_limits<float>::infinity();
    bool any = false;
    for (int64_t s = 0; s < w.splits; s++) {
      const Part part = part_in(a, w.parts, begin + s);
      if (part.sum[r] == 0.0f) continue;
      any = true;
      if (part.most[r] > most) most = part.most[r];
    }
    for (int64_t d = 0; d < a.v.dim; d++) y[d] = 0.0f;
    if (!any) continue;
    float sum = 0.0f;
    for (int64_t s = 0; s < w.splits; s++) {
      const Part part = part_in(a, w.parts, begin + s);
      if (part.sum[r] == 0.0f) continue;
      const float factor = std::exp(part.most[r] - most);
      sum += factor * part.sum[r];
      const float* values = part.values + r * padded(a.v.dim);
      for (int64_t d = 0; d < a.v.dim; d++) y[d] += factor * values[place_of(d, a.v.bits, lanes)];
    }
    for (int64_t d = 0; d < a.v.dim; d++) y[d] /= sum;
  }
}

inline float code_at(const Codes& c, const uint8_t* row, int64_t d) {
  if (c.bits == 8) return c.is_signed ? static_cast<float>(static_cast<int8_t>(row[d])) : static_cast<float>(row[d]);
  const int half = row[d / 2] >> (d % 2 * 4) & 15;
  return static_cast<float>(c.is_signed && half >= 8 ? half - 16 : half);
}

}  // namespace

void numbers_of(const void* data, int type, int64_t from, int64_t count, float* out) {
  switch (type) {
    case kF32:
      std::memcpy(out, static_cast<const float*>(data) + from, static_cast<size_t>(count) * 4);
      return;
    case kF16:
      for (int64_t i = 0; i < count; i++) out[i] = from_half(static_cast<const uint16_t*>(data)[from + i]);
      return;
    case kU8:
      for (int64_t i = 0; i < count; i++) out[i] = static_cast<float>(static_cast<const uint8_t*>(data)[from + i]);
      return;
    default:
      for (int64_t i = 0; i < count; i++) out[i] = 0.0f;
  }
}

void piece_portable(const Piece& p) {
  const Attention& a = *p.a;
  const int64_t base = (p.sequence * a.heads + p.head) * a.room + p.from, count = p.to - p.from;
  float k_scale[kSplit], k_zero[kSplit], v_scale[kSplit], v_zero[kSplit], s[kSplit];
  numbers_of(a.k.scale, a.k.scale_type, base, count, k_scale);
  numbers_of(a.k.zero, a.k.zero_type, base, count, k_zero);
  numbers_of(a.v.scale, a.v.scale_type, base, count, v_scale);
  numbers_of(a.v.zero, a.v.zero_type, base, count, v_zero);
  const int64_t k_dims = padded(a.k.dim), v_dims = padded(a.v.dim);
  for (int64_t r = 0; r < p.rows; r++) {
    int64_t first, last;
    a.seen(p.sequence, (p.row + r) / a.group, &first, &last);
    first = first > p.from ? first - p.from : 0;
    last = last < p.to ? last - p.from : count;
    p.out.sum[r] = 0.0f;
    if (first >= last) continue;
    float most = -std::numeric_limits<float>::infinity();
    const float* q = p.q + r * k_dims;
    for (int64_t j = first; j < last; j++) {
      const uint8_t* row = a.k.codes + (base + j) * a.k.row_bytes;
      float sum = 0.0f;
      for (int64_t d = 0; d < a.k.dim; d++) sum += q[d] * code_at(a.k, row, d);
      s[j] = (sum - k_zero[j] * p.qsum[r]) * k_scale[j];
      if (s[j] > most) most = s[j];
    }
    float total = 0.0f, offset = 0.0f;
    float* values = p.out.values + r * v_dims;
    for (int64_t d = 0; d < v_dims; d++) values[d] = 0.0f;
    for (int64_t j = first; j < last; j++) {
      const float e = std::exp(s[j] - most), weight = e * v_scale[j];
      total += e;
      offset += weight * v_zero[j];
      const uint8_t* row = a.v.codes + (base + j) * a.v.row_bytes;
      for (int64_t d = 0; d < a.v.dim; d++) values[d] += weight * code_at(a.v, row, d);
    }
    for (int64_t d = 0; d < a.v.dim; d++) values[d] -= offset;
    p.out.most[r] = most;
    p.out.sum[r] = total;
  }
}

int attention_isa(int isa) {
#if defined(__x86_64__)
  if (isa >= kAvx512Vnni) return kAvx512Vnni;  // nothing here is for tiles
  if (isa >= kAvx2 && __builtin_cpu_supports("fma")) return kAvx2;
#elif defined(QJAX_HAS_NEON)
  if (isa >= kNeon) return kNeon;
#else
  (void)isa;
#endif
  return kPortable;
}

namespace {

// The splits that some token of some sequence sees something of.
void range_of(const Attention& a, int64_t* first, int64_t* count) {
  int64_t low = a.room, high = 0;
  for (int64_t b = 0; b < a.sequences; b++) {
    int64_t from, to, ignored;
    a.seen(b, 0, &from, &ignored);
    a.seen(b, a.tokens - 1, &ignored, &to);
    if (to > from && from < low) low = from;
    if (to > high) high = to;
  }
  *first = low < high ? low / kSplit : 0;
  *count = low < high ? (high + kSplit - 1) / kSplit - *first : 0;
}

}  // namespace

int64_t attention_scratch(const Attention& a) {
  if (a.sequences == 0 || a.heads == 0 || a.rows() == 0) return 0;
  int64_t first, splits;
  range_of(a, &first, &splits);
  const int64_t pairs = a.sequences * a.heads;
  return pairs * a.rows() * (padded(a.k.dim) + 1) + pairs * blocks(a) * splits * part_floats(a);
}

void run_attention(const Attention& a, int isa, const Pool& pool, float* scratch) {
  const int64_t pairs = a.sequences * a.heads, rows = pairs * a.rows();
  if (rows == 0 || a.v.dim == 0) return;
  isa = attention_isa(isa);
  Work w{&a, isa, 0, 0, scratch, scratch + rows * padded(a.k.dim), scratch + rows * (padded(a.k.dim) + 1)};
  range_of(a, &w.first_split, &w.splits);
  const int64_t lanes = lanes_of(isa);
  std::memset(w.q, 0, static_cast<size_t>(rows * padded(a.k.dim)) * 4);
  for (int64_t r = 0; r < rows; r++) {
    float sum = 0.0f;
    for (int64_t d = 0; d < a.k.dim; d++) {
      const float x = a.q[r * a.k.dim + d] * a.scale;
      w.q[r * padded(a.k.dim) + place_of(d, a.k.bits, lanes)] = x;
      sum += x;
    }
    w.qsum[r] = sum;
  }
  int64_t positions = 0;
  for (int64_t b = 0; b < a.sequences; b++) positions += a.length(b);
  const bool small = positions * a.heads * a.rows() * (a.k.dim + a.v.dim) < (int64_t{1} << 17);
  const int64_t tasks = pairs * blocks(a) * w.splits;
  const int64_t workers = small ? 1 : pool.workers;
  pool.run(pool.context, workers < tasks ? workers : tasks, tasks, look, &w);
  const bool few = rows * w.splits * a.v.dim < (int64_t{1} << 17);
  pool.run(pool.context, few ? 1 : workers < pairs ? workers : pairs, pairs, join, &w);
}

}  // namespace qjax
