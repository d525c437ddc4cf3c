// scores[t, m] = ‖σ(W0 x_t + b) − σ(W_m x_t + b)‖ over the outputs, on a CPU.
//
// Memory m enters as its difference from the base: with D_m = W_m − W0, made on the fly, σ(y0) − σ(y0 + D_m x) keeps
// the digits that two large products would lose to each other, and without σ the base product is not needed at all.
//
// A task owns some outputs and some tokens. It walks over d_in in chunks: a chunk of its rows of every weight is
// widened to float into a small buffer (the base as it is, memories minus the base), so that each weight is read from
// memory once, and multiplied with the tokens. After the last chunk σ, differences and squares are taken in cache.
// What is multiplied how depends on the number of tokens and on how weights are stored:
//
//   more than 8 tokens    tokens lie in the lanes of vectors, packed once; weights are broadcast
//   few, rows of d_in     d_in lies in the lanes: dot products of a few rows with all tokens
//   few, columns          outputs lie in the lanes; tokens are broadcast
//   one token             as for few, without the buffers
//
// Work: (m + 1) T d_in d_out multiply-adds, m without σ. Memory: every weight once for each `task_tokens` tokens, tokens
// from cache. Squares of a task's rows are summed in float, tasks' sums in double, in the order of rows.

#include "../routing.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr int64_t few_tokens = 8;
// How much of d_in is fetched at once: weights and tokens of a chunk stay in cache. The buffers' lines are longer, since
// lines a power of two apart would share cache sets.
constexpr int64_t chunk = 256, pitch = chunk + 16;
constexpr int64_t dot_rows = 4;          // rows of every weight that are multiplied together
constexpr int64_t column_chunk = 8;      // of d_in, where few tokens meet weights stored by columns,
constexpr int64_t column_width = 512;    // and the outputs that are fetched at once
constexpr int64_t column_tasks = 16;     // ranges of d_in there
constexpr int64_t column_sums = 256;     // outputs that are added up at once
constexpr int64_t wide_chunk = 64;       // of d_in, where many tokens do
constexpr int64_t max_direct = 4;        // memories that one token meets without a buffer
constexpr int64_t line_bytes = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- Widening: to = from − minus (or from) in float; asks for memory that a later chunk will read ---------------------

using Widen = void (*)(const void* from, const float* minus, int64_t n, float* to);

template <class Type>
FASTEDIT_INLINE void widen_generic(const void* from, const float* minus, int64_t n, float* to) {
  const auto* source = static_cast<const typename Type::Storage*>(from);
  if (minus)
    for (int64_t i = 0; i < n; ++i) to[i] = Type::load(source[i]) - minus[i];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = Type::load(source[i]);
}

template <class Type>
void widen_scalar(const void* from, const float* minus, int64_t n, float* to) {
  widen_generic<Type>(from, minus, n, to);
}

#if defined(__x86_64__)

template <class Type>
FASTEDIT_AVX2 void widen_avx2(const void* from, const float* minus, int64_t n, float* to) {
  widen_generic<Type>(from, minus, n, to);
}

template <>
FASTEDIT_AVX2 void widen_avx2<F16>(const void* from, const float* minus, int64_t n, float* to) {
  const auto* source = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    _mm256_storeu_ps(to + i, minus ? _mm256_sub_ps(value, _mm256_loadu_ps(minus + i)) : value);
  }
  widen_generic<F16>(source + i, minus ? minus + i : nullptr, n - i, to + i);
}

template <class Type>
FASTEDIT_AVX512 void widen_avx512(const void* from, const float* minus, int64_t n, float* to) {
  widen_generic<Type>(from, minus, n, to);
}

template <>
FASTEDIT_AVX512 void widen_avx512<F16>(const void* from, const float* minus, int64_t n, float* to) {
  const auto* source = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
    _mm512_storeu_ps(to + i, minus ? _mm512_sub_ps(value, _mm512_loadu_ps(minus + i)) : value);
  }
  widen_generic<F16>(source + i, minus ? minus + i : nullptr, n - i, to + i);
}

#endif  // __x86_64__

// --- Products, written once with vector types of the compiler -----------------------------------------------------------

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

template <class Vec>
constexpr int lanes_of = int(sizeof(Vec) / sizeof(float));

template <class Vec>
FASTEDIT_INLINE void load(const float* from, Vec& to) {
  std::memcpy(&to, from, sizeof(Vec));
}

template <class Vec>
FASTEDIT_INLINE void store(const Vec& from, float* to) {
  std::memcpy(to, &from, sizeof(Vec));
}

// c (Rows, Vectors) += Σ_k left[r, k] right[k, :], where left[r, k] is at left[r * RowStep + k * KStep].
using Outer = void (*)(const float* left, const float* right, int64_t right_step, int64_t n, float* c, int64_t c_step);

template <class Vec, int Rows, int Vectors, int RowStep, int KStep>
FASTEDIT_INLINE void outer(const float* left, const float* right, int64_t right_step, int64_t n, float* c,
                           int64_t c_step) {
  constexpr int lanes = lanes_of<Vec>;
  Vec sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) load(c + r * c_step + v * lanes, sum[r][v]);
  for (int64_t k = 0; k < n; ++k, left += KStep, right += right_step) {
    Vec b[Vectors];
    for (int v = 0; v < Vectors; ++v) load(right + v * lanes, b[v]);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) sum[r][v] += left[r * RowStep] * b[v];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(sum[r][v], c + r * c_step + v * lanes);
}

