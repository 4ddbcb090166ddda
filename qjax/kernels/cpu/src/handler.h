// What handlers that XLA calls share: checks of operands, memory, XLA's threads, and how XLA is told of them.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
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

// Matrix s of a stack.
template <class T>
const T* matrix(const ffi::AnyBuffer& a, int64_t s) {
  return data<T>(a, s * matrix_size(a));
}

// Matrix s of the results.
inline float* matrix(ffi::Result<ffi::AnyBuffer>& y, int64_t s) {
  return static_cast<float*>(y->untyped_data()) + s * matrix_size(*y);
}

inline ffi::Error not_bytes(const ffi::AnyBuffer& w) {
  return invalid("the weight has to be bytes [s, n, bytes], it is of shape " + shape(w));
}

inline ffi::Error does_not_hold(int64_t row_bytes, int64_t count, const std::string& what) {
  return invalid("rows of " + std::to_string(row_bytes) + " bytes do not hold " + std::to_string(count) + " " + what);
}

// An error unless the result is f32 [stack, m, n].
inline ffi::Error check_result(const ffi::AnyBuffer& y, int64_t stack, int64_t m, int64_t n, const char* s = "s") {
  if (stacked(y, ffi::F32, stack) && y.dimensions()[1] == m && y.dimensions()[2] == n) return ffi::Error::Success();
  return invalid(std::string("the result has to be float32 [") + s + ", m, n], it is of shape " + shape(y));
}

// The instruction set that was asked for, or the best one for a problem; an error where the processor has it not.
template <class Problem>
ffi::Error choose_isa(const Problem& problem, int64_t asked, int* chosen) {
  *chosen = asked < 0 ? best_isa(problem) : static_cast<int>(asked);
  return has_isa(*chosen) ? ffi::Error::Success() : no_isa(*chosen);
}

// Calls work(s) for each matrix of a stack in turn; an error where it returns one, or where there is no memory for tasks.
template <class Work>
ffi::Error each(int64_t stack, const Work& work) {
  try {
    for (int64_t s = 0; s < stack; s++) {
      if constexpr (std::is_void_v<decltype(work(s))>) {
        work(s);
      } else if (ffi::Error wrong = work(s); wrong.failure()) {
        return wrong;
      }
    }
  } catch (const std::bad_alloc&) {
    return no_memory("tasks");
  }
  return ffi::Error::Success();
}

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
    return not_bytes(w);
  const int64_t last = of.all / stack - 1, asked = *data<int32_t>(layer);
  of.first = (asked < 0 ? 0 : asked > last ? last : asked) * stack;
  return ffi::Error::Success();
}

// How XLA calls a handler: XLA's threads, `count` arrays, one result; then settings in the order in which they are named.
template <int count, class Binding>
auto with_arrays(Binding&& binding) {
  auto next = [&] { return std::move(binding).template Arg<ffi::AnyBuffer>(); };
  if constexpr (count == 1)
    return next();
  else
    return with_arrays<count - 1>(next());
}
template <int count>
auto arrays() {
  return with_arrays<count>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).template Ret<ffi::AnyBuffer>();
}
template <class T, class Binding, class... Names>
auto settings(Binding&& binding, const char* name, Names... more) {
  auto next = [&] { return std::move(binding).template Attr<T>(name); };
  if constexpr (sizeof...(more) == 0)
    return next();
  else
    return settings<T>(next(), more...);
}
template <class Binding, class... Names>
auto integers(Binding&& binding, Names... names) {
  return settings<int64_t>(std::move(binding), names...);
}
template <class Binding, class... Names>
auto floats(Binding&& binding, Names... names) {
  return settings<float>(std::move(binding), names...);
}
// Those by which `Activations` are quantized, and the instruction set.
template <class Binding>
auto quantizing(Binding&& binding) {
  return integers(floats(integers(std::move(binding), "low", "high"), "unit"), "isa");
}

}  // namespace qjax
