// The handler of ragged products: rows of activations by the matrix of their group.
#include "activations.h"
#include "weights.h"

namespace {

using namespace qjax;

// x and sx as in `Activations`, one matrix [1, m, k]; w, scale, zeros as in `describe_weight`, a matrix for each group, or of
// the layers that `find_layer` chooses among; sizes s32 [groups]; y f32 [1, m, n]. Rows are sorted by group; those behind the
// last group give 0. Sizes that are negative count as 0, and what is beyond m is cut off.
ffi::Error ragged(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer sx, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                  ffi::AnyBuffer zeros, ffi::AnyBuffer sizes, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y,
                  int64_t bits, int64_t group, int64_t is_signed, int64_t low, int64_t high, float unit, int64_t isa) {
  Activations activations;
  if (ffi::Error wrong = activations.describe(x, sx, low, high, unit); wrong.failure()) return wrong;
  if (x.dimensions()[0] != 1) return invalid("activations have to be one matrix, they are of shape " + shape(x));
  if (!is(sizes, ffi::S32, 1)) return invalid("sizes of groups have to be int32 [groups], they are of shape " + shape(sizes));
  const int64_t matrices = sizes.dimensions()[0];
  Dot d{};
  d.m = x.dimensions()[1];
  d.k = x.dimensions()[2];
  Layers of;
  if (ffi::Error wrong = find_layer(of, matrices, w, layer); wrong.failure()) return wrong;
  if (ffi::Error wrong = describe_weight(d, of.all, w, scale, zeros, bits, group, is_signed); wrong.failure()) return wrong;
  if (ffi::Error wrong = check_result(*y, 1, d.m, d.n, "1"); wrong.failure()) return wrong;
  if (d.m == 0 || d.n == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error wrong = choose_isa(d, isa, &chosen); wrong.failure()) return wrong;

  const Pool pool = pool_of(threads);
  Memory scratch = aligned(scratch_bytes(d) * pool.workers);
  if (!activations.allocate(d) || !scratch) return no_memory("activations and scratch");
  float* out = matrix(y, 0);
  int64_t start = 0;
  ffi::Error wrong = each(matrices, [&](int64_t g) {
    if (g == 0) activations.quantize(0, chosen, pool);  // those of all groups
    const int64_t asked = data<int32_t>(sizes)[g], left = d.m - start;
    const int64_t rows = asked < 0 ? 0 : asked < left ? asked : left;
    if (rows == 0) return;
    Dot own = d;
    own.m = rows;
    own.q = d.q + start * d.q_stride();
    own.qsum = d.qsum + start * d.groups();
    own.sx = d.sx + start;
    own.y = out + start * d.n;
    take_weight(own, of.first + g, w, scale, zeros);
    run_dot(own, isa < 0 ? best_isa(own) : chosen, pool, scratch.get());
    start += rows;
  });
  if (wrong.failure()) return wrong;
  for (int64_t i = start * d.n; i < d.m * d.n; i++) out[i] = 0.0f;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_ragged, ragged, quantizing(integers(arrays<7>(), "bits", "group", "is_signed")));