// part (Lines, Tokens), a vector each, += the lanes of lines[l] · x[t] over n elements, a multiple of the lanes.
using Dot = void (*)(const float* lines, const float* x, int64_t n, float* part);

template <class Vec, int Lines, int Tokens>
FASTEDIT_INLINE void dot(const float* lines, const float* x, int64_t n, float* part) {
  constexpr int lanes = lanes_of<Vec>;
  Vec sum[Lines][Tokens];
  for (int l = 0; l < Lines; ++l)
    for (int t = 0; t < Tokens; ++t) load(part + (l * Tokens + t) * lanes, sum[l][t]);
  for (int64_t k = 0; k < n; k += lanes) {
    Vec a[Lines];
    for (int l = 0; l < Lines; ++l) load(lines + l * pitch + k, a[l]);
    for (int t = 0; t < Tokens; ++t) {
      Vec b;
      load(x + t * pitch + k, b);
      for (int l = 0; l < Lines; ++l) sum[l][t] += a[l] * b;
    }
  }
  for (int l = 0; l < Lines; ++l)
    for (int t = 0; t < Tokens; ++t) store(sum[l][t], part + (l * Tokens + t) * lanes);
}

// --- One token: weights go from memory straight into the sums ---------------------------------------------------------------

template <class Vec>
struct Bits;
template <>
struct Bits<Vec4> {
  typedef uint16_t Half __attribute__((vector_size(8)));
  typedef uint32_t Word __attribute__((vector_size(16)));
};
template <>
struct Bits<Vec8> {
  typedef uint16_t Half __attribute__((vector_size(16)));
  typedef uint32_t Word __attribute__((vector_size(32)));
};
template <>
struct Bits<Vec16> {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Word __attribute__((vector_size(64)));
};

template <class Vec>
FASTEDIT_INLINE void load_as(F32, const float* from, Vec& to) {
  load(from, to);
}

template <class Vec>
FASTEDIT_INLINE void load_as(BF16, const uint16_t* from, Vec& to) {
  typename Bits<Vec>::Half half;
  std::memcpy(&half, from, sizeof(half));
  const typename Bits<Vec>::Word word = __builtin_convertvector(half, typename Bits<Vec>::Word) << 16;
  std::memcpy(&to, &word, sizeof(Vec));
}

// part (Weights, dot_rows), a vector each, += the lanes of row · x over n elements, a multiple of the lanes; of memories
// less the base. rows[w * dot_rows + r]: a row of weight w.
using DirectDot = void (*)(const void* const* rows, const float* x, int64_t n, float* part);

template <class Vec, class Type, int Weights>
FASTEDIT_INLINE void direct_dot(const void* const* rows, const float* x, int64_t n, float* part) {
  constexpr int lanes = lanes_of<Vec>, lines = int(dot_rows);
  Vec sum[Weights][lines];
  for (int w = 0; w < Weights; ++w)
    for (int r = 0; r < lines; ++r) load(part + (w * lines + r) * lanes, sum[w][r]);
  for (int64_t k = 0; k < n; k += lanes) {
    Vec token;
    load(x + k, token);
    for (int r = 0; r < lines; ++r) {
      Vec base;
      load_as(Type{}, static_cast<const typename Type::Storage*>(rows[r]) + k, base);
      sum[0][r] += base * token;
      for (int w = 1; w < Weights; ++w) {
        Vec memory;
        load_as(Type{}, static_cast<const typename Type::Storage*>(rows[w * lines + r]) + k, memory);
        sum[w][r] += (memory - base) * token;
      }
    }
  }
  for (int w = 0; w < Weights; ++w)
    for (int r = 0; r < lines; ++r) store(sum[w][r], part + (w * lines + r) * lanes);
}

// sums[w * step + c] += Σ x[k] weight[w][k, c] over column_chunk rows and n columns, a multiple of the lanes; of memories
// less the base. The weights' rows are `stride` bytes apart.
using DirectColumns = void (*)(const char* const* weights, const int64_t* stride, const float* x, int64_t n, float* sums,
                               int64_t step);

template <class Vec, class Type, int Weights>
FASTEDIT_INLINE void direct_columns(const char* const* weights, const int64_t* stride, const float* x, int64_t n,
                                    float* sums, int64_t step) {
  using Storage = typename Type::Storage;
  constexpr int lanes = lanes_of<Vec>;
  for (int64_t c = 0; c < n; c += lanes) {
    Vec sum[Weights];
    for (int w = 0; w < Weights; ++w) load(sums + w * step + c, sum[w]);
    for (int k = 0; k < column_chunk; ++k) {
      Vec base;
      load_as(Type{}, reinterpret_cast<const Storage*>(weights[0] + k * stride[0]) + c, base);
      sum[0] += base * x[k];
      for (int w = 1; w < Weights; ++w) {
        Vec memory;
        load_as(Type{}, reinterpret_cast<const Storage*>(weights[w] + k * stride[w]) + c, memory);
        sum[w] += (memory - base) * x[k];
      }
    }
    for (int w = 0; w < Weights; ++w) store(sum[w], sums + w * step + c);
  }
}

// --- σ, by the formula, within a few units in the last place of its value ---------------------------------------------------

