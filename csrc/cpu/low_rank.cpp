// weight += alpha * left rightᵀ on a CPU, in one pass over the weight.
//
// The stored weight has rows and columns; `by_row` (n_rows, r) and `by_column` (n_columns, r) are left and right, or
// right and left if the weight is stored transposed. Both are packed once, transposed: by_row into strips of 12 rows,
// by_column into panels of 32 columns, rank steps of 12 or 32 values. A tile, strip by panel, is accumulated in
// registers, scaled, added to the weight and rounded. Tasks are blocks of rows by blocks of columns, whose panels stay in
// the second-level cache; a task runs along the weight's rows, with (part of) a strip in the first-level cache and the
// panels streaming past it.
//
// Memory: weight read and written once, strips once per block of columns, panels once per block of rows. An element's
// arithmetic (its order of additions over the rank) depends on nothing but the instruction set.

#include "../low_rank.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"

namespace fastedit::cpu {
namespace {

constexpr int strip_height = 12;
constexpr int panel_width = 32;
constexpr int64_t task_rows = 96;
constexpr int64_t wide_rank = 64;       // from here on a tile takes longer than fetching its part of the weight
constexpr int64_t prefetch_bytes = 256;  // below: how far ahead to fetch
constexpr int64_t cache_bytes = 1 << 20;  // of a task's panels
constexpr int64_t strip_steps = 256;        // of a strip in the first-level cache
constexpr int64_t most_partial_tiles = cache_bytes / (strip_steps * panel_width * sizeof(float));

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- Stochastic rounding -------------------------------------------------------------------------------------------

// N independent Philox4x32-10 blocks with counters (index low, index high, 0, 0); word[lane][n].
template <int N>
FASTEDIT_INLINE void philox(const uint64_t* index, uint64_t seed, uint32_t word[4][N]) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int n = 0; n < N; ++n) {
    word[0][n] = uint32_t(index[n]);
    word[1][n] = uint32_t(index[n] >> 32);
    word[2][n] = word[3][n] = 0;
  }
  for (int round = 0; round < 10; ++round, key0 += philox_key0_step, key1 += philox_key1_step)
    for (int n = 0; n < N; ++n) philox_round(word[0][n], word[1][n], word[2][n], word[3][n], key0, key1);
}

// Random words of 32 consecutive stored columns, whose element indices are first + c * step.
FASTEDIT_INLINE void random_words(int64_t first, int64_t step, uint64_t seed, uint32_t* out) {
  if (step == 1 && first % 4 == 0) {  // whole counters
    constexpr int n = panel_width / 4;
    uint64_t index[n];
    uint32_t word[4][n];
    for (int k = 0; k < n; ++k) index[k] = uint64_t(first) / 4 + k;
    philox<n>(index, seed, word);
    for (int k = 0; k < n; ++k)
      for (int lane = 0; lane < 4; ++lane) out[k * 4 + lane] = word[lane][k];
  } else if (step == 1) {  // neighbours share counters
    constexpr int n = panel_width / 4 + 1;
    uint64_t index[n];
    uint32_t word[4][n];
    for (int k = 0; k < n; ++k) index[k] = uint64_t(first) / 4 + k;
    philox<n>(index, seed, word);
    for (int c = 0; c < panel_width; ++c) out[c] = word[(first + c) % 4][(first % 4 + c) / 4];
  } else {
    uint64_t index[panel_width];
    uint32_t word[4][panel_width];
    for (int c = 0; c < panel_width; ++c) index[c] = uint64_t(first + c * step) / 4;
    philox<panel_width>(index, seed, word);
    for (int c = 0; c < panel_width; ++c) out[c] = word[(first + c * step) % 4][c];
  }
}

FASTEDIT_INLINE float stochastic(F32, float value, uint32_t) { return value; }
FASTEDIT_INLINE float stochastic(BF16, float value, uint32_t word) { return stochastic_bf16(value, word); }
FASTEDIT_INLINE float stochastic(F16, float value, uint32_t word) { return stochastic_f16(value, word); }

