// Exact search for the greatest inner product or the nearest key on a CPU, streaming over the keys.
//
// A tile of keys at a time, every value (inner product, or minus the squared distance) is bounded from above, by one of
// two scans. Few queries against plain keys: float32 products with rows, at the speed of memory. Otherwise products of
// bytes: keys and queries rounded to 8 bits, four products a lane and instruction where the CPU has them; the codes are
// given, or made of the tile at hand. Keys whose bound does not reach the best value known are done with; the others
// are compared exactly, the highest bound first. So the winner is that of a search in float64, whatever the rounding.
//
// Bounds. Rows in float32: a sum of d products in any order is off by at most g |q| |k|, g = (d + 16) 2^-24 with room for
// the roundings around it; a sum of squared differences by g times itself. Codes: with k = k' + e and q = q' + f,
// q k - q' k' = q e + f k', at most |q| |e| + |f| (|k| + |e|), where q' k' is an exact integer times two steps, and |e|, |f|
// are measured, not estimated. Codes of a projection leave two remainders, whose product is at most that of their norms.
// Everything not finite has a bound that is not less than anything, and is decided exactly.
//
// Work: B N d multiply-adds of bytes (or float32). Memory: the keys (or their codes) once.

#include "../retrieval.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr float unit = 5.9604644775390625e-8f;  // 2^-24
constexpr float tiny = 1e-30f;                  // more than what products too small for float32 lose
constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t direct_queries = 3;  // up to so many, float32 rows come from memory no faster than they are used

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- Rows, generic: compiled once for each instruction set ---------------------------------------------------------

// Vectors of 16 floats or 8 doubles, which the compiler maps to what the target has.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int64_t lanes = 16;

template <class Vector, class T>
FASTEDIT_INLINE void load(Vector& v, const T* from) {
  std::memcpy(&v, from, sizeof(v));
}

template <class Vector>
FASTEDIT_INLINE auto sum_lanes(const Vector& v) {
  constexpr int n = int(sizeof(v) / sizeof(v[0]));
  std::decay_t<decltype(v[0])> part[n];
  std::memcpy(part, &v, sizeof(v));
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Sums of 4 vectors and a rest, in a fixed order.
template <class Vector, class T>
FASTEDIT_INLINE T sum_all(const Vector (&sum)[4], T last) {
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + last;
}

// Rows come from memory one page after the other, and the hardware fetches ahead within a page only.
FASTEDIT_INLINE void prefetch(const float* at) { __builtin_prefetch(at + 1024); }

// Inner products of a row with n queries, and the row's squared norm.
template <int n>
FASTEDIT_INLINE void products_generic(const float* row, const float* queries, int64_t d, float* out, float& norm) {
  Floats sum[n][4] = {}, square[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= d; i += 4 * lanes)
    for (int v = 0; v < 4; ++v) {
      Floats x, y;
      load(x, row + i + v * lanes);
      prefetch(row + i + v * lanes);
      for (int b = 0; b < n; ++b) {
        load(y, queries + b * d + i + v * lanes);
        sum[b][v] += x * y;
      }
      square[v] += x * x;
    }
  float last[n] = {}, last_square = 0;
  for (; i < d; ++i) {
    for (int b = 0; b < n; ++b) last[b] += row[i] * queries[b * d + i];
    last_square += row[i] * row[i];
  }
  for (int b = 0; b < n; ++b) out[b] = sum_all(sum[b], last[b]);
  norm = sum_all(square, last_square);
}

// Squared distances of a row from n queries.
template <int n>
FASTEDIT_INLINE void squares_generic(const float* row, const float* queries, int64_t d, float* out) {
  Floats sum[n][4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= d; i += 4 * lanes)
    for (int v = 0; v < 4; ++v) {
      Floats x, y;
      load(x, row + i + v * lanes);
      prefetch(row + i + v * lanes);
      for (int b = 0; b < n; ++b) {
        load(y, queries + b * d + i + v * lanes);
        sum[b][v] += (x - y) * (x - y);
      }
    }
  float last[n] = {};
  for (; i < d; ++i)
    for (int b = 0; b < n; ++b) last[b] += (row[i] - queries[b * d + i]) * (row[i] - queries[b * d + i]);
  for (int b = 0; b < n; ++b) out[b] = sum_all(sum[b], last[b]);
}

// The values that decide, in float64.
template <bool nearest>
FASTEDIT_INLINE double exact_generic(const float* row, const float* query, int64_t d, double scale) {
  Doubles sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= d; i += 32)
    for (int v = 0; v < 4; ++v) {
      HalfFloats x, y;
      load(x, row + i + v * 8);
      load(y, query + i + v * 8);
      const Doubles k = __builtin_convertvector(x, Doubles) * scale, q = __builtin_convertvector(y, Doubles);
      if (nearest)
        sum[v] += (k - q) * (k - q);
      else
        sum[v] += k * q;
    }
  double total = sum_all(sum, 0.0);
  for (; i < d; ++i) {
    const double k = double(row[i]) * scale, q = query[i];
    total += nearest ? (k - q) * (k - q) : k * q;
  }
  return nearest ? -total : total;
}