FASTEDIT_INLINE float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;  // NaN passes
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // the low bits now hold the nearest integer
  const float whole = shifted - 12582912.0f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 0.0013814592966809869f;
  p = p * r + 0.0083687175065279f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r * r + r + 1.0f;
  return p * float_from_bits((bits_of(shifted) << 23) + (127u << 23));
}

FASTEDIT_INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

FASTEDIT_INLINE float gelu_tanh(float x) {
  const float u = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // tanh(u/2) = 2/(1 + e^-u) − 1
  return x / (1.0f + exponential(-u));
}

// x Φ(x), with Φ(−a) = e^(−a²/2) h(a): h is fitted by a polynomial in 1 / (1 + 0.27 a), relative error 2.4e-8.
FASTEDIT_INLINE float gelu(float x) {
  const float a = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.27f * a);
  float p = 0.028915610164403915f;
  p = p * t - 0.12625689804553986f;
  p = p * t + 0.16929475963115692f;
  p = p * t - 0.06862478703260422f;
  p = p * t + 0.10740204155445099f;
  p = p * t + 0.07223919034004211f;
  p = p * t + 0.10175944119691849f;
  p = p * t + 0.10755046457052231f;
  p = p * t + 0.10772018134593964f;
  const float tail = p * t * exponential(-0.5f * a * a);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

FASTEDIT_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

using Activate = void (*)(Activation activation, float* y, int64_t n);

FASTEDIT_INLINE void activate_generic(Activation activation, float* y, int64_t n) {
  switch (activation) {
    case Activation::identity: return;
    case Activation::relu:
      for (int64_t i = 0; i < n; ++i) y[i] = relu(y[i]);
      return;
    case Activation::silu:
      for (int64_t i = 0; i < n; ++i) y[i] = silu(y[i]);
      return;
    case Activation::gelu:
      for (int64_t i = 0; i < n; ++i) y[i] = gelu(y[i]);
      return;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < n; ++i) y[i] = gelu_tanh(y[i]);
      return;
  }
}

// --- What each instruction set offers -----------------------------------------------------------------------------------------

struct Kernels {
  int lanes;
  int max_vectors;  // of tokens in a panel
  Widen widen[3];   // float, bfloat16, float16
  Outer rows[4], columns[4];  // by vectors in a panel: weights broadcast, stored by rows or by columns
  int block_rows[4];          // rows that one call of them takes
  Outer tokens[4];            // by log2 of the tokens: tokens broadcast
  int token_vectors[4];
  Dot dot[4];  // by log2 of the tokens
  int dot_lines[4];  // that divide dot_rows
  DirectDot direct_dot[2][max_direct];  // for float and bfloat16 and each number of memories
  DirectColumns direct_columns[2][max_direct];
  Activate activate;
};

constexpr int64_t rows_per_task = 24, columns_per_task = 384;  // multiples of all block_rows

#define FASTEDIT_PRODUCTS(NAME, TARGET, VEC)                                                                          \
  template <int Rows, int Vectors, int RowStep, int KStep>                                                            \
  TARGET void outer_##NAME(const float* left, const float* right, int64_t right_step, int64_t n, float* c,            \
                           int64_t c_step) {                                                                          \
    outer<VEC, Rows, Vectors, RowStep, KStep>(left, right, right_step, n, c, c_step);                                 \
  }                                                                                                                   \
  template <int Lines, int Tokens>                                                                                    \
  TARGET void dot_##NAME(const float* lines, const float* x, int64_t n, float* part) {                                \
    dot<VEC, Lines, Tokens>(lines, x, n, part);                                                                       \
  }                                                                                                                   \
  template <class Type, int Weights>                                                                                  \
  TARGET void direct_dot_##NAME(const void* const* rows, const float* x, int64_t n, float* part) {                    \
    direct_dot<VEC, Type, Weights>(rows, x, n, part);                                                                 \
  }                                                                                                                   \
  template <class Type, int Weights>                                                                                  \
  TARGET void direct_columns_##NAME(const char* const* weights, const int64_t* stride, const float* x, int64_t n,     \
                                    float* sums, int64_t step) {                                                      \
    direct_columns<VEC, Type, Weights>(weights, stride, x, n, sums, step);                                            \
  }                                                                                                                   \
  TARGET void activate_##NAME(Activation activation, float* y, int64_t n) { activate_generic(activation, y, n); }

FASTEDIT_PRODUCTS(scalar, , Vec4)
#if defined(__x86_64__)
FASTEDIT_PRODUCTS(avx2, FASTEDIT_AVX2, Vec8)
FASTEDIT_PRODUCTS(avx512, FASTEDIT_AVX512, Vec16)
#endif

constexpr int by_row = int(pitch), by_column = int(columns_per_task);

constexpr Kernels kernels_scalar = {
    4, 2, {widen_scalar<F32>, widen_scalar<BF16>, widen_scalar<F16>},
    {outer_scalar<12, 1, by_row, 1>, outer_scalar<6, 2, by_row, 1>},
    {outer_scalar<12, 1, 1, by_column>, outer_scalar<6, 2, 1, by_column>}, {12, 6},
    {outer_scalar<1, 4, by_row, 1>, outer_scalar<2, 4, by_row, 1>, outer_scalar<4, 2, by_row, 1>, outer_scalar<8, 1, by_row, 1>},
    {4, 4, 2, 1}, {dot_scalar<4, 1>, dot_scalar<4, 2>, dot_scalar<2, 4>, dot_scalar<1, 8>}, {4, 4, 2, 1},
    {{direct_dot_scalar<F32, 2>, direct_dot_scalar<F32, 3>, direct_dot_scalar<F32, 4>, direct_dot_scalar<F32, 5>},
     {direct_dot_scalar<BF16, 2>, direct_dot_scalar<BF16, 3>, direct_dot_scalar<BF16, 4>, direct_dot_scalar<BF16, 5>}},
    {{direct_columns_scalar<F32, 2>, direct_columns_scalar<F32, 3>, direct_columns_scalar<F32, 4>, direct_columns_scalar<F32, 5>},
     {direct_columns_scalar<BF16, 2>, direct_columns_scalar<BF16, 3>, direct_columns_scalar<BF16, 4>, direct_columns_scalar<BF16, 5>}},
    activate_scalar};