// --- A tile --------------------------------------------------------------------------------------------------------

// Some columns of the rows of a strip: one tile, or all tiles of a task in those rows. Rows and columns beyond the
// weight's are zero in strip and panel, and are not stored.
template <class Type, class Real>
struct Tile {
  typename Type::Storage* weight;
  int64_t stride;
  int64_t n_rows, n_columns;
  const Real* strip;
  const Real* panel;
  int64_t rank;
  Real alpha;
  float* residual;  // null, or the tile's corner
  int64_t residual_stride;
  bool carry;
  bool stochastic;
  uint64_t seed;
  int64_t first_index, row_step, column_step;  // element index of the tile's corner, and how it grows
  double* square_sum;                          // null, or where the squares of the update are added
};

template <class Type, class Real>
Tile<Type, Real> tile_at(const Tile<Type, Real>& tiles, int64_t column) {
  Tile<Type, Real> tile = tiles;
  tile.weight += column;
  tile.n_columns = std::min<int64_t>(panel_width, tiles.n_columns - column);
  tile.panel += column * tiles.rank;
  if (tile.residual) tile.residual += column;
  tile.first_index += column * tiles.column_step;
  return tile;
}

template <class Type, class Real>
FASTEDIT_INLINE void multiply_generic(const Tile<Type, Real>& t, Real (*delta)[panel_width]) {
  constexpr int rows = 4, columns = 8;
  for (int i = 0; i < strip_height; i += rows)
    for (int j = 0; j < panel_width; j += columns) {
      Real sum[rows][columns] = {};
      for (int64_t k = 0; k < t.rank; ++k)
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < columns; ++c)
            sum[r][c] += t.strip[k * strip_height + i + r] * t.panel[k * panel_width + j + c];
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) delta[i + r][j + c] = sum[r][c];
    }
}

template <class Real>
FASTEDIT_INLINE void scale_row(Real* delta, Real alpha) {
  for (int c = 0; c < panel_width; ++c) delta[c] *= alpha;
  // Rounded here: fused with the addition in some tiles and not in others, an element's bits would depend on its tile.
  asm volatile("" : : "r"(delta) : "memory");
}

template <class Real>
FASTEDIT_INLINE void add_squares(const Real* delta, int n, double* square_sum) {
  double sum = 0.0;
  for (int c = 0; c < n; ++c) sum += double(delta[c]) * double(delta[c]);
  *square_sum += sum;
}

template <class Type>
FASTEDIT_INLINE void load_row(Type, const typename Type::Storage* from, int n, float* to) {
  if (n == panel_width)
    for (int c = 0; c < panel_width; ++c) to[c] = Type::load(from[c]);
  else
    for (int c = 0; c < panel_width; ++c) to[c] = c < n ? Type::load(from[c]) : 0.0f;
}

template <class Type>
FASTEDIT_INLINE void store_row(Type, const float* from, int n, typename Type::Storage* to) {
  if (n == panel_width)
    for (int c = 0; c < panel_width; ++c) to[c] = Type::store(from[c]);
  else
    for (int c = 0; c < n; ++c) to[c] = Type::store(from[c]);
}

// What comes before and after the sum of weight and delta, in a row of the tile.
template <class Type>
FASTEDIT_INLINE void carry_row(const Tile<Type, float>& t, int row, float* value) {
  if (!t.carry) return;
  const float* residual = t.residual + row * t.residual_stride;
  for (int c = 0; c < t.n_columns; ++c) value[c] += residual[c];
}

template <class Type>
FASTEDIT_INLINE void round_row(const Tile<Type, float>& t, int row, float* value) {
  if (!t.stochastic) return;
  uint32_t word[panel_width];
  random_words(t.first_index + row * t.row_step, t.column_step, t.seed, word);
  for (int c = 0; c < panel_width; ++c) value[c] = stochastic(Type{}, value[c], word[c]);
}

