// Activations of a handler: checked, and quantized to int8 in the order in which products read them.
#pragma once
#include <new>

#include "handler.h"

namespace qjax {

class Activations {
 public:
  // x f32, or s8 codes, [s, m, k]; codes within [low, high]; sx f32 [s, m or 1, 1], or [s, 0, 0] where `unit`, the scale of
  // [-1, 1], says how they are fitted to x.
  ffi::Error describe(const ffi::AnyBuffer& x, const ffi::AnyBuffer& sx, int64_t low, int64_t high, float unit) {
    codes_ = x.element_type() == ffi::S8;
    if (!(codes_ || x.element_type() == ffi::F32) || x.dimensions().size() != 3)
      return invalid("activations have to be float32 or int8 [s, m, k], they are of shape " + shape(x));
    if (low < -128 || high > 127 || low > high) return invalid("codes of activations are int8");
    const int64_t m = x.dimensions()[1];
    if (!stacked(sx, ffi::F32, x.dimensions()[0]))
      return invalid("scales of activations have to be float32, they are of shape " + shape(sx));
    fit_ = sx.dimensions()[1] == 0 && sx.dimensions()[2] == 0;
    if (fit_ && (codes_ || !(unit > 0.0f))) return invalid("scales are fitted to floats, by the scale of [-1, 1]");
    if (!fit_ && (sx.dimensions()[2] != 1 || (sx.dimensions()[1] != m && sx.dimensions()[1] != 1)))
      return invalid("scales of activations have to be float32 [s, m or 1, 1], they are of shape " + shape(sx));
    x_ = x.untyped_data();
    sx_ = data<float>(sx);
    one_sx_ = sx.dimensions()[1] == 1;
    what_.m = m;
    what_.k = x.dimensions()[2];
    what_.unit = fit_ ? unit : 0.0f;
    what_.low = static_cast<float>(low);
    what_.high = static_cast<float>(high);
    return ffi::Error::Success();
  }

  // Memory for one matrix of activations, as `d` reads them; false where there is not that much.
  bool allocate(Dot& d) {
    const int64_t columns = d.groups() > 0 ? d.groups() : 1;
    q_ = aligned(d.m * d.q_stride() + 64);
    sums_ = aligned(d.m * columns * 4);
    scales_ = aligned(d.m * 4);
    if (!q_ || !sums_ || !scales_) return false;
    what_.bits = d.bits;
    what_.group = d.group;
    what_.sx = reinterpret_cast<float*>(scales_.get());
    what_.q = reinterpret_cast<int8_t*>(q_.get());
    what_.qsum = reinterpret_cast<int32_t*>(sums_.get());
    d.q = what_.q;
    d.qsum = what_.qsum;
    d.sx = what_.sx;
    return true;
  }

  // Those of matrix s.
  void quantize(int64_t s, int isa, const Pool& pool) {
    float* scales = reinterpret_cast<float*>(scales_.get());
    const float* given = sx_ + s * (one_sx_ ? 1 : what_.m);
    for (int64_t m = 0; m < what_.m && !fit_; m++) scales[m] = given[one_sx_ ? 0 : m];
    const int64_t from = s * what_.m * what_.k;
    if (codes_)
      what_.codes = static_cast<const int8_t*>(x_) + from;
    else
      what_.x = static_cast<const float*>(x_) + from;
    Rows rows{&what_, isa, (int64_t{1} << 16) / (what_.k + 1) + 1};
    pool.run(pool.context, pool.workers, (what_.m + rows.step - 1) / rows.step, some_rows, &rows);
  }

 private:
  struct Rows {
    const Quantize* what;
    int isa;
    int64_t step;
  };
  static void some_rows(void* argument, int64_t number, int64_t) {
    const Rows& rows = *static_cast<const Rows*>(argument);
    const int64_t first = number * rows.step, last = first + rows.step;
    quantize_rows(*rows.what, first, last < rows.what->m ? last : rows.what->m, rows.isa);
  }

  Quantize what_{};
  bool codes_ = false, one_sx_ = false, fit_ = false;
  const void* x_ = nullptr;
  const float* sx_ = nullptr;
  Memory q_, sums_, scales_;
};

}  // namespace qjax
