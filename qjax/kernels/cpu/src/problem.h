// What the kernels compute, free of XLA, so that a program of their own can test them.
//
//   y[m, n] = sum over groups g of (sum over k in g of (u[n, k] - z[n, g]) * q[m, k]) * s[n, g]  * sx[m]
//
// with u the unsigned codes of the weight and q int8 codes of the activations. Inner sums are exact integers modulo
// 2^32; floats are added in the order of groups, multiplied and added apart. So every instruction set, every number of
// threads and of rows gives the same bits.
//
// A row of the weight is a stream of codes of `bits` bits, P = 8 / bits to a byte, the first in the lowest bits. It is
// read in chunks of 64 bytes. Activations are laid out to match: for each chunk P runs of 64 codes, run p with those
// that meet the p-th code of each byte ("phase" p), padded with zeros to whole chunks.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && ((defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11) || \
                                                  (defined(__clang__) && __clang_major__ >= 12))
#define QJAX_HAS_AMX 1
#define QJAX_HAS_AVX_VNNI 1
#endif

// Every processor of 64-bit ARM has vectors. Functions are compiled for more by naming it, as compilers have it since GCC 10
// and Clang 16 (Apple's 15); others have it where they are told to for whole files.
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define QJAX_HAS_NEON 1
#if (defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10) || \
    (defined(__clang__) && (defined(__apple_build_version__) ? __clang_major__ >= 15 : __clang_major__ >= 16))
#define QJAX_HAS_DOTPROD 1
#define QJAX_HAS_I8MM 1
#define QJAX_TARGET_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define QJAX_TARGET_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#elif defined(__ARM_FEATURE_DOTPROD)
#define QJAX_HAS_DOTPROD 1
#define QJAX_TARGET_DOTPROD
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define QJAX_HAS_I8MM 1
#define QJAX_TARGET_I8MM
#endif
#endif
#endif

namespace qjax {

constexpr int64_t kChunk = 64;   // bytes of a weight row that are read together
constexpr int64_t kBlock = 16;   // rows of the weight, which lie in the lanes of a 512-bit vector
constexpr int64_t kPanel = 64;   // rows of the weight that a task lays out anew for many rows of activations

// Instruction sets, from the plainest: those of x86, then those of 64-bit ARM.
enum Isa : int {
  kPortable = 0,
  kAvx2 = 1,
  kAvxVnni = 2,
  kAvx512Vnni = 3,
  kAmx = 4,
  kNeon = 5,
  kDotprod = 6,
  kI8mm = 7,
  kIsaCount = 8
};

struct Dot {
  int64_t m, n, k;      // rows of activations, rows of the weight, what is summed over
  int64_t bits;         // of a weight code: 8, 4 or 2
  int64_t group;        // codes that share a scale; k where a row has one
  int64_t row_bytes;    // of the weight
  uint8_t flip;         // what makes bytes of codes unsigned: the sign bits of signed ones
  int32_t zero;         // zero point where there is no array of them

  const uint8_t* w;     // [n, row_bytes]
  const float* scale;   // strides in elements: 0 where one number serves all
  int64_t scale_n, scale_g;
  const uint8_t* zeros; // or null
  int64_t zeros_n, zeros_g;

  const int8_t* q;      // [m, chunks, P, 64], and 64 bytes more that may be read
  const int32_t* qsum;  // [m, groups]
  const float* sx;      // [m]
  float* y;             // [m, n]