template <class Type>
FASTEDIT_INLINE void keep_residual(const Tile<Type, float>& t, int row, const float* exact, const float* stored) {
  float* residual = t.residual + row * t.residual_stride;
  for (int c = 0; c < t.n_columns; ++c)
    residual[c] = stored[c] - stored[c] == 0.0f ? exact[c] - stored[c] : 0.0f;  // 0 where stored is not finite
}

template <class Type>
void tile_scalar(const Tile<Type, float>& t) {
  float delta[strip_height][panel_width], value[panel_width], exact[panel_width];
  multiply_generic(t, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    typename Type::Storage* weight = t.weight + r * t.stride;
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    load_row(Type{}, weight, t.n_columns, value);
    carry_row(t, r, value);
    for (int c = 0; c < panel_width; ++c) exact[c] = value[c] += delta[r][c];
    round_row(t, r, value);
    store_row(Type{}, value, t.n_columns, weight);
    if (!t.residual) continue;
    load_row(Type{}, weight, t.n_columns, value);
    keep_residual(t, r, exact, value);
  }
}

FASTEDIT_INLINE void tile_f64_generic(const Tile<F64, double>& t) {
  double delta[strip_height][panel_width];
  multiply_generic(t, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    for (int c = 0; c < t.n_columns; ++c) t.weight[r * t.stride + c] += delta[r][c];
  }
}

void tile_scalar_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

#if defined(__x86_64__)

// 6x16 register tiles: 12 accumulators.
FASTEDIT_AVX2 FASTEDIT_INLINE void multiply_avx2(const float* strip, const float* panel, int64_t rank,
                                                 float (*delta)[panel_width]) {
  constexpr int rows = 6;
  for (int i = 0; i < strip_height; i += rows)
    for (int j = 0; j < panel_width; j += 16) {
      __m256 sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      for (int64_t k = 0; k < rank; ++k) {
        const __m256 b0 = _mm256_loadu_ps(panel + k * panel_width + j);
        const __m256 b1 = _mm256_loadu_ps(panel + k * panel_width + j + 8);
        for (int r = 0; r < rows; ++r) {
          const __m256 a = _mm256_broadcast_ss(strip + k * strip_height + i + r);
          sum[r][0] = _mm256_fmadd_ps(a, b0, sum[r][0]);
          sum[r][1] = _mm256_fmadd_ps(a, b1, sum[r][1]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        _mm256_storeu_ps(delta[i + r] + j, sum[r][0]);
        _mm256_storeu_ps(delta[i + r] + j + 8, sum[r][1]);
      }
    }
}

template <class Type>
FASTEDIT_AVX2 FASTEDIT_INLINE void load_avx2(Type type, const typename Type::Storage* from, int n, float* to) {
  load_row(type, from, n, to);
}

FASTEDIT_AVX2 FASTEDIT_INLINE void load_avx2(F16 type, const uint16_t* from, int n, float* to) {
  if (n < panel_width) return load_row(type, from, n, to);
  for (int c = 0; c < panel_width; c += 8)
    _mm256_storeu_ps(to + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c))));
}

template <class Type>
FASTEDIT_AVX2 FASTEDIT_INLINE void store_avx2(Type type, const float* from, int n, typename Type::Storage* to) {
  store_row(type, from, n, to);
}