struct Encoded {
  float step, error, norm;
};

// Codes of a row, 4 bytes of every 64. A row of small whole numbers times `scale` has exact codes.
FASTEDIT_INLINE Encoded encode_generic(const float* row, int64_t d, bool whole, float scale, uint8_t* out) {
  Floats most[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= d; i += 4 * lanes)
    for (int v = 0; v < 4; ++v) {
      Floats x;
      load(x, row + i + v * lanes);
      x = x < 0 ? -x : x;
      most[v] = x > most[v] ? x : most[v];
    }
  float largest = 0;
  for (int v = 0; v < 4; ++v)
    for (int lane = 0; lane < lanes; ++lane) largest = std::max(largest, most[v][lane]);
  for (; i < d; ++i) largest = std::max(largest, std::fabs(row[i]));
  const bool zero = !(largest > 1e-30f);  // too small for a quotient: all of it counts as error
  const float step = whole ? 1.0f : zero ? 0.0f : largest / 127.0f;
  const float inverse = whole ? 1.0f : zero ? 0.0f : 127.0f / largest;
  const Floats lowest = Floats{} - 128.0f, highest = Floats{} + 127.0f;
  Floats error[4] = {}, norm[4] = {};
  const auto encode_64 = [&](const float* from, Bytes(&bytes)[4]) __attribute__((always_inline)) {
    for (int v = 0; v < 4; ++v) {
      Floats x;
      load(x, from + v * lanes);
      prefetch(from + v * lanes);
      Floats quotient = x * inverse;
      quotient = quotient > lowest ? quotient : lowest;
      quotient = quotient < highest ? quotient : highest;
      const Floats shifted = quotient + 12582912.0f;  // 1.5 * 2^23: the nearest whole number is in the low bits
      const Floats e = x - step * (shifted - 12582912.0f);
      error[v] += e * e;
      norm[v] += x * x;
      bytes[v] = __builtin_convertvector((Words)shifted + 128, Bytes);
    }
  };
  Bytes bytes[4];
  for (i = 0; i + 64 <= d; i += 64) {
    encode_64(row + i, bytes);
    for (int at = 0; at < 64; at += 4)
      std::memcpy(out + i * 16 + at * 16, reinterpret_cast<const uint8_t*>(bytes) + at, 4);
  }
  if (i < d) {
    float last[64] = {};
    std::memcpy(last, row + i, size_t(d - i) * sizeof(float));
    encode_64(last, bytes);
    for (int64_t at = 0; at < d - i; at += 4)
      std::memcpy(out + i * 16 + at * 16, reinterpret_cast<const uint8_t*>(bytes) + at, 4);
  }
  const float error_sum = sum_all(error, 0.0f), norm_sum = sum_all(norm, 0.0f);
  // positive sums of d / 64 + 64 terms, and squares too small for float32
  const float up = 1.0f + (float(d) / 64 + 80) * unit, least = std::sqrt(float(d)) * 1e-18f, factor = std::fabs(scale);
  Encoded result;
  result.step = step * scale;
  result.norm = (std::sqrt(norm_sum) * up + least) * factor;
  result.error = whole ? 0.0f : (std::sqrt(error_sum) * up + least) * factor + 4 * unit * result.norm;
  return result;
}

// What turns integer products with one query into bounds.
struct QueryBound {
  float step;          // of the query's codes
  int32_t correction;  // 128 times their sum
  float by_error, by_norm, by_rest, constant;
  float norm_squared;  // rounded down; for distances
  float shrink;        // of the key's squared norm; for distances
  bool empty;          // a query with NaN finds nothing
};

template <class Vector>
FASTEDIT_INLINE void bound_of(const Vector& product, const Vector& step, const Vector& error, const Vector& norm,
                              const Vector& rest, const QueryBound& q, bool nearest, Vector& value) {
  value = step * (product * q.step);
  value += error * q.by_error + norm * q.by_norm + rest * q.by_rest + q.constant;
  if (nearest) value = 2.0f * value - norm * norm * q.shrink - q.norm_squared;
}

// Products to bounds, in place; whether there is one that is not less than `bar`.
template <bool nearest, bool with_rest>
FASTEDIT_INLINE bool bounds_generic(int32_t* products, int64_t n, const QueryBound& q, const Codes& codes, float bar) {
  float* out = reinterpret_cast<float*>(products);
  Words below = ~Words{};
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    Integers product;
    Floats step, error, norm, rest = {};
    load(product, products + j);
    load(step, codes.step + j);
    load(error, codes.error + j);
    load(norm, codes.norm + j);
    if (with_rest) load(rest, codes.rest + j);
    const Floats exact = __builtin_convertvector(product - q.correction, Floats);
    Floats value;
    bound_of(exact, step, error, norm, rest, q, nearest, value);
    std::memcpy(out + j, &value, sizeof(value));
    below &= (Words)(value < bar);
  }
  bool reached = false;
  for (int64_t lane = 0; lane < lanes; ++lane) reached = reached || below[lane] == 0;
  for (; j < n; ++j) {
    int32_t product;
    std::memcpy(&product, products + j, 4);
    const float rest = with_rest ? codes.rest[j] : 0.0f;
    float value;
    bound_of(float(product - q.correction), codes.step[j], codes.error[j], codes.norm[j], rest, q, nearest, value);
    std::memcpy(out + j, &value, 4);
    reached = reached || !(value < bar);
  }
  return reached;
}

