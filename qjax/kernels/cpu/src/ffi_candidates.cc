// The handler of losses of candidates: checks every dtype and shape, allocates memory, shares the work among XLA's threads.
#include "candidates.h"
#include "handler.h"

namespace {

using namespace qjax;

// x f32 [s, m, k]; number f32, likewise, or [s, 0, 0] for even quantizers; b f32 [s, p, k] and rest f32 [s, m, p], or [s, 0, 0]
// both; scale and other f32 [a, c], where a divides s, or is m with `by_row` and s = 1; table f32 [c, entries], or [c, 0];
// loss f32 [s, c], or [m, c] by row. Fields as in candidates.h.
ffi::Error candidates(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer number, ffi::AnyBuffer b,
                      ffi::AnyBuffer rest, ffi::AnyBuffer scale, ffi::AnyBuffer other, ffi::AnyBuffer table,
                      ffi::Result<ffi::AnyBuffer> loss, int64_t form, int64_t by_row, float top, float least) {
  if (!is(x, ffi::F32, 3)) return invalid("numbers have to be float32 [s, m, k], they are of shape " + shape(x));
  Candidates c{};
  c.slices = x.dimensions()[0];
  c.m = x.dimensions()[1];
  c.k = x.dimensions()[2];
  c.form = static_cast<int>(form);
  c.by_row = by_row != 0;
  c.top = top;
  c.least = least;
  if (form < kProduct || form > kOwn) return invalid("there is no form " + std::to_string(form));
  if (!stacked(b, ffi::F32, c.slices) || !stacked(rest, ffi::F32, c.slices))
    return invalid("the matrix and the rest have to be float32 [s, .., ..], they are of shapes " + shape(b) + " and " + shape(rest));
  if (form != kOwn) {
    c.p = b.dimensions()[1];
    if (b.dimensions()[2] != c.k || rest.dimensions()[1] != c.m || rest.dimensions()[2] != c.p ||
        (form == kQuadratic && c.p != c.k))
      return invalid("the matrix " + shape(b) + " and the rest " + shape(rest) + " do not fit numbers " + shape(x));
  }
  if (!is(scale, ffi::F32, 2) || !is(other, ffi::F32, 2) || scale.dimensions()[0] != other.dimensions()[0] ||
      scale.dimensions()[1] != other.dimensions()[1])
    return invalid("settings have to be float32 [a, c] twice, they are of shapes " + shape(scale) + " and " + shape(other));
  c.settings = scale.dimensions()[0];
  c.count = scale.dimensions()[1];
  if (c.by_row ? (c.slices != 1 || c.settings != c.m) : (c.settings == 0 || c.slices % c.settings))
    return invalid("settings " + shape(scale) + " do not fit numbers " + shape(x));
  if (!is(table, ffi::F32, 2) || table.dimensions()[0] != c.count)
    return invalid("tables have to be float32 [c, entries], they are of shape " + shape(table));
  c.entries = table.dimensions()[1];
  if (!stacked(number, ffi::F32, c.slices) ||
      (c.entries > 0 && (number.dimensions()[1] != c.m || number.dimensions()[2] != c.k)))
    return invalid("what tables stand for has to be of the shape of the numbers, it is " + shape(number));
  const int64_t results = c.by_row ? c.m : c.slices;
  if (!is(*loss, ffi::F32, 2) || loss->dimensions()[0] != results || loss->dimensions()[1] != c.count)
    return invalid("losses have to be float32 [s, c], they are of shape " + shape(*loss));
  if (!has_bf16_tiles()) return ffi::Error(ffi::ErrorCode::kUnimplemented, "qjax_candidates: this processor has no bfloat16 tiles");
  c.x = data<float>(x);
  c.number = data<float>(number);
  c.b = data<float>(b);
  c.rest = data<float>(rest);
  c.scale = data<float>(scale);
  c.other = data<float>(other);
  c.table = data<float>(table);
  c.loss = static_cast<float*>(loss->untyped_data());
  const Pool pool = pool_of(threads);
  Memory packed = aligned(c.packed_elements() * 2), partial = aligned(c.by_row ? 0 : c.tasks() * c.count * 8);
  Memory scratch = aligned((c.scratch_bytes() + 63) / 64 * 64 * pool.workers);
  if (!packed || !partial || !scratch) return no_memory("candidates");
  return each(1, [&](int64_t) {
    run_candidates(c, pool, reinterpret_cast<uint16_t*>(packed.get()), reinterpret_cast<double*>(partial.get()), scratch.get());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_candidates, candidates, floats(integers(arrays<7>(), "form", "by_row"), "top", "least"));

extern "C" int qjax_has_bf16_tiles() { return qjax::has_bf16_tiles(); }