FASTEDIT_AVX2 FASTEDIT_INLINE void store_avx2(F16 type, const float* from, int n, uint16_t* to) {
  if (n < panel_width) return store_row(type, from, n, to);
  for (int c = 0; c < panel_width; c += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class Type>
FASTEDIT_AVX2 void tile_avx2(const Tile<Type, float>& t) {
  alignas(32) float delta[strip_height][panel_width], value[panel_width], exact[panel_width];
  multiply_avx2(t.strip, t.panel, t.rank, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    typename Type::Storage* weight = t.weight + r * t.stride;
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    load_avx2(Type{}, weight, t.n_columns, value);
    carry_row(t, r, value);
    for (int c = 0; c < panel_width; ++c) exact[c] = value[c] += delta[r][c];
    round_row(t, r, value);
    store_avx2(Type{}, value, t.n_columns, weight);
    if (!t.residual) continue;
    load_avx2(Type{}, weight, t.n_columns, value);
    keep_residual(t, r, exact, value);
  }
}

FASTEDIT_AVX2 void tile_avx2_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

// The panel of a bfloat16 weight holds the even columns of 32, then the odd ones: the halves of a 32-bit word of the
// weight, which masks and shifts then take apart and put together.
template <class Type>
constexpr bool even_odd = std::is_same_v<Type, BF16>;

// sum += strip * panel. Its 24 accumulators stay in registers only where these loops are unrolled early.
FASTEDIT_AVX512 FASTEDIT_INLINE void multiply_avx512(const float* strip, const float* panel, int64_t rank,
                                                     __m512 (&sum)[strip_height][2]) {
#pragma GCC unroll 2
  for (int64_t k = rank; k > 0; --k, strip += strip_height, panel += panel_width) {
    const __m512 b0 = _mm512_loadu_ps(panel), b1 = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 12
    for (int r = 0; r < strip_height; ++r) {
      const __m512 a = _mm512_set1_ps(strip[r]);
      sum[r][0] = _mm512_fmadd_ps(a, b0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(a, b1, sum[r][1]);
    }
  }
}

// 32 weights += alpha * sum, rounded to nearest even, without leaving the registers.
FASTEDIT_AVX512 FASTEDIT_INLINE void finish_avx512(F32, float* weight, __m512 alpha, __m512 first, __m512 second) {
  _mm512_storeu_ps(weight, _mm512_fmadd_ps(alpha, first, _mm512_loadu_ps(weight)));
  _mm512_storeu_ps(weight + 16, _mm512_fmadd_ps(alpha, second, _mm512_loadu_ps(weight + 16)));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void finish_avx512(F16, uint16_t* weight, __m512 alpha, __m512 first, __m512 second) {
  __m256i* place = reinterpret_cast<__m256i*>(weight);
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  first = _mm512_fmadd_ps(alpha, first, _mm512_cvtph_ps(_mm256_loadu_si256(place)));
  second = _mm512_fmadd_ps(alpha, second, _mm512_cvtph_ps(_mm256_loadu_si256(place + 1)));
  _mm256_storeu_si256(place, _mm512_cvtps_ph(first, nearest));
  _mm256_storeu_si256(place + 1, _mm512_cvtps_ph(second, nearest));
}

// The bits of a value rounded to bfloat16, in the upper half.
FASTEDIT_AVX512 FASTEDIT_INLINE __m512i round_to_upper_half(__m512 value) {
  const __m512i u = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void finish_avx512(BF16, uint16_t* weight, __m512 alpha, __m512 even, __m512 odd) {
  const __m512i both = _mm512_loadu_si512(weight), upper = _mm512_set1_epi32(int(0xFFFF0000u));
  even = _mm512_fmadd_ps(alpha, even, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
  odd = _mm512_fmadd_ps(alpha, odd, _mm512_castsi512_ps(_mm512_and_si512(both, upper)));
  __m512i low = round_to_upper_half(even), high = round_to_upper_half(odd);
  if (__builtin_expect(_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q), 0)) {
    const __m512i nan = _mm512_set1_epi32(0x7FC00000);
    low = _mm512_mask_mov_epi32(low, _mm512_cmp_ps_mask(even, even, _CMP_UNORD_Q), nan);
    high = _mm512_mask_mov_epi32(high, _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q), nan);
  }
  _mm512_storeu_si512(weight, _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high));
}

template <class Type>
FASTEDIT_AVX512 FASTEDIT_INLINE void load_avx512(Type type, const typename Type::Storage* from, int n, float* to) {
  load_row(type, from, n, to);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void load_avx512(F16 type, const uint16_t* from, int n, float* to) {
  if (n < panel_width) return load_row(type, from, n, to);
  for (int c = 0; c < panel_width; c += 16)
    _mm512_storeu_ps(to + c, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c))));
}

template <class Type>
FASTEDIT_AVX512 FASTEDIT_INLINE void store_avx512(Type type, const float* from, int n, typename Type::Storage* to) {
  store_row(type, from, n, to);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void store_avx512(F16 type, const float* from, int n, uint16_t* to) {
  if (n < panel_width) return store_row(type, from, n, to);
  for (int c = 0; c < panel_width; c += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 32 sums in the order of the columns.
template <class Type>
FASTEDIT_AVX512 FASTEDIT_INLINE void store_in_order(const __m512* sum, float* to) {
  __m512 first = sum[0], second = sum[1];
  if constexpr (even_odd<Type>) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first = _mm512_permutex2var_ps(sum[0], low, sum[1]);
    second = _mm512_permutex2var_ps(sum[0], _mm512_add_epi32(low, _mm512_set1_epi32(8)), sum[1]);
  }
  _mm512_store_ps(to, first);
  _mm512_store_ps(to + 16, second);
}

// Tiles at an edge and every option. On its own, so that the common case below keeps its sums in registers.
template <class Type>
FASTEDIT_AVX512 __attribute__((noinline)) void any_tile_avx512(const Tile<Type, float>& t) {
  alignas(64) float delta[strip_height][panel_width], value[panel_width], exact[panel_width];
  __m512 sum[strip_height][2] = {};
  multiply_avx512(t.strip, t.panel, t.rank, sum);
  for (int r = 0; r < strip_height; ++r) store_in_order<Type>(sum[r], delta[r]);
  for (int r = 0; r < t.n_rows; ++r) {
    typename Type::Storage* weight = t.weight + r * t.stride;
    load_avx512(Type{}, weight, t.n_columns, value);
    carry_row(t, r, value);
    for (int c = 0; c < panel_width; ++c) exact[c] = value[c] = __builtin_fmaf(t.alpha, delta[r][c], value[c]);
    if (t.square_sum) {
      for (int c = 0; c < panel_width; ++c) delta[r][c] *= t.alpha;
      add_squares(delta[r], t.n_columns, t.square_sum);
    }
    round_row(t, r, value);
    store_avx512(Type{}, value, t.n_columns, weight);
    if (!t.residual) continue;
    load_avx512(Type{}, weight, t.n_columns, value);
    keep_residual(t, r, exact, value);
  }
}

// Whole tiles with no option. A strip that the first-level cache cannot hold is taken in runs of steps, between which
// the sums wait in `partial`.
template <class Type>
FASTEDIT_AVX512 void whole_tiles_avx512(const Tile<Type, float>& t, int64_t n_tiles) {
  alignas(64) float partial[most_partial_tiles][strip_height][panel_width];
  const __m512 alpha = _mm512_set1_ps(t.alpha);
  const int64_t ahead = t.rank < wide_rank ? prefetch_bytes : 0;
  for (int64_t start = 0; start < t.rank; start += strip_steps) {
    const int64_t steps = std::min(strip_steps, t.rank - start);
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      typename Type::Storage* weight = t.weight + tile * panel_width;
      const bool ends = start + steps == t.rank;
      if (ends)  // rows are far apart in memory: ask for them in time
        for (int r = 0; r < strip_height; ++r)
          for (size_t line = 0; line < panel_width * sizeof(*weight); line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(weight + r * t.stride) + ahead + line, _MM_HINT_T0);
      __m512 sum[strip_height][2];
      if (start == 0) {
#pragma GCC unroll 12
        for (int r = 0; r < strip_height; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
      } else {
#pragma GCC unroll 12
        for (int r = 0; r < strip_height; ++r) {
          sum[r][0] = _mm512_load_ps(partial[tile][r]);
          sum[r][1] = _mm512_load_ps(partial[tile][r] + 16);
        }
      }
      multiply_avx512(t.strip + start * strip_height, t.panel + (tile * t.rank + start) * panel_width, steps, sum);
      if (ends) {
#pragma GCC unroll 12
        for (int r = 0; r < strip_height; ++r, weight += t.stride)
          finish_avx512(Type{}, weight, alpha, sum[r][0], sum[r][1]);
      } else {
#pragma GCC unroll 12
        for (int r = 0; r < strip_height; ++r) {
          _mm512_store_ps(partial[tile][r], sum[r][0]);
          _mm512_store_ps(partial[tile][r] + 16, sum[r][1]);
        }
      }
    }
  }
}

template <class Type>
void tiles_avx512(const Tile<Type, float>& t) {
  const bool plain = t.n_rows == strip_height && !t.stochastic && !t.square_sum && !t.residual;
  const int64_t n_whole = plain ? t.n_columns / panel_width : 0;
  whole_tiles_avx512(t, n_whole);
  for (int64_t column = n_whole * panel_width; column < t.n_columns; column += panel_width)
    any_tile_avx512(tile_at(t, column));
}

FASTEDIT_AVX512 void tile_avx512_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

#endif  // __x86_64__

template <class Type, class Real, void (*kernel)(const Tile<Type, Real>&)>
void one_by_one(const Tile<Type, Real>& t) {
  for (int64_t column = 0; column < t.n_columns; column += panel_width) kernel(tile_at(t, column));
}

template <class Type, class Real>
struct Kernel {
  void (*tiles)(const Tile<Type, Real>&);
  bool even_odd;  // the order of a panel's columns
};

template <class Type, class Real>
Kernel<Type, Real> kernel_of(Isa isa) {
  if constexpr (sizeof(Real) == 8) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return {one_by_one<F64, double, tile_avx512_f64>, false};
    if (isa == Isa::avx2) return {one_by_one<F64, double, tile_avx2_f64>, false};
#endif
    return {one_by_one<F64, double, tile_scalar_f64>, false};
  } else {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return {tiles_avx512<Type>, even_odd<Type>};
    if (isa == Isa::avx2) return {one_by_one<Type, float, tile_avx2<Type>>, false};
#endif
    return {one_by_one<Type, float, tile_scalar<Type>>, false};
  }
}

// --- The call ------------------------------------------------------------------------------------------------------

// panel[k * Width + place(c)] = rows[c][k], zero for c >= n; place(c) is c, or puts even c first.
template <int Width, class Real>
void pack_panel(const Real* rows, int64_t stride, int64_t n, int64_t rank, bool even_odd, Real* panel) {
  constexpr int64_t group = 64 / sizeof(Real);  // steps at a time: a cache line of each row
  if (n < Width) std::fill(panel, panel + rank * Width, Real(0));
  for (int64_t k = 0; k < rank; k += group)
    for (int64_t c = 0; c < n; ++c) {
      Real* out = panel + k * Width + (even_odd ? c % 2 * (Width / 2) + c / 2 : c);
      for (int64_t step = 0; step < std::min(group, rank - k); ++step) out[step * Width] = rows[c * stride + k + step];
    }
}

#if defined(__x86_64__)

FASTEDIT_AVX512 FASTEDIT_INLINE void transpose_16x16(__m512 (&m)[16]) {
  __m512d pair[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(m[i], m[i + 1]));
    pair[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(m[i], m[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // lane l of m[i + c]: column 4 l + c of rows i to i + 3
      m[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i + j], pair[i + 2 + j]));
      m[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i + j], pair[i + 2 + j]));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    constexpr int even_lanes = 0x88, odd_lanes = 0xDD;
    const __m512 even_top = _mm512_shuffle_f32x4(m[c], m[4 + c], even_lanes);
    const __m512 odd_top = _mm512_shuffle_f32x4(m[c], m[4 + c], odd_lanes);
    const __m512 even_bottom = _mm512_shuffle_f32x4(m[8 + c], m[12 + c], even_lanes);
    const __m512 odd_bottom = _mm512_shuffle_f32x4(m[8 + c], m[12 + c], odd_lanes);
    m[c] = _mm512_shuffle_f32x4(even_top, even_bottom, even_lanes);
    m[4 + c] = _mm512_shuffle_f32x4(odd_top, odd_bottom, even_lanes);
    m[8 + c] = _mm512_shuffle_f32x4(even_top, even_bottom, odd_lanes);
    m[12 + c] = _mm512_shuffle_f32x4(odd_top, odd_bottom, odd_lanes);
  }
}