// --- Products of codes: out[query][key], over blocks of 16 keys ----------------------------------------------------

// Queries: for every 4 dimensions `width` words of 4 signed bytes.
using Dots = void (*)(const uint8_t* codes, int64_t blocks, int64_t steps, const int32_t* queries, int64_t width,
                      int32_t* out);

void dots_scalar(const uint8_t* codes, int64_t blocks, int64_t steps, const int32_t* queries, int64_t width,
                 int32_t* out) {
  for (int64_t block = 0; block < blocks; ++block, codes += steps * 64)
    for (int64_t b = 0; b < width; ++b) {
      int32_t sum[block_keys] = {};
      for (int64_t s = 0; s < steps; ++s) {
        int8_t query[4];
        std::memcpy(query, queries + s * width + b, 4);
        const uint8_t* key = codes + s * 64;
        for (int64_t j = 0; j < block_keys; ++j)
          for (int i = 0; i < 4; ++i) sum[j] += int32_t(key[4 * j + i]) * query[i];
      }
      std::copy(sum, sum + block_keys, out + (b * blocks + block) * block_keys);
    }
}

#if defined(__x86_64__)

// 16-bit products: pairs of bytes would saturate. Two queries share the widened keys.
template <int n>
FASTEDIT_AVX2 FASTEDIT_INLINE void dots_avx2_block(const uint8_t* codes, int64_t blocks, int64_t steps,
                                                   const int32_t* queries, int64_t width, int32_t* out) {
  __m256i sum[n][4];
  for (int b = 0; b < n; ++b)
    for (int v = 0; v < 4; ++v) sum[b][v] = _mm256_setzero_si256();
  for (int64_t s = 0; s < steps; ++s) {
    __m256i key[4];
    for (int v = 0; v < 4; ++v)
      key[v] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + s * 64 + v * 16)));
    for (int b = 0; b < n; ++b) {
      const __m256i query = _mm256_cvtepi8_epi16(_mm_set1_epi32(queries[s * width + b]));
      for (int v = 0; v < 4; ++v) sum[b][v] = _mm256_add_epi32(sum[b][v], _mm256_madd_epi16(key[v], query));
    }
  }
  for (int b = 0; b < n; ++b)
    for (int v = 0; v < 4; v += 2) {
      // pairs of neighbours: keys 0 1 (4 5) 2 3 (6 7), then in order
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[b][v], sum[b][v + 1]), 0xD8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + b * blocks * block_keys + v * 4), pairs);
    }
}

FASTEDIT_AVX2 void dots_avx2(const uint8_t* codes, int64_t blocks, int64_t steps, const int32_t* queries,
                             int64_t width, int32_t* out) {
  for (int64_t block = 0; block < blocks; ++block, codes += steps * 64, out += block_keys) {
    int64_t b = 0;
    for (; b + 2 <= width; b += 2)
      dots_avx2_block<2>(codes, blocks, steps, queries + b, width, out + b * blocks * block_keys);
    for (; b < width; ++b)
      dots_avx2_block<1>(codes, blocks, steps, queries + b, width, out + b * blocks * block_keys);
  }
}

#define FASTEDIT_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")))

// rows blocks times `width` queries in registers.
template <int rows, int width>
FASTEDIT_VNNI FASTEDIT_INLINE void dots_vnni_blocks(const uint8_t* codes, int64_t blocks, int64_t steps,
                                                    const int32_t* queries, int32_t* out) {
  __m512i sum[rows][width];
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < width; ++b) sum[r][b] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
    __m512i key[rows];
    for (int r = 0; r < rows; ++r) {
      const uint8_t* from = codes + (r * steps + s) * 64;
      key[r] = _mm512_loadu_si512(from);
      if (width < 4) _mm_prefetch(reinterpret_cast<const char*>(from + rows * steps * 64), _MM_HINT_T0);
    }
    for (int b = 0; b < width; ++b) {
      const __m512i query = _mm512_set1_epi32(queries[s * width + b]);
      for (int r = 0; r < rows; ++r) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], key[r], query);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int b = 0; b < width; ++b) _mm512_storeu_si512(out + (b * blocks + r) * block_keys, sum[r][b]);
}

template <int rows, int width>
FASTEDIT_VNNI void dots_vnni_width(const uint8_t* codes, int64_t blocks, int64_t steps, const int32_t* queries,
                                   int32_t* out) {
  int64_t block = 0;
  for (; block + rows <= blocks; block += rows)
    dots_vnni_blocks<rows, width>(codes + block * steps * 64, blocks, steps, queries, out + block * block_keys);
  for (; block < blocks; ++block)
    dots_vnni_blocks<1, width>(codes + block * steps * 64, blocks, steps, queries, out + block * block_keys);
}

