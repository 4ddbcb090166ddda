// The handler of products with trit-planes: checks, memory, threads.
#include "activations.h"
#include "trits.h"

namespace {

using namespace qjax;

// x, sx as in `Activations`; w u8 [t, n, bytes] of the layers that `find_layer` chooses among, scale f32 [s, planes * n,
// groups] of the one that is read, y f32 [s, m, n].
ffi::Error trits(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer sx, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                 ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t planes, int64_t store, int64_t group,
                 int64_t low, int64_t high, float unit, int64_t isa) {
  Activations activations;
  if (ffi::Error wrong = activations.describe(x, sx, low, high, unit); wrong.failure()) return wrong;
  if (planes < 1 || planes > 3 || store < kBase3 || store > kNibble || (store == kNibble && planes != 2))
    return invalid("trit-planes are one to three, of base 3 or two bits, or two in half bytes");
  const int64_t stack = x.dimensions()[0];
  Layers of;
  if (ffi::Error wrong = find_layer(of, stack, w, layer); wrong.failure()) return wrong;
  if (!stacked(w, ffi::U8, of.all)) return not_bytes(w);
  Trits t{};
  Dot& d = t.dot;
  d.m = x.dimensions()[1];
  d.k = d.row_bytes = x.dimensions()[2];  // codes of 8 bits, whose activations lie in natural order
  d.n = w.dimensions()[1];
  d.bits = 8;
  d.group = group > 0 && group < d.k ? group : (d.k > 0 ? d.k : 1);
  t.planes = planes;
  t.store = store;
  describe_trits(t);
  const int64_t groups = d.groups();
  if (w.dimensions()[2] != t.row_bytes)
    return does_not_hold(w.dimensions()[2], d.k, "trits of " + std::to_string(planes) + " planes");
  if (!stacked(scale, ffi::F32, stack) || scale.dimensions()[1] != planes * d.n || scale.dimensions()[2] != groups)
    return invalid("scales have to be float32 [s, planes * n, groups], they are of shape " + shape(scale));
  if (ffi::Error wrong = check_result(*y, stack, d.m, d.n); wrong.failure()) return wrong;
  if (stack == 0 || d.m == 0 || d.n == 0 || d.k == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error wrong = choose_isa(t, isa, &chosen); wrong.failure()) return wrong;

  const Pool pool = pool_of(threads);
  const bool wide = planes < 3;
  Memory scratch = aligned(scratch_bytes(t) * pool.workers), laid = aligned(wide ? d.m * t.laid_stride() : 0);
  if (!activations.allocate(d) || !scratch || !laid) return no_memory("activations and scratch");
  t.laid = reinterpret_cast<const int8_t*>(laid.get());
  return each(stack, [&](int64_t s) {
    activations.quantize(s, chosen, pool);
    if (wide) arrange_trits(t, reinterpret_cast<int8_t*>(laid.get()));
    t.w = matrix<uint8_t>(w, of.first + s);
    t.scale = matrix<float>(scale, s);
    d.y = matrix(y, s);
    run_trits(t, chosen, pool, scratch.get());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_trits, trits, quantizing(integers(arrays<5>(), "planes", "store", "group")));