template <int Width>
FASTEDIT_AVX512 void pack_panel_avx512(const float* rows, int64_t stride, int64_t n, int64_t rank, bool even_odd,
                                       float* panel) {
  constexpr int group = 16, ahead = 3 * group;
  constexpr __mmask16 stored = Width % 16 == 0 ? 0xFFFF : (1 << Width % 16) - 1;
  for (int64_t k = 0; k < rank; k += group) {
    const int steps = int(std::min<int64_t>(group, rank - k));
    const __mmask16 loaded = __mmask16((1 << steps) - 1);
    for (int first = 0; first < Width; first += 16) {
      __m512 block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int c = even_odd ? 2 * i + first / 16 : first + i;
        const float* row = rows + c * stride + k;
        block[i] = c < n ? _mm512_maskz_loadu_ps(loaded, row) : _mm512_setzero_ps();
        _mm_prefetch(reinterpret_cast<const char*>(row + ahead), _MM_HINT_T0);
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int step = 0; step < group; ++step)
        if (step < steps) _mm512_mask_storeu_ps(panel + (k + step) * Width + first, stored, block[step]);
    }
  }
}

#endif  // __x86_64__

// Rows of a factor by Width, each group transposed: pack_panel.
template <int Width, class Real>
void pack(const TensorView& factor, Isa isa, bool even_odd, Real* packed, int threads) {
  const int64_t n_rows = factor.shape[0], rank = factor.shape[1], stride = factor.stride[0];
  auto kernel = pack_panel<Width, Real>;
#if defined(__x86_64__)
  if constexpr (sizeof(Real) == 4)
    if (isa >= Isa::avx512) kernel = pack_panel_avx512<Width>;
#endif
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < n_rows; first += Width)
    kernel(static_cast<const Real*>(factor.data) + first * stride, stride, std::min<int64_t>(Width, n_rows - first),
           rank, even_odd, packed + first * rank);
}