void dots_vnni(const uint8_t* codes, int64_t blocks, int64_t steps, const int32_t* queries, int64_t width,
               int32_t* out) {
  switch (width) {
    case 1: return dots_vnni_width<4, 1>(codes, blocks, steps, queries, out);
    case 2: return dots_vnni_width<4, 2>(codes, blocks, steps, queries, out);
    case 4: return dots_vnni_width<4, 4>(codes, blocks, steps, queries, out);
    default: return dots_vnni_width<3, 8>(codes, blocks, steps, queries, out);
  }
}

#endif  // __x86_64__

// --- One table of functions for each instruction set ---------------------------------------------------------------

template <class Type>
FASTEDIT_INLINE void widen_values(const void* from, int64_t d, float* to) {
  const auto* x = static_cast<const typename Type::Storage*>(from);
  for (int64_t i = 0; i < d; ++i) to[i] = Type::load(x[i]);
}

struct I8 {
  using Storage = int8_t;
  static FASTEDIT_INLINE float load(int8_t value) { return float(value); }
};

FASTEDIT_INLINE void widen_generic(DType dtype, const void* from, int64_t d, float* to) {
  if (dtype == DType::bf16)
    widen_values<BF16>(from, d, to);
  else if (dtype == DType::f16)
    widen_values<F16>(from, d, to);
  else
    widen_values<I8>(from, d, to);
}

struct Kernels {
  void (*widen)(DType dtype, const void* from, int64_t d, float* to);
  void (*products)(const float* row, const float* queries, int64_t d, int64_t n, float* out, float& norm);
  void (*squares)(const float* row, const float* queries, int64_t d, int64_t n, float* out);
  double (*exact)(bool nearest, const float* row, const float* query, int64_t d, double scale);
  Encoded (*encode)(const float* row, int64_t d, bool whole, float scale, uint8_t* out);
  bool (*bounds)(int32_t* products, int64_t n, const QueryBound& q, const Codes& codes, bool nearest, float bar);
  Dots dots;
};

#define FASTEDIT_KERNELS(SUFFIX, TARGET)                                                                              \
  TARGET void products_##SUFFIX(const float* row, const float* queries, int64_t d, int64_t n, float* out,             \
                                float& norm) {                                                                        \
    n == 1   ? products_generic<1>(row, queries, d, out, norm)                                                        \
    : n == 2 ? products_generic<2>(row, queries, d, out, norm)                                                        \
             : products_generic<3>(row, queries, d, out, norm);                                                       \
  }                                                                                                                   \
  TARGET void squares_##SUFFIX(const float* row, const float* queries, int64_t d, int64_t n, float* out) {            \
    n == 1   ? squares_generic<1>(row, queries, d, out)                                                               \
    : n == 2 ? squares_generic<2>(row, queries, d, out)                                                               \
             : squares_generic<3>(row, queries, d, out);                                                              \
  }                                                                                                                   \
  TARGET double exact_##SUFFIX(bool nearest, const float* row, const float* query, int64_t d, double scale) {         \
    return nearest ? exact_generic<true>(row, query, d, scale) : exact_generic<false>(row, query, d, scale);          \
  }                                                                                                                   \
  TARGET Encoded encode_##SUFFIX(const float* row, int64_t d, bool whole, float scale, uint8_t* out) {                \
    return encode_generic(row, d, whole, scale, out);                                                                 \
  }                                                                                                                   \
  TARGET bool bounds_##SUFFIX(int32_t* products, int64_t n, const QueryBound& q, const Codes& codes, bool nearest,    \
                              float bar) {                                                                            \
    return codes.rest ? nearest ? bounds_generic<true, true>(products, n, q, codes, bar)                              \
                                : bounds_generic<false, true>(products, n, q, codes, bar)                             \
           : nearest  ? bounds_generic<true, false>(products, n, q, codes, bar)                                       \
                      : bounds_generic<false, false>(products, n, q, codes, bar);                                     \
  }

FASTEDIT_KERNELS(scalar, )
void widen_scalar(DType dtype, const void* from, int64_t d, float* to) { widen_generic(dtype, from, d, to); }

#if defined(__x86_64__)
FASTEDIT_KERNELS(avx2, FASTEDIT_AVX2)
FASTEDIT_KERNELS(avx512, FASTEDIT_AVX512)

FASTEDIT_AVX2 void widen_avx2(DType dtype, const void* from, int64_t d, float* to) {
  if (dtype != DType::f16) return widen_generic(dtype, from, d, to);
  const auto* x = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 8 <= d; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  widen_values<F16>(x + i, d - i, to + i);
}

FASTEDIT_AVX512 void widen_avx512(DType dtype, const void* from, int64_t d, float* to) {
  if (dtype != DType::f16) return widen_generic(dtype, from, d, to);
  const auto* x = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + 16 <= d; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  widen_values<F16>(x + i, d - i, to + i);
}
#endif