#if defined(__x86_64__)
// Blocks of accumulators that fill the 16 and the 32 registers.
constexpr Kernels kernels_avx2 = {
    8, 2, {widen_avx2<F32>, widen_avx2<BF16>, widen_avx2<F16>},
    {outer_avx2<12, 1, by_row, 1>, outer_avx2<6, 2, by_row, 1>},
    {outer_avx2<12, 1, 1, by_column>, outer_avx2<6, 2, 1, by_column>}, {12, 6},
    {outer_avx2<1, 4, by_row, 1>, outer_avx2<2, 4, by_row, 1>, outer_avx2<4, 2, by_row, 1>, outer_avx2<8, 1, by_row, 1>},
    {4, 4, 2, 1}, {dot_avx2<4, 1>, dot_avx2<4, 2>, dot_avx2<2, 4>, dot_avx2<1, 8>}, {4, 4, 2, 1},
    {{direct_dot_avx2<F32, 2>, direct_dot_avx2<F32, 3>, direct_dot_avx2<F32, 4>, direct_dot_avx2<F32, 5>},
     {direct_dot_avx2<BF16, 2>, direct_dot_avx2<BF16, 3>, direct_dot_avx2<BF16, 4>, direct_dot_avx2<BF16, 5>}},
    {{direct_columns_avx2<F32, 2>, direct_columns_avx2<F32, 3>, direct_columns_avx2<F32, 4>, direct_columns_avx2<F32, 5>},
     {direct_columns_avx2<BF16, 2>, direct_columns_avx2<BF16, 3>, direct_columns_avx2<BF16, 4>, direct_columns_avx2<BF16, 5>}},
    activate_avx2};

constexpr Kernels kernels_avx512 = {
    16, 4, {widen_avx512<F32>, widen_avx512<BF16>, widen_avx512<F16>},
    {outer_avx512<8, 1, by_row, 1>, outer_avx512<8, 2, by_row, 1>, outer_avx512<8, 3, by_row, 1>, outer_avx512<6, 4, by_row, 1>},
    {outer_avx512<8, 1, 1, by_column>, outer_avx512<8, 2, 1, by_column>, outer_avx512<8, 3, 1, by_column>,
     outer_avx512<6, 4, 1, by_column>},
    {8, 8, 8, 6},
    {outer_avx512<1, 4, by_row, 1>, outer_avx512<2, 4, by_row, 1>, outer_avx512<4, 4, by_row, 1>, outer_avx512<8, 2, by_row, 1>},
    {4, 4, 4, 2}, {dot_avx512<4, 1>, dot_avx512<4, 2>, dot_avx512<4, 4>, dot_avx512<2, 8>}, {4, 4, 4, 2},
    {{direct_dot_avx512<F32, 2>, direct_dot_avx512<F32, 3>, direct_dot_avx512<F32, 4>, direct_dot_avx512<F32, 5>},
     {direct_dot_avx512<BF16, 2>, direct_dot_avx512<BF16, 3>, direct_dot_avx512<BF16, 4>, direct_dot_avx512<BF16, 5>}},
    {{direct_columns_avx512<F32, 2>, direct_columns_avx512<F32, 3>, direct_columns_avx512<F32, 4>, direct_columns_avx512<F32, 5>},
     {direct_columns_avx512<BF16, 2>, direct_columns_avx512<BF16, 3>, direct_columns_avx512<BF16, 4>, direct_columns_avx512<BF16, 5>}},
    activate_avx512};
#endif

const Kernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return kernels_avx512;
  if (isa == Isa::avx2) return kernels_avx2;
#endif
  (void)isa;
  return kernels_scalar;
}

// --- The call -------------------------------------------------------------------------------------------------------------------

struct Weight {
  const char* data;
  int64_t stride;  // bytes
  int64_t element;  // bytes
  Widen widen;
};

Widen widen_of(const Kernels& kernels, DType dtype) {
  return kernels.widen[dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 1 : 2];
}

Weight weight_of(const TensorView& view, const Kernels& kernels) {
  const int64_t element = size_of(view.dtype);
  return {static_cast<const char*>(view.data), view.stride[0] * element, element, widen_of(kernels, view.dtype)};
}

struct Call {
  const Kernels& kernels;
  const Weight* weights;  // the base, then the memories
  int64_t n_weights;
  const float* bias;      // may be null
  Activation activation;
  bool transposed;
  int64_t n_tokens, d_in, d_out;
  int64_t token_class;    // few tokens are padded to 2^token_class
  int direct;             // which of the direct kernels serves, or -1
  float* tokens;          // packed
  float* partial;         // sums of squares: (tasks of rows, memories, n_tokens)
  float* products;        // of column_tasks: (tasks, weights, tokens, outputs)
  int64_t first_product() const { return activation == Activation::identity ? 1 : 0; }
};

