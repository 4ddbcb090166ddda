// The handler of products with weights of 2-bit and 4-bit strips: checks, memory, threads.
#include "handler.h"
#include "mixed.h"

namespace {

using namespace qjax;

// [s, rows, columns] of a dtype; where there are no columns, of any number of rows.
bool sized(const ffi::AnyBuffer& a, ffi::DataType type, int64_t stack, int64_t rows, int64_t columns) {
  return stacked(a, type, stack) && a.dimensions()[2] == columns && (columns == 0 || a.dimensions()[1] == rows);
}

ffi::Error not_sized(const char* what, const char* type, int64_t rows, int64_t columns, const ffi::AnyBuffer& a) {
  return invalid(std::string(what) + " have to be " + type + " [s, " + std::to_string(rows) + ", " +
                 std::to_string(columns) + "], they are of shape " + shape(a));
}

// Where the columns of strips begin, 2-bit strips first; false if the map does not have as many 4-bit ones as `f`.
bool columns_of(const Mixed& f, const uint8_t* map, int32_t* column) {
  int64_t narrow = 0, wide = 0;
  for (int64_t i = 0; i < f.strips(); i++) {
    bool is_wide = f.wide > 0;
    if (map && f.narrow > 0 && f.wide > 0)
      is_wide = f.aligned ? ((map[i / 16] >> (2 * (i / 4 % 4))) & 3) == i % 4 : (map[i / 8] >> (i % 8)) & 1;
    if (is_wide ? wide == f.wide : narrow == f.narrow) return false;
    column[is_wide ? f.narrow + wide++ : narrow++] = static_cast<int32_t>(i * f.strip);
  }
  return true;
}

// x f32 [s, m, k]; y f32 [s, m, n]; the others as `Mixed` says, [t, rows, columns] of the layers that `find_layer` chooses
// among, those that are not there without columns.
ffi::Error mixed(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer words,
                 ffi::AnyBuffer tile_scale, ffi::AnyBuffer tile_zero, ffi::AnyBuffer wide_scale, ffi::AnyBuffer wide_zero,
                 ffi::AnyBuffer exponent, ffi::AnyBuffer map, ffi::AnyBuffer value, ffi::AnyBuffer at, ffi::AnyBuffer row,
                 ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> y, int64_t strip, int64_t narrow, int64_t wide,
                 int64_t aligned, int64_t tile, int64_t wide_group, int64_t scale_bits, int64_t isa) {
  if (!is(x, ffi::F32, 3)) return invalid("activations have to be float32 [s, m, k], they are of shape " + shape(x));
  if (strip != 8 && strip != 16 && strip != 32 && strip != 64) return invalid("strips of 8, 16, 32 or 64 columns");
  if (narrow < 0 || wide < 0 || tile < 1 || wide_group < strip || wide_group % strip)
    return invalid("strips, tiles and groups have to be numbers that fit together");
  const int64_t stack = x.dimensions()[0];
  Mixed f{};
  f.m = x.dimensions()[1];
  f.k = x.dimensions()[2];
  f.strip = strip;
  f.narrow = narrow;
  f.wide = wide;
  f.aligned = aligned != 0;
  f.tile = tile;
  f.per_group = wide_group / strip;
  for (int i = 0; i < 3; i++) {
    f.scale_bits[i] = static_cast<int32_t>((scale_bits >> (4 * i)) & 15);
    if (f.scale_bits[i] > 4) return invalid("scale codes of more than 4 bits");
  }
  if (f.x_stride() < f.k || f.x_stride() >= int64_t{1} << 31 || (f.aligned && narrow != 3 * wide))
    return invalid(std::to_string(f.strips()) + " strips do not hold " + std::to_string(f.k) + " columns");
  Layers of;
  if (ffi::Error wrong = find_layer(of, stack, w, layer); wrong.failure()) return wrong;
  if (!stacked(w, ffi::U8, of.all)) return not_bytes(w);
  f.n = w.dimensions()[1];
  f.row_bytes = w.dimensions()[2];
  if (f.row_bytes != (f.strips() + wide) * f.word())
    return does_not_hold(f.row_bytes, f.strips(), "strips");
  const int64_t tiles = (f.n + tile - 1) / tile, triples = f.triples(), groups = f.groups();
  const int64_t mapped = narrow > 0 && wide > 0 ? (f.aligned ? (f.strips() / 4 + 3) / 4 : (f.strips() + 7) / 8) : 0;
  if (!sized(words, ffi::U16, of.all, f.n, triples)) return not_sized("words", "uint16", f.n, triples, words);
  if (!sized(tile_scale, ffi::F16, of.all, 1, tiles * triples * 3))
    return not_sized("scales of tiles", "float16", 1, tiles * triples * 3, tile_scale);
  if (!sized(tile_zero, ffi::U16, of.all, 1, tiles * triples))
    return not_sized("zeros of tiles", "uint16", 1, tiles * triples, tile_zero);
  if (!sized(wide_scale, ffi::F16, of.all, f.n, groups)) return not_sized("scales", "float16", f.n, groups, wide_scale);
  if (!sized(wide_zero, ffi::U8, of.all, f.n, (groups + 1) / 2))
    return not_sized("zeros", "uint8", f.n, (groups + 1) / 2, wide_zero);
  if (!sized(exponent, ffi::S8, of.all, 1, 1)) return not_sized("exponents", "int8", 1, 1, exponent);
  if (!sized(map, ffi::U8, of.all, 1, mapped)) return not_sized("maps of strips", "uint8", 1, mapped, map);
  f.sparse = is(value, ffi::F16, 3) ? value.dimensions()[2] : 0;
  f.at_is_long = at.element_type() == ffi::U32;
  if (!sized(value, ffi::F16, of.all, 1, f.sparse)) return not_sized("sparse numbers", "float16", 1, f.sparse, value);
  if (!sized(at, f.at_is_long ? ffi::U32 : ffi::U16, of.all, 1, f.sparse))
    return not_sized("their columns", "uint16 or uint32", 1, f.sparse, at);
  if (!sized(row, ffi::U32, of.all, 1, f.sparse ? f.n + 1 : 0))
    return not_sized("their rows", "uint32", 1, f.sparse ? f.n + 1 : 0, row);
  if (ffi::Error wrong = check_result(*y, stack, f.m, f.n); wrong.failure()) return wrong;
  if (stack == 0 || f.m == 0 || f.n == 0) return ffi::Error::Success();
  int chosen;
  if (ffi::Error wrong = choose_isa(f, isa, &chosen); wrong.failure()) return wrong;

  const Pool pool = pool_of(threads);
  Memory laid = qjax::aligned(f.m * f.x_stride() * 4), columns = qjax::aligned(f.strips() * 4);
  Memory scratch = qjax::aligned(scratch_bytes(f) * pool.workers);
  if (!laid || !columns || !scratch) return no_memory("activations and scratch");
  float* own = reinterpret_cast<float*>(laid.get());
  int32_t* column = reinterpret_cast<int32_t*>(columns.get());
  f.x = own;
  f.column = column;
  return each(stack, [&](int64_t s) {
    const int64_t i = of.first + s;  // of the weight
    for (int64_t m = 0; m < f.m; m++) {
      const float* given = data<float>(x, (s * f.m + m) * f.k);
      for (int64_t k = 0; k < f.x_stride(); k++) own[m * f.x_stride() + k] = k < f.k ? given[k] : 0.0f;
    }
    if (!columns_of(f, mapped ? matrix<uint8_t>(map, i) : nullptr, column))
      return invalid("the map of strips has not as many of 4 bits as it should");
    f.w = matrix<uint8_t>(w, i);
    f.words = matrix<uint16_t>(words, i);
    f.tile_scale = matrix<uint16_t>(tile_scale, i);
    f.tile_zero = matrix<uint16_t>(tile_zero, i);
    f.wide_scale = matrix<uint16_t>(wide_scale, i);
    f.wide_zero = matrix<uint8_t>(wide_zero, i);
    f.unit = power_of_two(*matrix<int8_t>(exponent, i));
    if (f.sparse > 0) {
      f.value = matrix<uint16_t>(value, i);
      f.at = data<char>(at, i * f.sparse * (f.at_is_long ? 4 : 2));
      f.row = matrix<uint32_t>(row, i);
    }
    f.y = matrix(y, s);
    run_mixed(f, chosen, pool, scratch.get());
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_mixed, mixed,
                              integers(arrays<13>(), "strip", "narrow", "wide", "aligned", "tile", "wide_group",
                                       "scale_bits", "isa"));