Kernels kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512)
    return {widen_avx512,  products_avx512, squares_avx512, exact_avx512, encode_avx512,
            bounds_avx512, __builtin_cpu_supports("avx512vnni") ? dots_vnni : dots_avx2};
  if (isa == Isa::avx2)
    return {widen_avx2, products_avx2, squares_avx2, exact_avx2, encode_avx2, bounds_avx2, dots_avx2};
#endif
  (void)isa;
  return {widen_scalar, products_scalar, squares_scalar, exact_scalar, encode_scalar, bounds_scalar, dots_scalar};
}

// --- The keys ------------------------------------------------------------------------------------------------------

struct Keys {
  explicit Keys(const SearchArguments& in)
      : data(static_cast<const char*>(in.keys.data)),
        dtype(in.keys.dtype),
        n(in.keys.shape[0]),
        d(in.keys.shape[1]),
        row_bytes(in.keys.stride[0] * size_of(in.keys.dtype)),
        alive_data(in.alive ? static_cast<const uint8_t*>(in.alive->data) : nullptr),
        alive_stride(in.alive ? in.alive->stride[0] : 0),
        scale_data(in.scale ? static_cast<const float*>(in.scale->data) : nullptr),
        scale_stride(in.scale ? in.scale->stride[0] : 0) {}

  // The row as floats: itself, or widened into the buffer.
  const float* row(int64_t j, const Kernels& kernels, float* buffer) const {
    const char* from = data + j * row_bytes;
    if (dtype == DType::f32) return reinterpret_cast<const float*>(from);
    kernels.widen(dtype, from, d, buffer);
    return buffer;
  }
  float scale(int64_t j) const { return scale_data ? scale_data[j * scale_stride] : 1.0f; }
  bool alive(int64_t j) const { return !alive_data || alive_data[j * alive_stride]; }
  bool whole() const { return dtype == DType::i8; }

  const char* data;
  DType dtype;
  int64_t n, d, row_bytes;
  const uint8_t* alive_data;
  int64_t alive_stride;
  const float* scale_data;
  int64_t scale_stride;
};

// --- The queries ---------------------------------------------------------------------------------------------------

struct Norms {
  double value;
  bool has_nan;
};

Norms norm_of(const float* x, int64_t d) {
  double sum[8] = {};
  for (int64_t i = 0; i < d; ++i) sum[i % 8] += double(x[i]) * x[i];
  const double total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  // infinities square to infinity, so only NaN sums to NaN
  return {std::sqrt(total), total != total};
}

// Signed bytes of a query, one word of every `width`, and what its bounds need.
QueryBound encode_query(const float* query, int64_t d, const float* scanned, int64_t m, double rest, int64_t width,
                        int32_t* words) {
  float largest = 0;
  for (int64_t i = 0; i < m; ++i) largest = std::max(largest, std::fabs(scanned[i]));
  const bool plain = largest > 1e-30f && largest < infinity;
  const float step = plain ? largest / 127.0f : 0.0f, inverse = plain ? 127.0f / largest : 0.0f;
  double errors[4] = {};
  uint32_t sum = 0;  // unsigned: that of garbage, from what is not finite, may wrap
  for (int64_t s = 0; s < code_steps(m); ++s) {
    int8_t bytes[4] = {};
    const int64_t n = std::min<int64_t>(4, m - 4 * s);
    for (int64_t i = 0; i < n; ++i) {
      const float x = scanned[4 * s + i];
      // 1.5 * 2^23: the nearest whole number is in the low bits; at most 127, as |x| is at most 127 steps
      const int32_t code = plain ? int32_t(bits_of(x * inverse + 12582912.0f) - 0x4B400000u) : 0;
      const double e = double(x) - double(step) * code;
      errors[i] += e * e;
      sum += uint32_t(code);
      bytes[i] = int8_t(code);
    }
    std::memcpy(words + s * width, bytes, 4);
  }
  const double error = (errors[0] + errors[1]) + (errors[2] + errors[3]);
  const Norms norm = norm_of(query, d);
  const double all = norm.value + std::sqrt(error), left = std::sqrt(error);
  QueryBound q;
  q.step = step;
  q.correction = int32_t(128 * sum);
  // 2^-20 of the product of norms covers the roundings of bounds_generic and of a projection
  q.by_error = float(all * 1.00001);
  q.by_norm = float(left * 1.00001 + all * 1e-6);
  q.by_rest = float(rest * 1.00001);
  q.constant = tiny * float(d + 1);
  q.norm_squared = float(norm.value * norm.value * (1 - 4e-6));
  q.shrink = 1.0f - (float(d) / 16 + 400) * unit;  // norms are rounded up; their squares must not be
  q.empty = norm.has_nan;
  return q;
}

// --- The best of a query ------------------------------------------------------------------------------------------

struct Best {
  double* values;
  int64_t* indices;
  int64_t k;
  bool highest;