  int64_t phases() const { return 8 / bits; }
  int64_t chunks() const { return (row_bytes + kChunk - 1) / kChunk; }
  int64_t q_stride() const { return chunks() * phases() * kChunk; }
  int64_t groups() const { return k == 0 ? 0 : (k + group - 1) / group; }
  int64_t group_bytes() const { return group * bits / 8; }
  int32_t zero_at(int64_t row, int64_t g) const { return zeros ? zeros[row * zeros_n + g * zeros_g] : zero; }
  float scale_at(int64_t row, int64_t g) const { return scale[row * scale_n + g * scale_g]; }
};

// Who runs tasks 0..count-1, in any order, on up to `workers` threads; `run` returns when all are done. A task is
// called with its number and that of the thread, below `workers`, whose scratch memory it may use.
struct Pool {
  int64_t workers;
  void* context;
  void (*run)(void* context, int64_t workers, int64_t count, void (*task)(void*, int64_t, int64_t), void* argument);
};

// Floats to codes. x [m, k] -> q and qsum as in Dot; sx [m]. Rounds x * (1 / sx)
// to the nearest even, within [low, high]; NaN becomes 0, and so do subnormal numbers, as XLA has it on CPU.
//
// Where `unit` is not 0, scales are fitted first, and written to sx: max(max |x| * unit, 2^-126), in which NaN counts as
// infinity; then a row that is not finite has an infinite scale and codes 0, and every product with it is NaN.
struct Quantize {
  int64_t m, k, bits, group;
  const float* x;
  const int8_t* codes;  // in place of x: codes that are known already, [m, k]
  float* sx;
  float unit;
  float low, high;
  int8_t* q;
  int32_t* qsum;
  int64_t chunks() const { return ((k * bits + 7) / 8 + kChunk - 1) / kChunk; }
};

void quantize_rows(const Quantize& what, int64_t first, int64_t last, int isa);

// Whether groups fall on chunks, or several whole ones in each, as the vector kernels have it; the portable one takes all.
bool regular(const Dot& dot);

// The best instruction set of this processor for a problem.
int best_isa(const Dot& dot);
bool has_isa(int isa);
const char* isa_name(int isa);

// Bytes of scratch memory per worker.
int64_t scratch_bytes(const Dot& dot);

// The product with activations that stay floats:
//
//   y[m, n] = sum over k of (u[n, k] - z[n, g]) * s[n, g] * x[m, k]
//
// in float32, terms in an order that depends on the instruction set alone. Activations lie as vector instructions take
// codes out of words: for each chunk of 64 bytes, and each of the 32 / bits codes j of a word, 16 numbers, those that meet
// code j of each word. Zeros fill the last chunk.
void arrange_floats(const float* x, int64_t m, int64_t k, int64_t bits, float* out);

struct FloatDot {
  Dot dot;           // q, qsum and sx are not used
  const float* x;    // [m, chunks, 512 / bits]
  int64_t x_stride() const { return dot.chunks() * (512 / dot.bits); }
};

void run_float_dot(const FloatDot& dot, int isa, const Pool& pool);
void float_rows_portable(const FloatDot& dot, int64_t n0, int64_t n1);
#if defined(__x86_64__)
void float_rows_avx512(const FloatDot& dot, int64_t n0, int64_t n1);
#elif defined(QJAX_HAS_NEON)
void float_rows_neon(const FloatDot& dot, int64_t n0, int64_t n1);
#endif

// Everything: y from q. `scratch` has scratch_bytes for each worker, aligned to 64 bytes.
void run_dot(const Dot& dot, int isa, const Pool& pool, char* scratch);

// One panel of rows [n0, n1) of the weight, by an instruction set.
void panel_portable(const Dot& dot, int64_t n0, int64_t n1);
#if defined(__x86_64__)
void panel_avx2(const Dot& dot, int64_t n0, int64_t n1);
#if defined(QJAX_HAS_AVX_VNNI)
void panel_avx_vnni(const Dot& dot, int64_t n0, int64_t n1);
#endif
void panel_avx512(const Dot& dot, int64_t n0, int64_t n1, char* scratch);
#if defined(QJAX_HAS_AMX)
void panel_amx(const Dot& dot, int64_t n0, int64_t n1, char* scratch);
bool amx_allowed();
#endif
#elif defined(QJAX_HAS_NEON)
void panel_neon(const Dot& dot, int64_t n0, int64_t n1);
#if defined(QJAX_HAS_DOTPROD)
void panel_dotprod(const Dot& dot, int64_t n0, int64_t n1);
#endif
#if defined(QJAX_HAS_I8MM)
void panel_i8mm(const Dot& dot, int64_t n0, int64_t n1);
#endif
void panel_arm(const Dot& dot, int64_t n0, int64_t n1, int isa);  // by whichever of these
#endif

}  // namespace qjax
