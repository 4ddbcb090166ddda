// Integer weights of a handler: checked, and described as products read them.
#pragma once
#include "handler.h"

namespace qjax {

// Fills in what is known of a weight, given d.k: w u8 or s8 [s, n, bytes], scale f32 [s, n or 1, groups or 1], zeros u8,
// likewise, or [s, 0, 0].
inline ffi::Error describe_weight(Dot& d, int64_t stack, const ffi::AnyBuffer& w, const ffi::AnyBuffer& scale,
                                  const ffi::AnyBuffer& zeros, int64_t bits, int64_t group, int64_t is_signed) {
  if (bits != 8 && bits != 4 && bits != 2) return invalid("codes of " + std::to_string(bits) + " bits; 8, 4 or 2");
  if (!stacked(w, ffi::U8, stack) && !stacked(w, ffi::S8, stack)) return not_bytes(w);
  d.n = w.dimensions()[1];
  d.row_bytes = w.dimensions()[2];
  d.bits = bits;
  if (d.row_bytes != (d.k * bits + 7) / 8)
    return does_not_hold(d.row_bytes, d.k, "codes of " + std::to_string(bits) + " bits");
  d.group = group > 0 && group < d.k ? group : (d.k > 0 ? d.k : 1);
  const int64_t groups = d.groups(), columns = groups > 0 ? groups : 1;
  if (groups > 1 && d.group % d.phases()) return invalid("groups have to begin with a byte");
  if (!stacked(scale, ffi::F32, stack) || !broadcasts(scale, d.n, columns, &d.scale_n, &d.scale_g))
    return invalid("scales have to be float32 [s, n or 1, groups or 1] for " + std::to_string(groups) +
                   " groups, they are of shape " + shape(scale));
  if (!stacked(zeros, ffi::U8, stack)) return invalid("zero points have to be uint8, they are of shape " + shape(zeros));
  if (zeros.element_count() > 0 && !broadcasts(zeros, d.n, columns, &d.zeros_n, &d.zeros_g))
    return invalid("zero points have to be [s, n or 1, groups or 1], they are of shape " + shape(zeros));
  if (is_signed) {
    d.flip = bits == 8 ? 0x80 : bits == 4 ? 0x88 : 0xaa;
    d.zero = 1 << (bits - 1);
  }
  return ffi::Error::Success();
}

// Matrix s of a stack.
inline void take_weight(Dot& d, int64_t s, const ffi::AnyBuffer& w, const ffi::AnyBuffer& scale,
                        const ffi::AnyBuffer& zeros) {
  d.w = matrix<uint8_t>(w, s);
  d.scale = matrix<float>(scale, s);
  if (zeros.element_count() > 0) d.zeros = matrix<uint8_t>(zeros, s);
}

}  // namespace qjax