  void clear() const {
    std::fill(values, values + k, -std::numeric_limits<double>::infinity());
    std::fill(indices, indices + k, int64_t(-1));
  }
  bool before(double value, int64_t index, int64_t place) const {
    if (value != values[place]) return value > values[place];
    return highest ? index > indices[place] : index < indices[place];
  }
  void insert(double value, int64_t index) const {
    if (!(value > -std::numeric_limits<double>::infinity()) || !before(value, index, k - 1)) return;
    int64_t place = k - 1;
    for (; place > 0 && before(value, index, place - 1); --place) {
      values[place] = values[place - 1];
      indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
  }
  // What a bound must reach: the last of the k, rounded down.
  float bar() const {
    const double last = values[k - 1];
    if (!(last > -3.4e38)) return -infinity;
    const float rounded = last < 3.4e38 ? float(last) : 3.4e38f;
    return double(rounded) > last ? std::nextafter(rounded, -infinity) : rounded;
  }
};

// --- One thread's part ---------------------------------------------------------------------------------------------

struct Candidate {
  float bound;
  int32_t key;
  bool operator<(const Candidate& other) const { return bound < other.bound; }
};

struct Layout {
  int64_t steps, groups, tile;
  size_t words, bounds, bars, threads, per_thread, codes, vectors, row, products, candidates, values, indices, total;
};

size_t take(size_t& total, int64_t bytes) {
  const size_t at = total;
  total += size_t(round_up(std::max<int64_t>(bytes, 1), 64));
  return at;
}

Layout layout_of(const SearchArguments& in, int64_t tile, int64_t width, int threads) {
  const int64_t n = in.queries.shape[0], d = in.queries.shape[1];
  const int64_t m = in.scan_queries ? in.scan_queries->shape[1] : d, at_once = std::max(width, direct_queries);
  Layout at;
  at.tile = tile;
  at.steps = code_steps(m);
  at.groups = width ? ceil_div(n, width) : 0;
  at.total = 0;
  at.words = take(at.total, at.groups * width * at.steps * 4);
  at.bounds = take(at.total, n * int64_t(sizeof(QueryBound)));
  at.bars = take(at.total, n * int64_t(sizeof(std::atomic<float>)));
  at.threads = at.total;
  size_t own = 0;
  at.codes = take(own, width && !in.codes ? code_bytes(tile, d) : 0);
  at.vectors = take(own, 3 * tile * 4);
  at.row = take(own, d * 4);
  at.products = take(own, at_once * tile * 4);
  at.candidates = take(own, tile * int64_t(sizeof(Candidate)));
  at.values = take(own, n * in.k * 8);
  at.indices = take(own, n * in.k * 8);
  at.per_thread = own;
  at.total += own * size_t(threads);
  return at;
}

// What all threads of a call share.
struct Shared {
  const SearchArguments& in;
  const Kernels kernels;
  const Keys keys;
  const Layout at;
  int64_t width;
  const int32_t* words;
  QueryBound* bounds;
  std::atomic<float>* bars;  // what a bound must reach; only ever raised, so a late look costs time, not exactness

