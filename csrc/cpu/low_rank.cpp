// weight += alpha * left rightᵀ on a CPU, in one pass over the weight.
//
// The stored weight has rows and columns; `by_row` (n_rows, r) and `by_column` (n_columns, r) are left and right, or
// right and left if the weight is stored transposed. by_column is packed once, transposed, into panels of 32 columns:
// rank steps of 32 values. A tile of 8 rows by 32 columns is accumulated in registers over the whole rank, scaled,
// added to the weight and rounded. Tasks are blocks of rows by blocks of columns whose panels stay in cache.
//
// Memory: weight read and written once, by_row once per block of columns, panels once per task from cache. An
// element's arithmetic (its order of additions over the rank) depends on nothing but the instruction set.

#include "../low_rank.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace fastedit::cpu {
namespace {

constexpr int tile_rows = 8;
constexpr int panel_width = 32;
constexpr int64_t task_rows = 32;
constexpr int64_t wide_rank = 128;
constexpr int64_t prefetch_bytes = 256;

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

// Everything a tile needs. Rows beyond n_rows have pointers that repeat the last row; their results are dropped.
template <class Type, class Real>
struct Tile {
  typename Type::Storage* weight;
  int64_t stride;
  int n_rows, n_columns;
  const Real* by_row[tile_rows];
  const Real* panel;
  int64_t rank;
  Real alpha;
  bool stochastic;
  uint64_t seed;
  int64_t first_index, row_step, column_step;  // element index of the tile's corner, and how it grows
  double* square_sum;                          // null, or where the squares of the update are added
};

template <class Real>
FASTEDIT_INLINE void multiply_generic(const Real* const* by_row, const Real* panel, int64_t rank,
                                      Real (*delta)[panel_width]) {
  constexpr int rows = 4, columns = 8;
  for (int i = 0; i < tile_rows; i += rows)
    for (int j = 0; j < panel_width; j += columns) {
      Real sum[rows][columns] = {};
      for (int64_t k = 0; k < rank; ++k)
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < columns; ++c) sum[r][c] += by_row[i + r][k] * panel[k * panel_width + j + c];
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

// value = weight + delta, rounded stochastically if asked, so that storing it is exact.
template <class Type>
FASTEDIT_INLINE void add_row(const Tile<Type, float>& t, int row, const float* delta, float* value) {
  for (int c = 0; c < panel_width; ++c) value[c] += delta[c];
  if (t.stochastic) {
    uint32_t word[panel_width];
    random_words(t.first_index + row * t.row_step, t.column_step, t.seed, word);
    for (int c = 0; c < panel_width; ++c) value[c] = stochastic(Type{}, value[c], word[c]);
  }
}

template <class Type>
FASTEDIT_INLINE void load_generic(Type, const typename Type::Storage* from, int n, float* to) {
  if (n == panel_width)
    for (int c = 0; c < panel_width; ++c) to[c] = Type::load(from[c]);
  else
    for (int c = 0; c < panel_width; ++c) to[c] = c < n ? Type::load(from[c]) : 0.0f;
}

template <class Type>
FASTEDIT_INLINE void store_generic(Type, const float* from, int n, typename Type::Storage* to) {
  if (n == panel_width)
    for (int c = 0; c < panel_width; ++c) to[c] = Type::store(from[c]);
  else
    for (int c = 0; c < n; ++c) to[c] = Type::store(from[c]);
}

template <class Type>
void tile_scalar(const Tile<Type, float>& t) {
  float delta[tile_rows][panel_width], value[panel_width];
  multiply_generic(t.by_row, t.panel, t.rank, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    load_generic(Type{}, t.weight + r * t.stride, t.n_columns, value);
    add_row(t, r, delta[r], value);
    store_generic(Type{}, value, t.n_columns, t.weight + r * t.stride);
  }
}

FASTEDIT_INLINE void tile_f64_generic(const Tile<F64, double>& t) {
  double delta[tile_rows][panel_width];
  multiply_generic(t.by_row, t.panel, t.rank, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    for (int c = 0; c < t.n_columns; ++c) t.weight[r * t.stride + c] += delta[r][c];
  }
}

void tile_scalar_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

#if defined(__x86_64__)

// 4x16 register tiles: 8 accumulators.
FASTEDIT_AVX2 void multiply_avx2(const float* const* by_row, const float* panel, int64_t rank,
                                 float (*delta)[panel_width]) {
  constexpr int rows = 4;
  for (int i = 0; i < tile_rows; i += rows)
    for (int j = 0; j < panel_width; j += 16) {
      __m256 sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      for (int64_t k = 0; k < rank; ++k) {
        const __m256 b0 = _mm256_loadu_ps(panel + k * panel_width + j);
        const __m256 b1 = _mm256_loadu_ps(panel + k * panel_width + j + 8);
        for (int r = 0; r < rows; ++r) {
          const __m256 a = _mm256_broadcast_ss(by_row[i + r] + k);
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
  load_generic(type, from, n, to);
}

FASTEDIT_AVX2 FASTEDIT_INLINE void load_avx2(F16 type, const uint16_t* from, int n, float* to) {
  if (n < panel_width) return load_generic(type, from, n, to);
  for (int c = 0; c < panel_width; c += 8)
    _mm256_storeu_ps(to + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c))));
}

template <class Type>
FASTEDIT_AVX2 FASTEDIT_INLINE void store_avx2(Type type, const float* from, int n, typename Type::Storage* to) {
  store_generic(type, from, n, to);
}

FASTEDIT_AVX2 FASTEDIT_INLINE void store_avx2(F16 type, const float* from, int n, uint16_t* to) {
  if (n < panel_width) return store_generic(type, from, n, to);
  for (int c = 0; c < panel_width; c += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class Type>
FASTEDIT_AVX2 void tile_avx2(const Tile<Type, float>& t) {
  alignas(32) float delta[tile_rows][panel_width], value[panel_width];
  multiply_avx2(t.by_row, t.panel, t.rank, delta);
  for (int r = 0; r < t.n_rows; ++r) {
    scale_row(delta[r], t.alpha);
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    load_avx2(Type{}, t.weight + r * t.stride, t.n_columns, value);
    add_row(t, r, delta[r], value);
    store_avx2(Type{}, value, t.n_columns, t.weight + r * t.stride);
  }
}

FASTEDIT_AVX2 void tile_avx2_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

// One 8x32 register tile: 16 accumulators.
FASTEDIT_AVX512 FASTEDIT_INLINE void multiply_avx512(const float* const* by_row, const float* panel, int64_t rank,
                                                     __m512 (*sum)[2]) {
  const float* row[tile_rows];
  for (int r = 0; r < tile_rows; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    row[r] = by_row[r];
  }
  for (int64_t k = 0; k < rank; ++k) {
    const __m512 b0 = _mm512_loadu_ps(panel + k * panel_width), b1 = _mm512_loadu_ps(panel + k * panel_width + 16);
    for (int r = 0; r < tile_rows; ++r) {
      const __m512 a = _mm512_set1_ps(row[r][k]);
      sum[r][0] = _mm512_fmadd_ps(a, b0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(a, b1, sum[r][1]);
    }
  }
}

// 16 weights += delta, rounded to nearest even: what add_row and store do, without leaving the registers.
FASTEDIT_AVX512 FASTEDIT_INLINE void add_16(F32, float* weight, __m512 delta) {
  _mm512_storeu_ps(weight, _mm512_add_ps(_mm512_loadu_ps(weight), delta));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void add_16(BF16, uint16_t* weight, __m512 delta) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  const __m512 old = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  const __m512 value = _mm512_add_ps(old, delta);
  const __m512i u = _mm512_castps_si512(value), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void add_16(F16, uint16_t* weight, __m512 delta) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight),
                      _mm512_cvtps_ph(_mm512_add_ps(_mm512_cvtph_ps(half), delta),
                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

template <class Type>
FASTEDIT_AVX512 FASTEDIT_INLINE void load_avx512(Type type, const typename Type::Storage* from, int n, float* to) {
  load_generic(type, from, n, to);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void load_avx512(F16 type, const uint16_t* from, int n, float* to) {
  if (n < panel_width) return load_generic(type, from, n, to);
  for (int c = 0; c < panel_width; c += 16)
    _mm512_storeu_ps(to + c, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c))));
}

template <class Type>
FASTEDIT_AVX512 FASTEDIT_INLINE void store_avx512(Type type, const float* from, int n, typename Type::Storage* to) {
  store_generic(type, from, n, to);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void store_avx512(F16 type, const float* from, int n, uint16_t* to) {
  if (n < panel_width) return store_generic(type, from, n, to);
  for (int c = 0; c < panel_width; c += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Tiles at an edge, random rounding, norms. On its own, so that the common case below keeps its sums in registers.
template <class Type>
FASTEDIT_AVX512 __attribute__((noinline)) void any_tile_avx512(const Tile<Type, float>& t) {
  alignas(64) float delta[tile_rows][panel_width], value[panel_width];
  __m512 sum[tile_rows][2];
  multiply_avx512(t.by_row, t.panel, t.rank, sum);
  const __m512 alpha = _mm512_set1_ps(t.alpha);
  for (int r = 0; r < tile_rows; ++r) {
    _mm512_store_ps(delta[r], _mm512_mul_ps(sum[r][0], alpha));
    _mm512_store_ps(delta[r] + 16, _mm512_mul_ps(sum[r][1], alpha));
  }
  for (int r = 0; r < t.n_rows; ++r) {
    if (t.square_sum) add_squares(delta[r], t.n_columns, t.square_sum);
    load_avx512(Type{}, t.weight + r * t.stride, t.n_columns, value);
    add_row(t, r, delta[r], value);
    store_avx512(Type{}, value, t.n_columns, t.weight + r * t.stride);
  }
}

template <class Type>
FASTEDIT_AVX512 void tile_avx512(const Tile<Type, float>& t) {
  // The rows are far apart in memory: ask for the columns of a later tile before computing this one.
  for (int r = 0; r < t.n_rows; ++r)
    _mm_prefetch(reinterpret_cast<const char*>(t.weight + r * t.stride) + prefetch_bytes, _MM_HINT_T0);
  if (t.n_rows < tile_rows || t.n_columns < panel_width || t.stochastic || t.square_sum) return any_tile_avx512(t);
  __m512 sum[tile_rows][2];
  multiply_avx512(t.by_row, t.panel, t.rank, sum);
  const __m512 alpha = _mm512_set1_ps(t.alpha);
  for (int r = 0; r < tile_rows; ++r)
    for (int half = 0; half < 2; ++half) {
      __m512 delta = _mm512_mul_ps(sum[r][half], alpha);
      asm("" : "+v"(delta));  // not fused with the addition, see scale_row
      add_16(Type{}, t.weight + r * t.stride + 16 * half, delta);
    }
}

FASTEDIT_AVX512 void tile_avx512_f64(const Tile<F64, double>& t) { tile_f64_generic(t); }

#endif  // __x86_64__

template <class Type, class Real>
using TileKernel = void (*)(const Tile<Type, Real>&);

template <class Type, class Real>
TileKernel<Type, Real> kernel_of(Isa isa) {
  if constexpr (sizeof(Real) == 8) {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return tile_avx512_f64;
    if (isa == Isa::avx2) return tile_avx2_f64;
#endif
    return tile_scalar_f64;
  } else {
#if defined(__x86_64__)
    if (isa >= Isa::avx512) return tile_avx512<Type>;
    if (isa == Isa::avx2) return tile_avx2<Type>;
#endif
    return tile_scalar<Type>;
  }
}

// --- The call ------------------------------------------------------------------------------------------------------

// panels[(p * rank + k) * 32 + c] = by_column[32 p + c][k], zero beyond the last column.
template <class Real>
void pack_panels(const Real* by_column, int64_t stride, int64_t n_columns, int64_t rank, Real* panels, int threads) {
  constexpr int64_t group = 16;  // steps at a time: a cache line of each column
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t p = 0; p < ceil_div(n_columns, panel_width); ++p) {
    Real* out = panels + p * rank * panel_width;
    const int64_t first = p * panel_width, n = std::min<int64_t>(panel_width, n_columns - first);
    for (int64_t k = 0; k < rank; k += group)
      for (int64_t c = 0; c < panel_width; ++c)
        for (int64_t step = k; step < std::min(rank, k + group); ++step)
          out[step * panel_width + c] = c < n ? by_column[(first + c) * stride + step] : Real(0);
  }
}

template <class Type, class Real>
void low_rank_as(const LowRankPlan& plan, const TensorView& weight, const TensorView& by_row,
                 const TensorView& by_column, const LowRankOptions& options, double* out_norm, char* workspace) {
  const int64_t n_rows = weight.shape[0], n_columns = weight.shape[1], rank = by_row.shape[1];
  const int64_t row_blocks = ceil_div(n_rows, plan.block_rows);
  const int64_t column_blocks = ceil_div(n_columns, plan.block_columns);
  Real* panels = reinterpret_cast<Real*>(workspace);
  double* squares = reinterpret_cast<double*>(panels + ceil_div(n_columns, panel_width) * panel_width * rank);
  pack_panels(static_cast<const Real*>(by_column.data), by_column.stride[0], n_columns, rank, panels, plan.threads);
  const auto kernel = kernel_of<Type, Real>(plan.isa);
  const int64_t row_step = options.transposed ? 1 : n_columns, column_step = options.transposed ? n_rows : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t task = 0; task < row_blocks * column_blocks; ++task) {
    const int64_t row_start = task % row_blocks * plan.block_rows, column_start = task / row_blocks * plan.block_columns;
    const int64_t row_end = std::min(n_rows, row_start + plan.block_rows);
    const int64_t column_end = std::min(n_columns, column_start + plan.block_columns);
    double square_sum = 0.0;
    Tile<Type, Real> t;
    t.stride = weight.stride[0];
    t.rank = rank;
    t.alpha = Real(options.alpha);
    t.stochastic = options.stochastic;
    t.seed = options.seed;
    t.row_step = row_step;
    t.column_step = column_step;
    t.square_sum = out_norm ? &square_sum : nullptr;
    auto run = [&](int64_t row, int64_t column) {
      t.n_rows = int(std::min<int64_t>(tile_rows, row_end - row));
      for (int r = 0; r < tile_rows; ++r)
        t.by_row[r] = static_cast<const Real*>(by_row.data) + (row + std::min(r, t.n_rows - 1)) * by_row.stride[0];
      t.n_columns = int(std::min<int64_t>(panel_width, column_end - column));
      t.weight = static_cast<typename Type::Storage*>(weight.data) + row * t.stride + column;
      t.panel = panels + column * rank;
      t.first_index = row * row_step + column * column_step;
      kernel(t);
    };
    if (rank < wide_rank) {  // bound by memory: along the weight's rows
      for (int64_t row = row_start; row < row_end; row += tile_rows)
        for (int64_t column = column_start; column < column_end; column += panel_width) run(row, column);
    } else {  // bound by arithmetic: a panel stays in the first-level cache
      for (int64_t column = column_start; column < column_end; column += panel_width)
        for (int64_t row = row_start; row < row_end; row += tile_rows) run(row, column);
    }
    if (out_norm) squares[task] = square_sum;
  }
  if (out_norm) {
    double sum = 0.0;
    for (int64_t task = 0; task < row_blocks * column_blocks; ++task) sum += squares[task];
    *out_norm = std::sqrt(sum);
  }
}

}  // namespace

LowRankPlan plan_low_rank(const TensorView& weight, const TensorView& left, Isa isa, int threads) {
  const int64_t real = weight.dtype == DType::f64 ? 8 : 4, rank = std::max<int64_t>(left.shape[1], 1);
  const int64_t cache = isa >= Isa::avx512 ? 512 << 10 : 128 << 10;
  const int64_t n_rows = weight.shape[0], n_columns = weight.shape[1];
  if (n_rows * n_columns * rank < small_work) threads = 1;
  const int64_t block = std::max<int64_t>(cache / (rank * real * panel_width), 1) * panel_width;
  const int64_t tasks = ceil_div(n_rows, task_rows) * ceil_div(n_columns, block);
  const int64_t packed = ceil_div(n_columns, panel_width) * panel_width * rank * real;
  return {isa, threads, block, task_rows, size_t(packed + tasks * int64_t(sizeof(double)))};
}

void low_rank(const LowRankPlan& plan, const TensorView& weight, const TensorView& left, const TensorView& right,
              const LowRankOptions& options, double* out_norm, const TensorView* residual, void* workspace) {
  if (out_norm) *out_norm = 0.0;
  if (weight.numel() == 0 || (left.shape[1] == 0 && !residual)) return;
  const TensorView& by_row = options.transposed ? right : left;
  const TensorView& by_column = options.transposed ? left : right;
  char* scratch = static_cast<char*>(workspace);
  switch (weight.dtype) {
    case DType::f64: return low_rank_as<F64, double>(plan, weight, by_row, by_column, options, out_norm, scratch);
    case DType::f32: return low_rank_as<F32, float>(plan, weight, by_row, by_column, options, out_norm, scratch);
    case DType::bf16: return low_rank_as<BF16, float>(plan, weight, by_row, by_column, options, out_norm, scratch);
    default: return low_rank_as<F16, float>(plan, weight, by_row, by_column, options, out_norm, scratch);
  }
}

}  // namespace fastedit::cpu
