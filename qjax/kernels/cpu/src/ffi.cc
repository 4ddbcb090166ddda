// The handlers of products with integer weights: check every dtype and shape, allocate scratch memory, share the work among
// XLA's threads.
#include <new>

#include "handler.h"
#include "weights.h"

namespace ffi = xla::ffi;

namespace {

using namespace qjax;

struct Rows {
  const Quantize* what;
  int isa;
  int64_t step;
};

void quantize_task(void* argument, int64_t number, int64_t) {
  const Rows& rows = *static_cast<const Rows*>(argument);
  const int64_t first = number * rows.step, last = first + rows.step;
  qjax::quantize_rows(*rows.what, first, last < rows.what->m ? last : rows.what->m, rows.isa);
}

// Fills in what a problem says of the weight and of sizes, and which matrices of the weight are read; x [s, m, k],
// w u8 or s8 [t, n, bytes], scale f32 [t, n or 1, groups or 1], zeros u8, likewise, or [t, 0, 0], layer s32 [0] or [1] as
// `find_layer` has it, y f32 [s, m, n].
ffi::Error describe(Dot& d, Layers& of, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const ffi::AnyBuffer& scale,
                    const ffi::AnyBuffer& zeros, const ffi::AnyBuffer& layer, const ffi::AnyBuffer& y, int64_t bits,
                    int64_t group, int64_t is_signed) {
  const int64_t stack = x.dimensions()[0];
  if (ffi::Error wrong = find_layer(of, stack, w, layer); wrong.failure()) return wrong;
  d.m = x.dimensions()[1];
  d.k = x.dimensions()[2];
  if (ffi::Error wrong = describe_weight(d, of.all, w, scale, zeros, bits, group, is_signed); wrong.failure()) return wrong;
  if (!stacked(y, ffi::F32, stack) || y.dimensions()[1] != d.m || y.dimensions()[2] != d.n)
    return invalid("the result has to be float32 [s, m, n], it is of shape " + shape(y));
  return ffi::Error::Success();
}

// Matrix s of a stack, which is matrix `first` + s of the weight.
void take(Dot& d, int64_t first, int64_t s, const ffi::AnyBuffer& w, const ffi::AnyBuffer& scale,
          const ffi::AnyBuffer& zeros, const ffi::AnyBuffer& y) {
  take_weight(d, first + s, w, scale, zeros);
  d.y = static_cast<float*>(y.untyped_data()) + s * d.m * d.n;
}

// x f32, or s8 codes, [s, m, k]; sx f32 [s, m or 1, 1], or [s, 0, 0] where `unit`, the scale of [-1, 1], says how they are
// fitted to x; the others as above. Each of the s matrices by itself.
ffi::Error dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer sx, ffi::AnyBuffer w, ffi::AnyBuffer scale,
               ffi::AnyBuffer zeros, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t bits, int64_t group,
               int64_t is_signed, int64_t low, int64_t high, float unit, int64_t isa) {
  const bool codes = x.element_type() == ffi::S8;
  if (!(codes || x.element_type() == ffi::F32) || x.dimensions().size() != 3)
    return invalid("activations have to be float32 or int8 [s, m, k], they are of shape " + shape(x));
  Dot d{};
  Layers of;
  ffi::Error wrong = describe(d, of, x, w, scale, zeros, layer, *y, bits, group, is_signed);
  if (wrong.failure()) return wrong;
  const int64_t stack = x.dimensions()[0], columns = d.groups() > 0 ? d.groups() : 1;
  if (low < -128 || high > 127 || low > high) return invalid("codes of activations are int8");
  if (!stacked(sx, ffi::F32, stack)) return invalid("scales of activations have to be float32, they are of shape " + shape(sx));
  const bool fit = sx.dimensions()[1] == 0 && sx.dimensions()[2] == 0;
  if (fit && (codes || !(unit > 0.0f))) return invalid("scales are fitted to floats, by the scale of [-1, 1]");
  if (!fit && (sx.dimensions()[2] != 1 || (sx.dimensions()[1] != d.m && sx.dimensions()[1] != 1)))
    return invalid("scales of activations have to be float32 [s, m or 1, 1], they are of shape " + shape(sx));
  if (stack == 0 || d.m == 0 || d.n == 0) return ffi::Error::Success();
  const int chosen = isa < 0 ? qjax::best_isa(d) : static_cast<int>(isa);
  if (!qjax::has_isa(chosen)) return no_isa(chosen);

  const Pool pool = pool_of(threads);
  Memory q = aligned(d.m * d.q_stride() + 64), sums = aligned(d.m * columns * 4), scales = aligned(d.m * 4);
  Memory scratch = aligned(qjax::scratch_bytes(d) * pool.workers);
  if (!q || !sums || !scales || !scratch)
    return no_memory("activations and scratch");
  float* own = reinterpret_cast<float*>(scales.get());
  Quantize quantize{};
  quantize.m = d.m;
  quantize.k = d.k;
  quantize.bits = bits;
  quantize.group = d.group;
  quantize.sx = own;
  quantize.unit = fit ? unit : 0.0f;
  quantize.low = static_cast<float>(low);
  quantize.high = static_cast<float>(high);
  quantize.q = reinterpret_cast<int8_t*>(q.get());
  quantize.qsum = reinterpret_cast<int32_t*>(sums.get());
  d.q = quantize.q;
  d.qsum = quantize.qsum;
  d.sx = own;
  const int64_t one_sx = sx.dimensions()[1];
  try {
    for (int64_t s = 0; s < stack; s++) {
      const float* given = static_cast<const float*>(sx.untyped_data()) + s * one_sx;
      for (int64_t m = 0; m < d.m && !fit; m++) own[m] = given[one_sx == 1 ? 0 : m];
      if (codes)
        quantize.codes = static_cast<const int8_t*>(x.untyped_data()) + s * d.m * d.k;
      else
        quantize.x = static_cast<const float*>(x.untyped_data()) + s * d.m * d.k;
      take(d, of.first, s, w, scale, zeros, *y);
      Rows rows{&quantize, chosen, (int64_t{1} << 16) / (d.k + 1) + 1};
      pool.run(pool.context, pool.workers, (d.m + rows.step - 1) / rows.step, quantize_task, &rows);
      qjax::run_dot(d, chosen, pool, scratch.get());
    }
  } catch (const std::bad_alloc&) {
    return no_memory("tasks");
  }
  return ffi::Error::Success();
}