// A chunk of rows of all weights, widened: weight after weight, `rows` lines of `pitch`. Lines end with zeros, up to
// whole vectors.
void fetch_rows(const Call& call, int64_t row, int64_t n_rows, int64_t rows, int64_t step, int64_t k,
                int64_t n, float* to) {
  const int64_t whole = round_up(n, call.kernels.lanes);
  for (int64_t w = 0; w < call.n_weights; ++w) {
    const Weight& weight = call.weights[w];
    for (int64_t r = 0; r < n_rows; ++r) {
      const char* from = weight.data + (row + r) * weight.stride + k * weight.element;
      float* line = to + (w * rows + r) * step;
      weight.widen(from, w ? to + r * step : nullptr, n, line);
      std::fill(line + n, line + whole, 0.0f);
    }
  }
}

// A chunk of columns of all weights, widened: weight after weight, n lines of `step`, of which n_columns are filled.
void fetch_columns(const Call& call, int64_t column, int64_t n_columns, int64_t step, int64_t k,
                   int64_t n, float* to) {
  for (int64_t w = 0; w < call.n_weights; ++w) {
    const Weight& weight = call.weights[w];
    for (int64_t i = 0; i < n; ++i) {
      const char* from = weight.data + (k + i) * weight.stride + column * weight.element;
      if (k + n + i < call.d_in)
        for (int64_t b = 0; b < n_columns * weight.element; b += line_bytes)
          __builtin_prefetch(from + n * weight.stride + b);
      weight.widen(from, w ? to + i * step : nullptr, n_columns, to + (w * n + i) * step);
    }
  }
}

// Squared changes of one line of outputs: y[0] holds base products, y[m * step] those of memory m less the base's.
// After it, y[m * step] holds the squares. The bias is of one output, or one for each element of the line.
void square_line(const Call& call, float* y, int64_t step, int64_t n, const float* bias, bool same_bias) {
  float base[256];
  if (call.activation == Activation::identity) {
    for (int64_t m = 1; m < call.n_weights; ++m)
      for (int64_t i = 0; i < n; ++i) y[m * step + i] *= y[m * step + i];
    return;
  }
  for (int64_t start = 0; start < n; start += 256) {
    const int64_t count = std::min<int64_t>(256, n - start);
    float* y0 = y + start;
    if (bias)
      for (int64_t i = 0; i < count; ++i) y0[i] += same_bias ? bias[0] : bias[start + i];
    std::copy(y0, y0 + count, base);
    call.kernels.activate(call.activation, base, count);
    for (int64_t m = 1; m < call.n_weights; ++m) {
      float* change = y0 + m * step;
      for (int64_t i = 0; i < count; ++i) change[i] += y0[i];
      call.kernels.activate(call.activation, change, count);
      for (int64_t i = 0; i < count; ++i) change[i] = (change[i] - base[i]) * (change[i] - base[i]);
    }
  }
}

const float* bias_at(const Call& call, int64_t row) { return call.bias ? call.bias + row : nullptr; }

// --- Many tokens: (weights, rows, tokens) products, tokens in the lanes -------------------------------------------------------------

struct Panels {
  int64_t width;  // of all panels but the last
  int64_t last_vectors;
};

Panels panels_of(const Kernels& kernels, int64_t n_tokens) {
  const int64_t width = int64_t(kernels.lanes) * kernels.max_vectors, rest = (n_tokens - 1) % width + 1;
  return {width, ceil_div(rest, kernels.lanes)};
}

// Panel after panel of `width` tokens, the last one narrower; in a panel, d_in lines of its tokens.
void pack_panels(const Call& call, const TensorView& x, int threads) {
  const Panels panels = panels_of(call.kernels, call.n_tokens);
  const int64_t element = size_of(x.dtype), n_panels = ceil_div(call.n_tokens, panels.width);
  const int64_t n_chunks = ceil_div(call.d_in, chunk);
  const Widen widen = widen_of(call.kernels, x.dtype);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < n_panels * n_chunks; ++task) {
    const int64_t panel = task / n_chunks, k = task % n_chunks * chunk, n = std::min(chunk, call.d_in - k);
    const int64_t width = panel + 1 < n_panels ? panels.width : panels.last_vectors * call.kernels.lanes;
    float* to = call.tokens + panel * panels.width * call.d_in + k * width;
    float line[4][chunk];
    for (int64_t t = 0; t < width; t += 4) {  // four tokens at a time: 16-byte runs
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t token = panel * panels.width + t + i;
        if (token < call.n_tokens)
          widen(static_cast<const char*>(x.data) + (token * x.stride[0] + k) * element, nullptr, n, line[i]);
        else
          std::fill(line[i], line[i] + n, 0.0f);
      }
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < 4; ++i) to[j * width + t + i] = line[i][j];
    }
  }
}