  const float* query(int64_t b) const { return static_cast<const float*>(in.queries.data) + b * keys.d; }
};

void raise(std::atomic<float>& bar, float value) {
  float seen = bar.load(std::memory_order_relaxed);
  while (seen < value && !bar.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

class Worker {
 public:
  Worker(const Shared& shared, char* memory)
      : s_(shared),
        codes_(reinterpret_cast<uint8_t*>(memory + shared.at.codes)),
        vectors_(reinterpret_cast<float*>(memory + shared.at.vectors)),
        row_(reinterpret_cast<float*>(memory + shared.at.row)),
        products_(reinterpret_cast<int32_t*>(memory + shared.at.products)),
        candidates_(reinterpret_cast<Candidate*>(memory + shared.at.candidates)),
        values_(reinterpret_cast<double*>(memory + shared.at.values)),
        indices_(reinterpret_cast<int64_t*>(memory + shared.at.indices)) {
    for (int64_t b = 0; b < shared.in.queries.shape[0]; ++b) best(b).clear();
  }

  Best best(int64_t b) const { return {values_ + b * s_.in.k, indices_ + b * s_.in.k, s_.in.k, s_.in.highest}; }

  void tile(int64_t first) {
    const int64_t n = std::min(s_.at.tile, s_.keys.n - first);
    if (s_.width)
      scan_codes(first, n);
    else
      scan_rows(first, n);
  }

 private:
  // Codes of the tile's keys, made here unless they are given.
  Codes codes_of_tile(int64_t first, int64_t n, const uint8_t*& data) {
    if (s_.in.codes) {
      const Codes& c = *s_.in.codes;
      data = c.data + first / block_keys * s_.at.steps * 64;
      return {data, c.step + first, c.error + first, c.norm + first, c.rest ? c.rest + first : nullptr};
    }
    float *step = vectors_, *error = vectors_ + s_.at.tile, *norm = vectors_ + 2 * s_.at.tile;
    for (int64_t j = 0; j < n; ++j) {
      uint8_t* out = codes_ + j / block_keys * s_.at.steps * 64 + j % block_keys * 4;
      const float* row = s_.keys.row(first + j, s_.kernels, row_);
      const Encoded e = s_.kernels.encode(row, s_.keys.d, s_.keys.whole(), s_.keys.scale(first + j), out);
      step[j] = e.step, error[j] = e.error, norm[j] = e.norm;
    }
    data = codes_;
    return {codes_, step, error, norm, nullptr};
  }

  void scan_codes(int64_t first, int64_t n) {
    const uint8_t* data;
    const Codes codes = codes_of_tile(first, n, data);
    const int64_t blocks = ceil_div(n, block_keys), width = s_.width, n_queries = s_.in.queries.shape[0];
    for (int64_t group = 0; group < s_.at.groups; ++group) {
      s_.kernels.dots(data, blocks, s_.at.steps, s_.words + group * width * s_.at.steps, width, products_);
      for (int64_t b = group * width; b < std::min(n_queries, (group + 1) * width); ++b) {
        if (s_.bounds[b].empty) continue;
        int32_t* products = products_ + (b - group * width) * blocks * block_keys;
        const float bar = s_.bars[b].load(std::memory_order_relaxed);
        if (s_.kernels.bounds(products, n, s_.bounds[b], codes, s_.in.nearest, bar))
          compare(b, first, n, reinterpret_cast<const float*>(products), bar);
      }
    }
  }

  // Bounds from float32 rows, a few queries at a time. Distances are sums of squared differences, but not for keys with
  // a scale, whose rounding is not relative to the difference.
  void scan_rows(int64_t first, int64_t n) {
    for (int64_t b = 0; b < s_.in.queries.shape[0]; b += direct_queries)
      scan_rows(first, n, b, std::min(direct_queries, s_.in.queries.shape[0] - b));
  }

  void scan_rows(int64_t first, int64_t n, int64_t query, int64_t n_queries) {
    const int64_t d = s_.keys.d;
    float* bounds = reinterpret_cast<float*>(products_);
    for (int64_t j = 0; j < n; ++j) {
      const float* row = s_.keys.row(first + j, s_.kernels, row_);
      float out[direct_queries], squared;
      if (s_.in.nearest && !s_.keys.whole()) {
        s_.kernels.squares(row, s_.query(query), d, n_queries, out);
        for (int64_t b = 0; b < n_queries; ++b) bounds[b * s_.at.tile + j] = distance_bound(out[b]);
      } else {
        s_.kernels.products(row, s_.query(query), d, n_queries, out, squared);
        for (int64_t b = 0; b < n_queries; ++b)
          bounds[b * s_.at.tile + j] = product_bound(query + b, out[b], squared, s_.keys.scale(first + j));
      }
    }
    for (int64_t b = 0; b < n_queries; ++b)
      if (!s_.bounds[query + b].empty)
        compare(query + b, first, n, bounds + b * s_.at.tile,
                s_.bars[query + b].load(std::memory_order_relaxed));
  }

  // The keys of a tile whose bounds reach the bar, the highest first, until the bar is above what is left.
  void compare(int64_t b, int64_t first, int64_t n, const float* bounds, float bar) {
    if (s_.in.k == 1 && bar == -infinity) bar = decide_highest(b, first, n, bounds);
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j)
      if (!(bounds[j] < bar) && s_.keys.alive(first + j))
        candidates_[count++] = {bounds[j] == bounds[j] ? bounds[j] : infinity, int32_t(j)};
    std::make_heap(candidates_, candidates_ + count);
    while (count > 0 && !(candidates_[0].bound < bar)) {
      const int64_t j = first + candidates_[0].key;
      std::pop_heap(candidates_, candidates_ + count--);
      bar = std::max(bar, decide(b, j, bar));
    }
    raise(s_.bars[b], bar);
  }

  // Before anything is known: the key of highest bound, lest all of the tile become candidates.
  float decide_highest(int64_t b, int64_t first, int64_t n, const float* bounds) {
    int64_t highest = -1;
    for (int64_t j = 0; j < n; ++j)
      if (s_.keys.alive(first + j) && (highest < 0 || bounds[j] > bounds[highest])) highest = j;
    return highest < 0 ? -infinity : decide(b, first + highest, -infinity);
  }

  // Compares a key exactly, unless its row in float32 shows that it cannot reach the bar. Returns the new bar.
  float decide(int64_t b, int64_t j, float bar) {
    const float* row = s_.keys.row(j, s_.kernels, row_);
    if (s_.width && !s_.keys.whole() && row_bound(b, row) < bar) return bar;
    const Best best = this->best(b);
    best.insert(s_.kernels.exact(s_.in.nearest, row, s_.query(b), s_.keys.d, s_.keys.scale(j)), j + s_.in.offset);
    return best.bar();
  }

  float row_bound(int64_t b, const float* row) const {
    float out, squared;
    if (s_.in.nearest) {
      s_.kernels.squares(row, s_.query(b), s_.keys.d, 1, &out);
      return distance_bound(out);
    }
    s_.kernels.products(row, s_.query(b), s_.keys.d, 1, &out, squared);
    return product_bound(b, out, squared, 1.0f);
  }

  float distance_bound(float squared) const { return squared * (slack_ - 1) + tiny; }
  float product_bound(int64_t b, float product, float squared, float scale) const {
    const QueryBound& q = s_.bounds[b];
    const float norm = (std::sqrt(squared) * (1 + slack_) + 1e-18f) * std::fabs(scale);
    const float bound = product * scale + slack_ * q.by_error * norm + q.constant;
    return s_.in.nearest ? 2 * bound - norm * norm * (1 - 4 * slack_) - q.norm_squared : bound;
  }

  const Shared& s_;
  const float slack_ = 1.02f * (float(s_.keys.d) + 16) * unit;  // g of the bounds at the top
  uint8_t* codes_;
  float* vectors_;
  float* row_;
  int32_t* products_;
  Candidate* candidates_;
  double* values_;
  int64_t* indices_;
};

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

SearchPlan plan_search(const SearchArguments& in, Isa isa, int threads) {
  const int64_t n_queries = in.queries.shape[0], n = in.keys.shape[0], d = in.queries.shape[1];
  const int64_t m = in.scan_queries ? in.scan_queries->shape[1] : d;
  // Sums of byte products stay within 32 bits up to this many dimensions.
  const bool by_codes = in.codes || (n_queries > direct_queries && d <= 65536);
  SearchPlan plan;
  plan.isa = isa;
  plan.width = !by_codes ? 0 : n_queries == 1 ? 1 : n_queries == 2 ? 2 : n_queries <= 4 ? 4 : 8;
  if (n * std::max<int64_t>(d, 1) * n_queries < small_work) threads = 1;
  // Whole triples of blocks; codes that stay in the second-level cache; something for every thread.
  constexpr int64_t step = 3 * block_keys;
  const int64_t fits = (int64_t(512) << 10) / std::max<int64_t>(m, 1) / step * step;
  plan.tile = std::max(step, std::min({int64_t(21 * step), fits, round_up(ceil_div(n, 2 * threads), step)}));
  plan.threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, ceil_div(n, plan.tile))));
  plan.workspace_bytes = layout_of(in, plan.tile, plan.width, plan.threads).total;
  return plan;
}