// x f32 [s, m, k]; the others as above.
ffi::Error float_dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                     ffi::AnyBuffer zeros, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t bits,
                     int64_t group, int64_t is_signed, int64_t isa) {
  if (x.element_type() != ffi::F32 || x.dimensions().size() != 3)
    return invalid("activations have to be float32 [s, m, k], they are of shape " + shape(x));
  qjax::FloatDot f{};
  Dot& d = f.dot;
  Layers of;
  ffi::Error wrong = describe(d, of, x, w, scale, zeros, layer, *y, bits, group, is_signed);
  if (wrong.failure()) return wrong;
  const int64_t stack = x.dimensions()[0];
  if (stack == 0 || d.m == 0 || d.n == 0) return ffi::Error::Success();
  const int chosen = isa < 0 ? qjax::best_isa(d) : static_cast<int>(isa);
  if (!qjax::has_isa(chosen)) return no_isa(chosen);
  const Pool pool = pool_of(threads);
  Memory laid = aligned(d.m * f.x_stride() * 4);
  if (!laid) return no_memory("activations");
  f.x = reinterpret_cast<float*>(laid.get());
  try {
    for (int64_t s = 0; s < stack; s++) {
      qjax::arrange_floats(static_cast<const float*>(x.untyped_data()) + s * d.m * d.k, d.m, d.k, bits,
                           reinterpret_cast<float*>(laid.get()));
      take(d, of.first, s, w, scale, zeros, *y);
      qjax::run_float_dot(f, chosen, pool);
    }
  } catch (const std::bad_alloc&) {
    return no_memory("tasks");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_dot, dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("is_signed")
                                  .Attr<int64_t>("low")
                                  .Attr<int64_t>("high")
                                  .Attr<float>("unit")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_float_dot, float_dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("is_signed")
                                  .Attr<int64_t>("isa"));

// For the loader, which asks before it hands handlers to XLA.
extern "C" {
int qjax_interface_major() { return XLA_FFI_API_MAJOR; }
int qjax_interface_minor() { return XLA_FFI_API_MINOR; }
const char* qjax_digest() { return QJAX_DIGEST; }
int qjax_has_isa(int isa) { return isa >= 0 && isa < qjax::kIsaCount && qjax::has_isa(isa); }
const char* qjax_isa_name(int isa) { return qjax::isa_name(isa); }
}