void many_tokens(const Call& call, const RoutingPlan& plan, int64_t task_row,
                 int64_t first_token, float* buffer, float* products) {
  const Kernels& kernels = call.kernels;
  const Panels panels = panels_of(kernels, call.n_tokens);
  const int64_t row = task_row * plan.task_rows, n_rows = std::min(plan.task_rows, call.d_out - row);
  const int64_t end_token = std::min(call.n_tokens, first_token + plan.task_tokens);
  const int64_t n_panels = ceil_div(call.n_tokens, panels.width), step = plan.task_tokens;
  std::fill(products, products + call.n_weights * plan.task_rows * step, 0.0f);
  const int64_t most = call.transposed ? wide_chunk : chunk;
  for (int64_t k = 0; k < call.d_in; k += most) {
    const int64_t n = std::min(most, call.d_in - k);
    if (call.transposed)
      fetch_columns(call, row, n_rows, columns_per_task, k, n, buffer);
    else
      fetch_rows(call, row, n_rows, plan.task_rows, pitch, k, n, buffer);
    for (int64_t t = first_token; t < end_token; t += panels.width) {
      const int64_t panel = t / panels.width;
      const int64_t vectors = panel + 1 < n_panels ? kernels.max_vectors : panels.last_vectors;
      const int64_t width = vectors * kernels.lanes;
      const float* right = call.tokens + panel * panels.width * call.d_in + k * width;
      const int block = kernels.block_rows[vectors - 1];
      const Outer multiply = call.transposed ? kernels.columns[vectors - 1] : kernels.rows[vectors - 1];
      for (int64_t w = call.first_product(); w < call.n_weights; ++w)
        for (int64_t r = 0; r < n_rows; r += block) {
          const float* left = call.transposed ? buffer + w * n * columns_per_task + r : buffer + (w * plan.task_rows + r) * pitch;
          multiply(left, right, width, n, products + (w * plan.task_rows + r) * step + t - first_token, step);
        }
    }
  }
  const int64_t n_tokens = end_token - first_token;
  for (int64_t r = 0; r < n_rows; ++r)
    square_line(call, products + r * step, plan.task_rows * step, n_tokens, bias_at(call, row + r), true);
  for (int64_t m = 1; m < call.n_weights; ++m) {
    float* sums = call.partial + (task_row * (call.n_weights - 1) + m - 1) * call.n_tokens + first_token;
    std::fill(sums, sums + n_tokens, 0.0f);
    for (int64_t r = 0; r < n_rows; ++r) {
      const float* squares = products + (m * plan.task_rows + r) * step;
      for (int64_t t = 0; t < n_tokens; ++t) sums[t] += squares[t];
    }
  }
}

// --- Few tokens: (weights, tokens, rows) products ---------------------------------------------------------------------------------------

// Chunk after chunk of d_in; in it a line of `pitch` for each of 2^token_class tokens, zeros where there is nothing.
void pack_few(const Call& call, const TensorView& x) {
  float* packed = call.tokens;
  const int64_t lines = int64_t(1) << call.token_class;
  const Widen widen = widen_of(call.kernels, x.dtype);
  for (int64_t k = 0; k < call.d_in; k += chunk, packed += lines * pitch) {
    const int64_t n = std::min(chunk, call.d_in - k);
    std::fill(packed, packed + lines * pitch, 0.0f);
    for (int64_t t = 0; t < call.n_tokens; ++t)
      widen(static_cast<const char*>(x.data) + (t * x.stride[0] + k) * size_of(x.dtype), nullptr, n, packed + t * pitch);
  }
}

// Sums over d_in in the lanes, then over the lanes.
void dot_task(const Call& call, const RoutingPlan& plan, int64_t row, int64_t n_rows,
              float* buffer, float* products) {
  const Kernels& kernels = call.kernels;
  const int64_t tokens = int64_t(1) << call.token_class, lanes = kernels.lanes;
  const int64_t lines = call.n_weights * dot_rows, step = kernels.dot_lines[call.token_class];
  const Dot multiply = kernels.dot[call.token_class];
  float* part = buffer + lines * pitch;
  for (int64_t r0 = 0; r0 < n_rows; r0 += dot_rows) {
    const int64_t n_lines = std::min(dot_rows, n_rows - r0);
    std::fill(part, part + lines * tokens * lanes, 0.0f);
    const float* x = call.tokens;
    for (int64_t k = 0; k < call.d_in; k += chunk, x += tokens * pitch) {
      const int64_t n = std::min(chunk, call.d_in - k);
      if (call.direct >= 0 && n % lanes == 0) {
        const void* rows[(1 + max_direct) * dot_rows];
        for (int64_t line = 0; line < lines; ++line) {  // those beyond the last repeat it
          const Weight& weight = call.weights[line / dot_rows];
          rows[line] = weight.data + (row + r0 + std::min(line % dot_rows, n_lines - 1)) * weight.stride + k * weight.element;
        }
        kernels.direct_dot[call.direct][call.n_weights - 2](rows, x, n, part);
        continue;
      }
      fetch_rows(call, row + r0, n_lines, dot_rows, pitch, k, n, buffer);
      for (int64_t line = call.first_product() * dot_rows; line < lines; line += step)
        multiply(buffer + line * pitch, x, round_up(n, lanes), part + line * tokens * lanes);
    }
    for (int64_t line = call.first_product() * dot_rows; line < lines; ++line)
      for (int64_t t = 0; t < tokens; ++t) {
        float sum = 0.0f;
        for (int64_t lane = 0; lane < lanes; ++lane) sum += part[(line * tokens + t) * lanes + lane];
        products[(line / dot_rows * tokens + t) * plan.task_rows + r0 + line % dot_rows] = sum;
      }
  }
}

