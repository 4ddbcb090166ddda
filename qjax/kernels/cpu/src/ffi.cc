// The handlers of products with integer weights: check every dtype and shape, allocate scratch memory, share the work among
// XLA's threads.
#include "activations.h"
#include "float_tiles.h"
#include "weights.h"

namespace {

using namespace qjax;

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
  return check_result(y, stack, d.m, d.n);
}

// x and sx as in `Activations`; the others as above. Each of the s matrices by itself.
ffi::Error dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer sx, ffi::AnyBuffer w, ffi::AnyBuffer scale,
               ffi::AnyBuffer zeros, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t bits, int64_t group,
               int64_t is_signed, int64_t low, int64_t high, float unit, int64_t isa) {
  Activations activations;
  if (ffi::Error wrong = activations.describe(x, sx, low, high, unit); wrong.failure()) return wrong;
  Dot d{};
  Layers of;
  ffi::Error wrong = describe(d, of, x, w, scale, zeros, layer, *y, bits, group, is_signed);
  if (wrong.failure()) return wrong;
  const int64_t stack = x.dimensions()[0];
  if (stack == 0 || d.m == 0 || d.n == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error none = choose_isa(d, isa, &chosen); none.failure()) return none;

  const Pool pool = pool_of(threads);
  Memory scratch = aligned(scratch_bytes(d) * pool.workers);
  if (!activations.allocate(d) || !scratch) return no_memory("activations and scratch");
  return each(stack, [&](int64_t s) {
    activations.quantize(s, chosen, pool);
    take_weight(d, of.first + s, w, scale, zeros);
    d.y = matrix(y, s);
    run_dot(d, chosen, pool, scratch.get());
  });
}

// Rows of floats from which on tiles are chosen: vectors read the weight for every four rows.
constexpr int64_t kManyRows = 8;

// x f32 [s, m, k], of which each number is the sum of `parts` of bfloat16; the others as above.
ffi::Error float_dot(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scale,
                     ffi::AnyBuffer zeros, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t bits,
                     int64_t group, int64_t is_signed, int64_t parts, int64_t isa) {
  if (parts < 1 || parts > 3) return invalid("floats are cut in 1 to 3 parts, not " + std::to_string(parts));
  if (!is(x, ffi::F32, 3)) return invalid("activations have to be float32 [s, m, k], they are of shape " + shape(x));
  FloatDot f{};
  Dot& d = f.dot;
  Layers of;
  ffi::Error wrong = describe(d, of, x, w, scale, zeros, layer, *y, bits, group, is_signed);
  if (wrong.failure()) return wrong;
  const int64_t stack = x.dimensions()[0];
  if (stack == 0 || d.m == 0 || d.n == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error none = choose_isa(d, isa, &chosen); none.failure()) return none;

  const Pool pool = pool_of(threads);
  if (chosen == kAmx && has_bf16_tiles() && fits_tiles(d) && (isa == kAmx || d.m > kManyRows)) {
    FloatTiles tiles{d, nullptr, parts};
    Memory rows = aligned(tiles.laid_bytes()), scratch = aligned((tiles.scratch_bytes() + 63) / 64 * 64 * pool.workers);
    if (!rows || !scratch) return no_memory("activations and scratch");
    return each(stack, [&](int64_t s) {
      tiles.x = matrix<float>(x, s);
      take_weight(tiles.dot, of.first + s, w, scale, zeros);
      tiles.dot.y = matrix(y, s);
      run_float_tiles(tiles, pool, rows.get(), scratch.get());
    });
  }
  Memory laid = aligned(d.m * f.x_stride() * 4);
  if (!laid) return no_memory("activations");
  float* own = reinterpret_cast<float*>(laid.get());
  f.x = own;
  return each(stack, [&](int64_t s) {
    arrange_floats(matrix<float>(x, s), d.m, d.k, bits, own);
    take_weight(d, of.first + s, w, scale, zeros);
    d.y = matrix(y, s);
    run_float_dot(f, chosen, pool);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_dot, dot, quantizing(integers(arrays<6>(), "bits", "group", "is_signed")));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_float_dot, float_dot, integers(arrays<5>(), "bits", "group", "is_signed", "parts", "isa"));

// For the loader, which asks before it hands handlers to XLA.
extern "C" {
int qjax_interface_major() { return XLA_FFI_API_MAJOR; }
int qjax_interface_minor() { return XLA_FFI_API_MINOR; }
const char* qjax_digest() { return QJAX_DIGEST; }
int qjax_has_isa(int isa) { return isa >= 0 && isa < qjax::kIsaCount && qjax::has_isa(isa); }
const char* qjax_isa_name(int isa) { return qjax::isa_name(isa); }
}
