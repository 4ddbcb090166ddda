// The handler of products with weights of two levels: checks, memory, threads.
#include "activations.h"
#include "two_level.h"

namespace {

using namespace qjax;

// x, sx as in `Activations`; w u8 [t, n, bytes], step s8 and zeros u8 [t, n or 1, groups or 1] of the layers that
// `find_layer` chooses among, scale f32 [s, n or 1, 1] of the one that is read, y f32 [s, m, n].
ffi::Error two_level(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer sx, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                     ffi::AnyBuffer step, ffi::AnyBuffer zeros, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y,
                     int64_t bits, int64_t group, int64_t after, int64_t low, int64_t high, float unit, int64_t isa) {
  Activations activations;
  if (ffi::Error wrong = activations.describe(x, sx, low, high, unit); wrong.failure()) return wrong;
  if (bits != 4 && bits != 2) return invalid("codes of two levels of " + std::to_string(bits) + " bits; 4 or 2");
  const int64_t stack = x.dimensions()[0];
  Layers of;
  if (ffi::Error wrong = find_layer(of, stack, w, layer); wrong.failure()) return wrong;
  if (!stacked(w, ffi::U8, of.all)) return not_bytes(w);
  TwoLevel t{};
  Dot& d = t.dot;
  d.m = x.dimensions()[1];
  d.k = x.dimensions()[2];
  d.n = w.dimensions()[1];
  d.row_bytes = w.dimensions()[2];
  d.bits = bits;
  if (d.row_bytes != (d.k * bits + 7) / 8)
    return does_not_hold(d.row_bytes, d.k, "codes of " + std::to_string(bits) + " bits");
  as_one_group(d);
  t.group = group > 0 && group < d.k ? group : d.group;
  t.after = after != 0;
  const int64_t groups = t.groups(), columns = groups > 0 ? groups : 1;
  if (groups > 1 && t.group % d.phases()) return invalid("groups have to begin with a byte");
  if (!stacked(scale, ffi::F32, stack) || !broadcasts(scale, d.n, 1, &d.scale_n, &d.scale_g))
    return invalid("scales have to be float32 [s, n or 1, 1], they are of shape " + shape(scale));
  if (!stacked(step, ffi::S8, of.all) || !broadcasts(step, d.n, columns, &t.step_n, &t.step_g))
    return invalid("steps have to be int8 [s, n or 1, groups or 1], they are of shape " + shape(step));
  if (!stacked(zeros, ffi::U8, of.all) || !broadcasts(zeros, d.n, columns, &t.zeros_n, &t.zeros_g))
    return invalid("zero points have to be uint8 [s, n or 1, groups or 1], they are of shape " + shape(zeros));
  if (ffi::Error wrong = check_result(*y, stack, d.m, d.n); wrong.failure()) return wrong;
  if (stack == 0 || d.m == 0 || d.n == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error wrong = choose_isa(t, isa, &chosen); wrong.failure()) return wrong;

  const Pool pool = pool_of(threads);
  Memory scratch = aligned(scratch_bytes(d) * pool.workers);
  if (!activations.allocate(d) || !scratch) return no_memory("activations and scratch");
  return each(stack, [&](int64_t s) {
    activations.quantize(s, chosen, pool);
    d.w = matrix<uint8_t>(w, of.first + s);
    d.scale = matrix<float>(scale, s);
    t.step = matrix<int8_t>(step, of.first + s);
    t.zeros = matrix<uint8_t>(zeros, of.first + s);
    d.y = matrix(y, s);
    run_two_level(t, chosen, pool, scratch.get());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_two_level, two_level, quantizing(integers(arrays<7>(), "bits", "group", "after")));