// Outputs in the lanes. Rows of the stored weights are read from end to end: a task owns a range of d_in.
void column_task(const Call& call, int64_t task, float* buffer) {
  const Kernels& kernels = call.kernels;
  const int64_t tokens = int64_t(1) << call.token_class, width = kernels.token_vectors[call.token_class] * kernels.lanes;
  const Outer multiply = kernels.tokens[call.token_class];
  const int64_t step = round_up(call.d_out, column_width), end = call.d_in * (task + 1) / column_tasks;
  float* const products = call.products + task * call.n_weights * tokens * step;
  std::fill(products, products + call.n_weights * tokens * step, 0.0f);
  for (int64_t k = call.d_in * task / column_tasks; k < end;) {
    const int64_t n = std::min({column_chunk, end - k, chunk - k % chunk});
    const float* x = call.tokens + k / chunk * tokens * pitch + k % chunk;
    for (int64_t column = 0; column < call.d_out; column += column_width) {
      const int64_t n_columns = std::min(column_width, call.d_out - column);
      if (call.direct >= 0 && n == column_chunk && n_columns % kernels.lanes == 0) {
        const char* data[1 + max_direct];
        int64_t stride[1 + max_direct];
        for (int64_t w = 0; w < call.n_weights; ++w) {
          const Weight& weight = call.weights[w];
          data[w] = weight.data + k * weight.stride + column * weight.element;
          stride[w] = weight.stride;
        }
        kernels.direct_columns[call.direct][call.n_weights - 2](data, stride, x, n_columns, products + column, step);
        continue;
      }
      fetch_columns(call, column, n_columns, column_width, k, n, buffer);
      for (int64_t w = call.first_product(); w < call.n_weights; ++w)
        for (int64_t c = 0; c < n_columns; c += width)
          multiply(x, buffer + w * n * column_width + c, column_width, n,
                   products + w * tokens * step + column + c, step);
    }
    k += n;
  }
}

// Adds up what the tasks found for n columns; the sums replace the first task's.
void add_column_tasks(const Call& call, int64_t column, int64_t n) {
  const int64_t tokens = int64_t(1) << call.token_class, step = round_up(call.d_out, column_width);
  const int64_t lines = call.n_weights * tokens;
  for (int64_t line = 0; line < lines; ++line) {
    float* sum = call.products + line * step + column;
    for (int64_t task = 1; task < column_tasks; ++task)
      for (int64_t i = 0; i < n; ++i) sum[i] += sum[task * lines * step + i];
  }
}

// Squares of n_rows outputs, which lie side by side: y (weights, tokens, step).
void sum_squares(const Call& call, int64_t task_row, int64_t row, int64_t n_rows, float* y, int64_t step) {
  const int64_t tokens = int64_t(1) << call.token_class;
  for (int64_t t = 0; t < call.n_tokens; ++t, y += step) {
    square_line(call, y, tokens * step, n_rows, bias_at(call, row), false);
    for (int64_t m = 1; m < call.n_weights; ++m) {
      float sum = 0.0f;
      for (int64_t i = 0; i < n_rows; ++i) sum += y[m * tokens * step + i];
      call.partial[(task_row * (call.n_weights - 1) + m - 1) * call.n_tokens + t] = sum;
    }
  }
}

// Square roots of the tasks' sums, added up in the order of rows.
void finish(const Call& call, int64_t n_tasks, float* scores, int threads) {
  const int64_t n_memories = call.n_weights - 1, n = n_memories * call.n_tokens;
  constexpr int64_t block = 256;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < n; start += block) {
    double sums[block] = {};
    const int64_t count = std::min(block, n - start);
    for (int64_t task = 0; task < n_tasks; ++task)
      for (int64_t i = 0; i < count; ++i) sums[i] += call.partial[task * n + start + i];
    for (int64_t i = 0; i < count; ++i)
      scores[(start + i) % call.n_tokens * n_memories + (start + i) / call.n_tokens] = float(std::sqrt(sums[i]));
  }
}

int direct_of(const TensorView& base, const TensorView* memories, int64_t n_memories, int64_t n_tokens) {
  if (n_tokens != 1 || n_memories > max_direct || base.dtype == DType::f16) return -1;
  for (int64_t m = 0; m < n_memories; ++m)
    if (memories[m].dtype != base.dtype) return -1;
  return base.dtype == DType::f32 ? 0 : 1;
}

int64_t class_of(int64_t n_tokens) {
  int64_t k = 0;
  while (int64_t(1) << k < n_tokens) ++k;
  return k;
}

// Floats of the workspace's parts; buffer and block are of each thread.
struct Sizes {
  int64_t weights, tokens, partial, products, buffer, block;
  int64_t total(int threads) const { return weights + tokens + partial + products + threads * (buffer + block); }
};

Sizes sizes_of(const RoutingPlan& plan, int64_t n_tokens, int64_t d_in, int64_t d_out, int64_t n_weights,
               bool transposed) {
  const Kernels& kernels = kernels_of(plan.isa);
  Sizes sizes{};
  sizes.weights = round_up(n_weights * int64_t(sizeof(Weight) / sizeof(float)), 16);
  sizes.partial = round_up(ceil_div(d_out, plan.task_rows) * (n_weights - 1) * n_tokens, 16);
  if (n_tokens > few_tokens) {
    sizes.tokens = round_up(round_up(n_tokens, kernels.lanes) * d_in, 16);
    sizes.buffer = n_weights * (transposed ? wide_chunk * columns_per_task : plan.task_rows * pitch);
    sizes.block = n_weights * plan.task_rows * plan.task_tokens;
    return sizes;
  }
  const int64_t padded = int64_t(1) << class_of(n_tokens);
  sizes.tokens = ceil_div(d_in, chunk) * padded * pitch;
  if (transposed) {
    sizes.products = column_tasks * n_weights * padded * round_up(d_out, column_width);
    sizes.buffer = n_weights * column_chunk * column_width;
  } else {
    sizes.buffer = n_weights * dot_rows * (pitch + padded * kernels.lanes);
    sizes.block = n_weights * padded * plan.task_rows;
  }
  return sizes;
}