void search(const SearchPlan& plan, const SearchArguments& in, double* values, int64_t* indices, void* workspace) {
  const int64_t n_queries = in.queries.shape[0], n = in.keys.shape[0], d = in.queries.shape[1];
  if (n_queries == 0 || n == 0) return;
  char* memory = static_cast<char*>(workspace);
  const Layout at = layout_of(in, plan.tile, plan.width, plan.threads);
  int32_t* words = reinterpret_cast<int32_t*>(memory + at.words);
  Shared shared{in,         kernels_for(plan.isa), Keys(in), at,
                plan.width, words,                 reinterpret_cast<QueryBound*>(memory + at.bounds),
                reinterpret_cast<std::atomic<float>*>(memory + at.bars)};
  if (plan.width) std::fill(words, words + at.groups * plan.width * at.steps, 0);
  const int64_t m = in.scan_queries ? in.scan_queries->shape[1] : d;
  int32_t unused = 0;
#pragma omp parallel for schedule(static) num_threads(n_queries * d < small_work ? 1 : plan.threads)
  for (int64_t b = 0; b < n_queries; ++b) {
    const float* scanned = in.scan_queries ? static_cast<const float*>(in.scan_queries->data) + b * m : shared.query(b);
    const double rest = in.rest ? static_cast<const float*>(in.rest->data)[b * in.rest->stride[0]] : 0.0;
    int32_t* own = plan.width ? words + b / plan.width * plan.width * at.steps + b % plan.width : &unused;
    shared.bounds[b] = encode_query(shared.query(b), d, scanned, plan.width ? m : 0, rest, plan.width, own);
    const Best before{values + b * in.k, indices + b * in.k, in.k, in.highest};
    new (&shared.bars[b]) std::atomic<float>(before.bar());
  }
  const int64_t tiles = ceil_div(n, plan.tile);
#pragma omp parallel num_threads(plan.threads)
  {
    Worker worker(shared, memory + at.threads + size_t(thread_number()) * at.per_thread);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tiles; ++t) worker.tile(t * plan.tile);
#pragma omp critical(fastedit_search_merge)
    for (int64_t b = 0; b < n_queries; ++b) {
      const Best found = worker.best(b), all{values + b * in.k, indices + b * in.k, in.k, in.highest};
      for (int64_t i = 0; i < in.k && found.indices[i] >= 0; ++i) all.insert(found.values[i], found.indices[i]);
    }
  }
}

void encode(const TensorView& x, int64_t first, Isa isa, int threads, uint8_t* data, float* step, float* error,
            float* norm) {
  const int64_t n = x.shape[0], d = x.shape[1], steps = code_steps(d);
  const Kernels kernels = kernels_for(isa);
  const auto* rows = static_cast<const float*>(x.data);
  if (n * d < small_work) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = first + i;
    uint8_t* out = data + j / block_keys * steps * 64 + j % block_keys * 4;
    const Encoded e = kernels.encode(rows + i * x.stride[0], d, false, 1.0f, out);
    step[j] = e.step, error[j] = e.error, norm[j] = e.norm;
  }
}

}  // namespace fastedit::cpu
