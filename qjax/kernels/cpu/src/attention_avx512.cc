// Attention over a cache with AVX-512: 16 lanes; codes of 4 bits become floats by a permutation of a table of all sixteen.
#include "attention.h"
#include "wide.h"

#if defined(__x86_64__)
#define QJAX_FN QJAX_512
#define QJAX_FN_INLINE QJAX_INLINE512

namespace qjax {
namespace {

using V = __m512;
constexpr int kLanes = 16, kValueRegisters = 16;

QJAX_FN_INLINE V zeros() { return _mm512_setzero_ps(); }
QJAX_FN_INLINE V set1(float x) { return _mm512_set1_ps(x); }
QJAX_FN_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
QJAX_FN_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
QJAX_FN_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
QJAX_FN_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
QJAX_FN_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
QJAX_FN_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
QJAX_FN_INLINE V most_of(V a, V b) { return _mm512_max_ps(a, b); }
QJAX_FN_INLINE V nearest(V x) { return _mm512_roundscale_ps(x, 8); }
QJAX_FN_INLINE V power2(V x, V n) { return _mm512_scalef_ps(x, n); }
QJAX_FN_INLINE float total(V x) { return _mm512_reduce_add_ps(x); }
QJAX_FN_INLINE float largest(V x) { return _mm512_reduce_max_ps(x); }

QJAX_FN_INLINE V keep(V x, V other, int64_t from, int64_t to) {
  from = from < 0 ? 0 : from > 16 ? 16 : from;
  to = to < 0 ? 0 : to > 16 ? 16 : to;
  const uint32_t mask = ((1u << to) - 1) & ~((1u << from) - 1);
  return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), other, x);
}

QJAX_FN_INLINE V sums(const V* r) {
  V v[4];
  for (int i = 0; i < 4; i++) {
    const V* t = r + 4 * i;
    const V ab = add(_mm512_unpacklo_ps(t[0], t[1]), _mm512_unpackhi_ps(t[0], t[1]));
    const V cd = add(_mm512_unpacklo_ps(t[2], t[3]), _mm512_unpackhi_ps(t[2], t[3]));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    v[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const V x = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
  const V y = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  return add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

// The numbers that 4 bits stand for.
template <int kBits, bool kSigned>
struct Table {
  V numbers;
  QJAX_512 Table() {
    if (kSigned)
      numbers = _mm512_set_ps(-1, -2, -3, -4, -5, -6, -7, -8, 7, 6, 5, 4, 3, 2, 1, 0);
    else
      numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  }
};

QJAX_FN_INLINE __m128i bytes16(const uint8_t* at, int64_t left) {
  if (left >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm_maskz_loadu_epi8(left > 0 ? static_cast<__mmask16>((1u << left) - 1) : __mmask16{0}, at);
}

template <int kBits, bool kSigned>
QJAX_FN_INLINE void codes(const uint8_t* at, int64_t left, const Table<kBits, kSigned>& table, V* out) {
  if (kBits == 8) {
    for (int i = 0; i < 2; i++) {
      const __m128i b = bytes16(at + 16 * i, left - 16 * i);
      out[i] = _mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
    }
    return;
  }
  const __m512i b = _mm512_cvtepu8_epi32(bytes16(at, left));  // of an index four bits are looked at
  out[0] = _mm512_permutexvar_ps(b, table.numbers);
  out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table.numbers);
}

#include "attention_lanes.h"

}  // namespace

QJAX_512 void piece_avx512(const Piece& piece) { piece_of(piece); }

}  // namespace qjax
#endif
