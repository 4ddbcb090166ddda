// The handler of attention over a cache: checks every dtype and shape, allocates scratch memory, shares the work among
// XLA's threads.
#include <new>
#include <string>

#include "attention.h"
#include "handler.h"

namespace ffi = xla::ffi;

namespace {

using qjax::Attention;
using qjax::Codes;
using qjax::is;
using qjax::Memory;
using qjax::shape;

ffi::Error refused(const std::string& what) { return ffi::Error::InvalidArgument("qjax_attention: " + what); }

int number_type(ffi::DataType type) {
  switch (type) {
    case ffi::F32:
      return qjax::kF32;
    case ffi::F16:
      return qjax::kF16;
    case ffi::U8:
      return qjax::kU8;
    default:
      return qjax::kNone;
  }
}

int64_t width(int type) { return type == qjax::kF32 ? 4 : type == qjax::kF16 ? 2 : type == qjax::kU8 ? 1 : 0; }

// [layers, sequences, heads, room, last]
bool fits(const ffi::AnyBuffer& a, int64_t layers, const Attention& of, int64_t last) {
  const auto d = a.dimensions();
  return d.size() == 5 && d[0] == layers && d[1] == of.sequences && d[2] == of.heads && d[3] == of.room && d[4] == last;
}

// Fills in the keys or values of one layer.
ffi::Error describe(const std::string& name, Codes& c, const Attention& of, int64_t layers, int64_t layer,
                    const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scale, const ffi::AnyBuffer& zero, int64_t bits,
                    bool is_signed) {
  if (bits != 8 && bits != 4) return refused(name + " of " + std::to_string(bits) + " bits; 8 or 4");
  c.bits = bits;
  c.is_signed = is_signed;
  c.row_bytes = (c.dim * bits + 7) / 8;
  if ((codes.element_type() != ffi::U8 && codes.element_type() != ffi::S8) || !fits(codes, layers, of, c.row_bytes))
    return refused(name + " have to be bytes [layers, sequences, heads, room, " + std::to_string(c.row_bytes) +
                   "], they are of shape " + shape(codes));
  c.scale_type = number_type(scale.element_type());
  if ((c.scale_type != qjax::kF32 && c.scale_type != qjax::kF16) || !fits(scale, layers, of, 1))
    return refused("scales of " + name + " have to be float32 or float16 [layers, sequences, heads, room, 1], they are "
                   "of shape " + shape(scale));
  c.zero_type = number_type(zero.element_type());
  if (c.zero_type == qjax::kNone) return refused("zero points of " + name + " have to be float32, float16 or uint8");
  const bool none = zero.dimensions().size() == 1 && zero.dimensions()[0] == 0;
  if (!none && !fits(zero, layers, of, 1))
    return refused("zero points of " + name + " have to be [layers, sequences, heads, room, 1] or [0], they are of "
                   "shape " + shape(zero));
  const int64_t before = layer * of.sequences * of.heads * of.room;
  c.codes = static_cast<const uint8_t*>(codes.untyped_data()) + before * c.row_bytes;
  c.scale = static_cast<const char*>(scale.untyped_data()) + before * width(c.scale_type);
  c.zero = none ? nullptr : static_cast<const char*>(zero.untyped_data()) + before * width(c.zero_type);
  if (none) c.zero_type = qjax::kNone;
  return ffi::Error::Success();
}

// q f32 [sequences, heads, tokens, group, dim]; lengths and windows s32 [sequences]; layer s32 [], taken to lie within
// the layers; keys and values as above; y f32 [sequences, heads, tokens, group, dim of values].
ffi::Error attention(ffi::ThreadPool threads, ffi::AnyBuffer q, ffi::AnyBuffer lengths, ffi::AnyBuffer windows,
                     ffi::AnyBuffer layer, ffi::AnyBuffer k, ffi::AnyBuffer k_scale, ffi::AnyBuffer k_zero,
                     ffi::AnyBuffer v, ffi::AnyBuffer v_scale, ffi::AnyBuffer v_zero, ffi::Result<ffi::AnyBuffer> y,
                     int64_t k_bits, int64_t k_signed, int64_t v_bits, int64_t v_signed, float scale, int64_t isa) {
  if (!is(q, ffi::F32, 5))
    return refused("queries have to be float32 [sequences, heads, tokens, group, dim], they are of shape " + shape(q));
  if (!is(*y, ffi::F32, 5)) return refused("the result has to be float32 like the queries, it is of shape " + shape(*y));
  for (int i = 0; i < 4; i++)
    if (y->dimensions()[i] != q.dimensions()[i])
      return refused("the result has to be " + shape(q) + " but for the last dimension, it is of shape " + shape(*y));
  if (k.dimensions().size() != 5)
    return refused("keys have to be bytes [layers, sequences, heads, room, bytes], they are of shape " + shape(k));
  Attention a{};
  a.sequences = q.dimensions()[0];
  a.heads = q.dimensions()[1];
  a.tokens = q.dimensions()[2];
  a.group = q.dimensions()[3];
  a.k.dim = q.dimensions()[4];
  a.v.dim = y->dimensions()[4];
  a.room = k.dimensions()[3];
  a.scale = scale;
  const int64_t layers = k.dimensions()[0];
  for (const ffi::AnyBuffer* each : {&lengths, &windows})
    if (!is(*each, ffi::S32, 1) || each->dimensions()[0] != a.sequences)
      return refused("lengths and windows have to be int32 [sequences], one is of shape " + shape(*each));
  if (!is(layer, ffi::S32, 0)) return refused("the layer has to be one int32, it is of shape " + shape(layer));
  if (layers < 1) return refused("there are no layers");
  int64_t index = *static_cast<const int32_t*>(layer.untyped_data());
  index = index < 0 ? 0 : index < layers ? index : layers - 1;
  if (ffi::Error e = describe("keys", a.k, a, layers, index, k, k_scale, k_zero, k_bits, k_signed != 0); e.failure())
    return e;
  if (ffi::Error e = describe("values", a.v, a, layers, index, v, v_scale, v_zero, v_bits, v_signed != 0); e.failure())
    return e;
  if (q.element_count() == 0 && y->element_count() == 0) return ffi::Error::Success();
  int chosen = static_cast<int>(isa);
  if (isa < 0)
    for (chosen = qjax::kIsaCount - 1; !qjax::has_isa(chosen); chosen--) {
    }
  if (!qjax::has_isa(chosen))
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      std::string("qjax_attention: this processor has no ") + qjax::isa_name(chosen));
  a.q = static_cast<const float*>(q.untyped_data());
  a.lengths = static_cast<const int32_t*>(lengths.untyped_data());
  a.windows = static_cast<const int32_t*>(windows.untyped_data());
  a.y = static_cast<float*>(y->untyped_data());
  const qjax::Pool pool = qjax::pool_of(threads);
  Memory scratch = qjax::aligned(qjax::attention_scratch(a) * 4);
  if (!scratch) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax_attention: no memory for scratch");
  try {
    qjax::run_attention(a, chosen, pool, reinterpret_cast<float*>(scratch.get()));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "qjax_attention: no memory for tasks");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qjax_attention, attention,
    qjax::integers(qjax::floats(qjax::integers(qjax::arrays<10>(), "k_bits", "k_signed", "v_bits", "v_signed"), "scale"),
                   "isa"));
