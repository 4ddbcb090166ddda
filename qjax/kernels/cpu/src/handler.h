// What handlers that XLA calls share: checks of operands, memory, XLA's threads.
#pragma once
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "problem.h"
#include "share.h"
#include "xla/ffi/api/ffi.h"

namespace qjax {

namespace ffi = xla::ffi;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

// Null where there is not that much.
inline Memory aligned(int64_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))));
}

inline void run_in_pool(void* context, int64_t workers, int64_t count, void (*task)(void*, int64_t, int64_t),
                        void* argument) {
  auto* pool = static_cast<ffi::ThreadPool*>(context);
  share([pool](auto work) { pool->Schedule(std::move(work)); }, workers, count, task, argument);
}

inline Pool pool_of(ffi::ThreadPool& threads) {
  return Pool{threads.num_threads() > 1 ? threads.num_threads() : 1, &threads, run_in_pool};
}

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("qjax_dot: " + what); }

inline ffi::Error no_memory(const char* what) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("qjax_dot: no memory for ") + what);
}

inline ffi::Error no_isa(int isa) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, std::string("qjax_dot: this processor has no ") + isa_name(isa));
}

inline std::string shape(const ffi::AnyBuffer& a) {
  std::string out = "[";
  for (size_t i = 0; i < a.dimensions().size(); i++) out += (i ? ", " : "") + std::to_string(a.dimensions()[i]);
  return out + "]";
}

inline bool is(const ffi::AnyBuffer& a, ffi::DataType type, size_t rank) {
  return a.element_type() == type && a.dimensions().size() == rank;
}

// Whether an operand is [stack, anything, anything]; the sizes of the stack are of every operand the first.
inline bool stacked(const ffi::AnyBuffer& a, ffi::DataType type, int64_t stack) {
  return is(a, type, 3) && a.dimensions()[0] == stack;
}

// [s, rows or 1, columns or 1], as strides that are 0 where one number serves all.
inline bool broadcasts(const ffi::AnyBuffer& a, int64_t rows, int64_t columns, int64_t* along_rows,
                       int64_t* along_columns) {
  const int64_t r = a.dimensions()[1], c = a.dimensions()[2];
  if ((r != rows && r != 1) || (c != columns && c != 1)) return false;
  *along_rows = r == 1 && rows != 1 ? 0 : c;
  *along_columns = c == 1 ? 0 : 1;
  return true;
}

template <class T>
const T* data(const ffi::AnyBuffer& a, int64_t from = 0) {
  return static_cast<const T*>(a.untyped_data()) + from;
}

// Numbers of one matrix of a stack.
inline int64_t matrix_size(const ffi::AnyBuffer& a) { return a.dimensions()[1] * a.dimensions()[2]; }

// Which matrices of a weight are read: some, from `first` on, of `all` that it has.
struct Layers {
  int64_t all = 0, first = 0;
};

// Fills in those that `stack` matrices of activations meet. Without a layer, s32 [0], the weight has as many. With one, s32
// [1], it has whole layers of them, of which one is read: the last if the number is too large, the first if it is negative.
inline ffi::Error find_layer(Layers& of, int64_t stack, const ffi::AnyBuffer& w, const ffi::AnyBuffer& layer) {
  if (!is(layer, ffi::S32, 1) || layer.dimensions()[0] > 1)
    return invalid("the layer has to be int32 [0 or 1], it is of shape " + shape(layer));
  of.all = stack;
  if (layer.dimensions()[0] == 0 || stack == 0) return ffi::Error::Success();
  if (w.dimensions().size() == 3) of.all = w.dimensions()[0];
  if (of.all == 0 || of.all % stack)
    return invalid("the weight has to be bytes [s, n, bytes], it is of shape " + shape(w));
  const int64_t last = of.all / stack - 1, asked = *data<int32_t>(layer);
  of.first = (asked < 0 ? 0 : asked > last ? last : asked) * stack;
  return ffi::Error::Success();
}

}  // namespace qjax