int64_t this_thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void run_few_columns(const Call& call, const RoutingPlan& plan, float* buffers, int64_t buffer_size) {
#pragma omp parallel num_threads(plan.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < column_tasks; ++task)
      column_task(call, task, buffers + this_thread() * buffer_size);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < ceil_div(call.d_out, plan.task_rows); ++task) {
      const int64_t column = task * plan.task_rows, n = std::min(plan.task_rows, call.d_out - column);
      add_column_tasks(call, column, n);
      sum_squares(call, task, column, n, call.products + column, round_up(call.d_out, column_width));
    }
  }
}

void run_few_rows(const Call& call, const RoutingPlan& plan, float* buffers, int64_t buffer_size, int64_t block_size) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t task = 0; task < ceil_div(call.d_out, plan.task_rows); ++task) {
    float* const buffer = buffers + this_thread() * (buffer_size + block_size);
    float* const block = buffer + buffer_size;
    const int64_t row = task * plan.task_rows, n = std::min(plan.task_rows, call.d_out - row);
    dot_task(call, plan, row, n, buffer, block);
    sum_squares(call, task, row, n, block, plan.task_rows);
  }
}

void run_many(const Call& call, const RoutingPlan& plan, float* buffers, int64_t buffer_size, int64_t block_size) {
  const int64_t n_row_tasks = ceil_div(call.d_out, plan.task_rows);
  const int64_t n_token_tasks = ceil_div(call.n_tokens, plan.task_tokens);
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t task = 0; task < n_row_tasks * n_token_tasks; ++task) {
    float* const buffer = buffers + this_thread() * (buffer_size + block_size);
    many_tokens(call, plan, task % n_row_tasks, task / n_row_tasks * plan.task_tokens, buffer, buffer + buffer_size);
  }
}

}  // namespace

RoutingPlan plan_routing(const TensorView& x, const TensorView& base, int64_t n_memories, const RoutingOptions& options,
                         Isa isa, int threads) {
  const int64_t n_tokens = x.shape[0], d_in = x.shape[1], d_out = base.shape[options.transposed ? 1 : 0];
  const Kernels& kernels = kernels_of(isa);
  if (n_tokens * d_in * d_out * (n_memories + 1) < small_work) threads = 1;
  RoutingPlan plan{isa, threads, options.transposed ? column_sums : 32, n_tokens, 0};
  if (n_tokens > few_tokens) {
    const int64_t vectors = ceil_div(n_tokens, kernels.lanes);
    plan.task_tokens = std::min<int64_t>(256, vectors * kernels.lanes);
    plan.task_rows = vectors < kernels.max_vectors ? kernels.block_rows[vectors - 1] : rows_per_task;
    if (options.transposed) plan.task_rows = d_out >= 8 * columns_per_task ? columns_per_task : columns_per_task / 4;
  }
  const Sizes sizes = sizes_of(plan, n_tokens, d_in, d_out, n_memories + 1, options.transposed);
  plan.workspace_bytes = size_t(sizes.total(threads)) * sizeof(float);
  return plan;
}

void routing(const RoutingPlan& plan, const TensorView& x, const TensorView& base, const TensorView* memories,
             int64_t n_memories, const TensorView* bias, const RoutingOptions& options, const TensorView& scores,
             void* workspace) {
  const int64_t n_tokens = x.shape[0], d_in = x.shape[1], d_out = base.shape[options.transposed ? 1 : 0];
  if (n_tokens == 0 || n_memories == 0) return;
  const Kernels& kernels = kernels_of(plan.isa);
  const Sizes sizes = sizes_of(plan, n_tokens, d_in, d_out, n_memories + 1, options.transposed);
  Weight* const weights = static_cast<Weight*>(workspace);
  for (int64_t w = 0; w <= n_memories; ++w) weights[w] = weight_of(w ? memories[w - 1] : base, kernels);
  float* const tokens = static_cast<float*>(workspace) + sizes.weights;
  float* const partial = tokens + sizes.tokens;
  float* const products = partial + sizes.partial;
  float* const buffers = products + sizes.products;
  const Call call{kernels, weights, n_memories + 1, bias ? static_cast<const float*>(bias->data) : nullptr,
                  options.activation, options.transposed, n_tokens, d_in, d_out, class_of(n_tokens),
                  direct_of(base, memories, n_memories, n_tokens), tokens, partial, products};
  if (n_tokens > few_tokens) {
    pack_panels(call, x, plan.threads);
    run_many(call, plan, buffers, sizes.buffer, sizes.block);
  } else {
    pack_few(call, x);
    if (options.transposed)
      run_few_columns(call, plan, buffers, sizes.buffer);
    else
      run_few_rows(call, plan, buffers, sizes.buffer, sizes.block);
  }
  finish(call, ceil_div(d_out, plan.task_rows), static_cast<float*>(scores.data), plan.threads);
}

}  // namespace fastedit::cpu