int64_t padded(int64_t n, int64_t width) { return ceil_div(n, width) * width; }

int64_t n_tasks(const LowRankPlan& plan, const TensorView& weight) {
  return ceil_div(weight.shape[0], plan.block_rows) * ceil_div(weight.shape[1], plan.block_columns);
}

template <class Type, class Real>
void low_rank_as(const LowRankPlan& plan, const TensorView& weight, const TensorView& by_row,
                 const TensorView& by_column, const LowRankOptions& options, double* out_norm,
                 const TensorView* residual, char* workspace) {
  const int64_t n_rows = weight.shape[0], n_columns = weight.shape[1], rank = by_row.shape[1];
  const int64_t tasks = n_tasks(plan, weight);
  Real* panels = reinterpret_cast<Real*>(workspace);
  Real* strips = panels + padded(n_columns, panel_width) * rank;
  double* squares = reinterpret_cast<double*>(strips + padded(n_rows, strip_height) * rank);
  const Kernel<Type, Real> kernel = kernel_of<Type, Real>(plan.isa);
  pack<strip_height>(by_row, plan.isa, false, strips, plan.threads);
  pack<panel_width>(by_column, plan.isa, kernel.even_odd, panels, plan.threads);

  const int64_t row_blocks = ceil_div(n_rows, plan.block_rows);
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row_start = task % row_blocks * plan.block_rows, column_start = task / row_blocks * plan.block_columns;
    const int64_t row_end = std::min(n_rows, row_start + plan.block_rows);
    double square_sum = 0.0;
    Tile<Type, Real> t{};
    t.stride = weight.stride[0];
    t.rank = rank;
    t.residual_stride = residual ? residual->stride[0] : 0;
    t.alpha = Real(options.alpha);
    t.carry = options.carry;
    t.stochastic = options.stochastic;
    t.seed = options.seed;
    t.row_step = options.transposed ? 1 : n_columns;
    t.column_step = options.transposed ? n_rows : 1;
    t.square_sum = out_norm ? &square_sum : nullptr;
    t.n_columns = std::min(n_columns - column_start, plan.block_columns);
    t.panel = panels + column_start * rank;
    for (int64_t row = row_start; row < row_end; row += strip_height) {
      t.n_rows = std::min<int64_t>(strip_height, row_end - row);
      t.strip = strips + row * rank;
      t.weight = static_cast<typename Type::Storage*>(weight.data) + row * t.stride + column_start;
      t.first_index = row * t.row_step + column_start * t.column_step;
      if (residual) t.residual = static_cast<float*>(residual->data) + row * t.residual_stride + column_start;
      kernel.tiles(t);
    }
    if (out_norm) squares[task] = square_sum;
  }
  if (out_norm) {
    double sum = 0.0;
    for (int64_t task = 0; task < tasks; ++task) sum += squares[task];
    *out_norm = std::sqrt(sum);
  }
}

}  // namespace

