// Attention over a cache by vectors, written once for all widths. Included, inside an anonymous namespace, behind what an
// instruction set provides:
//
//   QJAX_FN, QJAX_FN_INLINE   attributes of functions that use it
//   V, kLanes                 a vector of floats and how many there are
//   kValueRegisters           accumulators that there are registers for
//   zeros, set1, load, store, add, sub, mul, fma, most_of      arithmetic; most_of(a, b) is b where either is NaN
//   keep(x, other, from, to)  lanes from .. to - 1 of x, else of other
//   power2(x, n)              x * 2^n for whole n
//   nearest(x)                rounded to whole numbers
//   sums(r)                   of kLanes vectors, the sum of each
//   total(x), largest(x)      of one vector
//   Table<bits, signed>       what `codes` needs
//   codes<bits, signed>(at, left, table, out)    2 * kLanes codes at a byte, of which `left` may be read, as two vectors
//
// Plain C: what is inlined here must not exist elsewhere without these instructions.

// e^x for x <= 0, within 2 units in the last place; NaN stays. Below -87 it is 0 at float32's own precision.
QJAX_FN_INLINE V exponential(V x) {
  x = most_of(set1(-87.5f), x);
  const V n = nearest(mul(x, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return power2(add(fma(p, mul(r, r), r), set1(1.0f)), n);
}

constexpr int64_t kPlaces = kSplit + 16;  // positions of a split, and whole vectors

struct Scores {
  alignas(64) float k_scale[kPlaces], k_zero[kPlaces], v_scale[kPlaces], v_zero[kPlaces];
  alignas(64) float s[4][kPlaces];
};

// Scores of kCount rows with all positions of the piece, or more: what stands behind them repeats the last one.
template <int kBits, bool kSigned, int kCount>
QJAX_FN void scores_of(const Piece& p, int64_t row, Scores& sc) {
  const Attention& a = *p.a;
  const int64_t count = p.to - p.from, dims = padded(a.k.dim), bytes = a.k.row_bytes, step = 2 * kLanes * kBits / 8;
  const uint8_t* base = a.k.codes + ((p.sequence * a.heads + p.head) * a.room + p.from) * bytes;
  const float* q = p.q + row * dims;
  const Table<kBits, kSigned> table;
  for (int64_t j = 0; j < count; j += kLanes) {
    V r[kCount][kLanes];
    for (int64_t i = 0; i < kLanes; i++) {
      const uint8_t* at = base + (j + i < count ? j + i : count - 1) * bytes;
      V sum[kCount];
      for (int c = 0; c < kCount; c++) sum[c] = zeros();
      const float* x = q;
      for (int64_t b = 0; b < bytes; b += step, x += 2 * kLanes) {
        V w[2];
        codes<kBits, kSigned>(at + b, bytes - b, table, w);
        for (int c = 0; c < kCount; c++) {
          sum[c] = fma(w[0], load(x + c * dims), sum[c]);
          sum[c] = fma(w[1], load(x + c * dims + kLanes), sum[c]);
        }
      }
      for (int c = 0; c < kCount; c++) r[c][i] = sum[c];
    }
    const V scale = load(sc.k_scale + j), zero = load(sc.k_zero + j);
    for (int c = 0; c < kCount; c++)
      store(sc.s[c] + j, mul(sub(sums(r[c]), mul(zero, set1(p.qsum[row + c]))), scale));
  }
}

// Values weighted by what stands in `sc.s`, of kCount rows: kPairs pairs of vectors of dimensions.
template <int kBits, bool kSigned, int kCount, int kPairs>
QJAX_FN_INLINE void values_at(const Piece& p, int64_t row, int64_t pair, const Scores& sc, const V* offset) {
  const Attention& a = *p.a;
  const int64_t count = p.to - p.from, bytes = a.v.row_bytes, step = 2 * kLanes * kBits / 8;
  const uint8_t* at = a.v.codes + ((p.sequence * a.heads + p.head) * a.room + p.from) * bytes + pair * step;
  const int64_t left = bytes - pair * step;
  const Table<kBits, kSigned> table;
  V sum[kCount][2 * kPairs];
  for (int c = 0; c < kCount; c++)
    for (int i = 0; i < 2 * kPairs; i++) sum[c][i] = zeros();
  for (int64_t j = 0; j < count; j++, at += bytes) {
    for (int i = 0; i < kPairs; i++) {
      V w[2];
      codes<kBits, kSigned>(at + i * step, left - i * step, table, w);
      for (int c = 0; c < kCount; c++) {
        const V weight = set1(sc.s[c][j]);
        sum[c][2 * i] = fma(w[0], weight, sum[c][2 * i]);
        sum[c][2 * i + 1] = fma(w[1], weight, sum[c][2 * i + 1]);
      }
    }
  }
  for (int c = 0; c < kCount; c++) {
    float* out = p.out.values + (row + c) * padded(a.v.dim) + pair * 2 * kLanes;
    for (int i = 0; i < 2 * kPairs; i++) store(out + i * kLanes, sub(sum[c][i], offset[c]));
  }
}

template <int kBits, bool kSigned, int kCount>
QJAX_FN void values_of(const Piece& p, int64_t row, const Scores& sc, const V* offset) {
  constexpr int kMost = kValueRegisters / (2 * kCount) > 4 ? 4 : kValueRegisters / (2 * kCount);
  const int64_t step = 2 * kLanes * kBits / 8, pairs = (p.a->v.row_bytes + step - 1) / step;
  int64_t i = 0;
  if constexpr (kMost >= 4)
    for (; i + 4 <= pairs; i += 4) values_at<kBits, kSigned, kCount, 4>(p, row, i, sc, offset);
  if constexpr (kMost >= 2)
    for (; i + 2 <= pairs; i += 2) values_at<kBits, kSigned, kCount, 2>(p, row, i, sc, offset);
  for (; i < pairs; i++) values_at<kBits, kSigned, kCount, 1>(p, row, i, sc, offset);
}

template <int kCount>
QJAX_FN void rows_of(const Piece& p, int64_t row, Scores& sc) {
  const Attention& a = *p.a;
  if (a.k.bits == 8)
    a.k.is_signed ? scores_of<8, true, kCount>(p, row, sc) : scores_of<8, false, kCount>(p, row, sc);
  else
    a.k.is_signed ? scores_of<4, true, kCount>(p, row, sc) : scores_of<4, false, kCount>(p, row, sc);

  const int64_t count = p.to - p.from;
  const V none = set1(-__builtin_inff());
  V offset[kCount];
  for (int c = 0; c < kCount; c++) {
    float* s = sc.s[c];
    int64_t first, last;
    a.seen(p.sequence, (p.row + row + c) / a.group, &first, &last);
    first -= p.from;
    last = last < p.to ? last - p.from : count;  // what stands behind is no position
    V most = none, sum = zeros();
    offset[c] = zeros();
    for (int64_t j = 0; j < count; j += kLanes) most = most_of(most, keep(load(s + j), none, first - j, last - j));
    const float peak = largest(most);
    const V less = set1(peak);
    for (int64_t j = 0; j < count; j += kLanes) {
      const V e = exponential(sub(load(s + j), less));
      // A weight of nothing is 0 whatever its scale is.
      const V weight = keep(mul(e, load(sc.v_scale + j)), zeros(), first - j, last - j);
      sum = add(sum, keep(e, zeros(), first - j, last - j));
      offset[c] = fma(weight, load(sc.v_zero + j), offset[c]);
      store(s + j, weight);
    }
    offset[c] = set1(total(offset[c]));
    p.out.most[row + c] = peak;
    p.out.sum[row + c] = first < last && last > 0 ? total(sum) : 0.0f;
  }
  if (a.v.bits == 8)
    a.v.is_signed ? values_of<8, true, kCount>(p, row, sc, offset) : values_of<8, false, kCount>(p, row, sc, offset);
  else
    a.v.is_signed ? values_of<4, true, kCount>(p, row, sc, offset) : values_of<4, false, kCount>(p, row, sc, offset);
}

QJAX_FN void piece_of(const Piece& p) {
  const Attention& a = *p.a;
  const int64_t base = (p.sequence * a.heads + p.head) * a.room + p.from, count = p.to - p.from;
  Scores sc;
  float* const all[4] = {sc.k_scale, sc.k_zero, sc.v_scale, sc.v_zero};
  numbers_of(a.k.scale, a.k.scale_type, base, count, sc.k_scale);
  numbers_of(a.k.zero, a.k.zero_type, base, count, sc.k_zero);
  numbers_of(a.v.scale, a.v.scale_type, base, count, sc.v_scale);
  numbers_of(a.v.zero, a.v.zero_type, base, count, sc.v_zero);
  for (float* one : all)
    for (int64_t j = count; j < (count + kLanes - 1) / kLanes * kLanes; j++) one[j] = 0.0f;
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) rows_of<4>(p, row, sc);
  for (; row + 2 <= p.rows; row += 2) rows_of<2>(p, row, sc);
  if (row < p.rows) rows_of<1>(p, row, sc);
}