LowRankPlan plan_low_rank(const TensorView& weight, const TensorView& left, Isa isa, int threads) {
  const int64_t real = weight.dtype == DType::f64 ? 8 : 4, rank = left.shape[1];
  const int64_t n_rows = weight.shape[0], n_columns = weight.shape[1], steps = std::max<int64_t>(rank, 1);
  const int64_t cache = isa >= Isa::avx512 ? cache_bytes : 128 << 10;
  LowRankPlan plan{};
  plan.isa = isa;
  plan.threads = n_rows * n_columns * steps < small_work ? 1 : threads;
  plan.block_rows = task_rows;
  plan.block_columns = std::max<int64_t>(cache / (steps * real * panel_width), 1) * panel_width;
  plan.workspace_bytes = size_t((padded(n_columns, panel_width) + padded(n_rows, strip_height)) * rank * real +
                                n_tasks(plan, weight) * int64_t(sizeof(double)));
  return plan;
}

void low_rank(const LowRankPlan& plan, const TensorView& weight, const TensorView& left, const TensorView& right,
              const LowRankOptions& options, double* out_norm, const TensorView* residual, void* workspace) {
  if (out_norm) *out_norm = 0.0;
  if (weight.numel() == 0 || (left.shape[1] == 0 && !residual)) return;
  const TensorView& by_row = options.transposed ? right : left;
  const TensorView& by_column = options.transposed ? left : right;
  auto run = [&](auto type, auto real) {
    low_rank_as<decltype(type), decltype(real)>(plan, weight, by_row, by_column, options, out_norm, residual,
                                                static_cast<char*>(workspace));
  };
  switch (weight.dtype) {
    case DType::f64: return run(F64{}, double{});
    case DType::f32: return run(F32{}, float{});
    case DType::bf16: return run(BF16{}, float{});
    default: return run(F16{}, float{});
  }
}

}  // namespace fastedit::cpu
