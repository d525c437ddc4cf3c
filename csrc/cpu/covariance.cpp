// cov += xᵀ diag(mask) x on a CPU.
//
// Tokens are packed, a chunk at a time, into panels of 32 columns: steps of 32 consecutive words, where a word is
// one token's value (float or double), or two tokens' bfloat16 values side by side for the instruction that
// multiplies pairs. Packing skips masked tokens. Then tasks, each owning one square of the lower triangle of cov,
// multiply panels with panels: 32x32 blocks, accumulated in registers over at most `steps_per_slice` steps, summed
// over slices in a small square kept in cache, and added to cov once a chunk. Finally the triangle is mirrored.
//
// Work: T d (d + 32) multiply-adds instead of 2 T d². Memory: x once, packed x d/tile times from the outer caches, and
// the lower triangle of cov once a chunk. Error: sums of at most 128 products (256 of bfloat16) in registers, of a
// chunk's slices in the accumulator, then of chunks in cov: errors of independent short sums, not of one long one.

#include "../covariance.h"

#include <algorithm>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr int64_t panel_width = 32;
constexpr int64_t block_size = panel_width * panel_width;
constexpr int64_t max_chunk_tokens = 2048;
constexpr int64_t packing_bytes = int64_t(64) << 20;  // upper bound of the packed chunk, unless a slice is larger
constexpr int64_t pack_group = 16;                     // steps that a task packs: whole rows, read once

// --- Blocks: c (32, 32), contiguous, += aᵀ b, where a and b are panels of `steps` steps ---------------------------------------

template <class Word, class Acc>
FASTEDIT_INLINE void block_generic(const Word* a, const Word* b, int64_t steps, Acc* c) {
  constexpr int rows = 4, columns = 8;
  for (int i = 0; i < panel_width; i += rows)
    for (int j = 0; j < panel_width; j += columns) {
      Word sum[rows][columns] = {};
      for (int64_t k = 0; k < steps; ++k)
        for (int r = 0; r < rows; ++r)
          for (int q = 0; q < columns; ++q)
            sum[r][q] += a[k * panel_width + i + r] * b[k * panel_width + j + q];
      for (int r = 0; r < rows; ++r)
        for (int q = 0; q < columns; ++q) c[(i + r) * panel_width + j + q] += Acc(sum[r][q]);
    }
}

template <class Word, class Acc>
void block_scalar(const void* a, const void* b, int64_t steps, Acc* c) {
  block_generic(static_cast<const Word*>(a), static_cast<const Word*>(b), steps, c);
}

#if defined(__x86_64__)

FASTEDIT_AVX2 FASTEDIT_INLINE void add_to(float* c, __m256 v) {
  _mm256_storeu_ps(c, _mm256_add_ps(_mm256_loadu_ps(c), v));
}

FASTEDIT_AVX2 FASTEDIT_INLINE void add_to(double* c, __m256d v) {
  _mm256_storeu_pd(c, _mm256_add_pd(_mm256_loadu_pd(c), v));
}

FASTEDIT_AVX2 FASTEDIT_INLINE void add_to(double* c, __m256 v) {
  add_to(c, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  add_to(c + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void add_to(float* c, __m512 v) {
  _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), v));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void add_to(double* c, __m512d v) {
  _mm512_storeu_pd(c, _mm512_add_pd(_mm512_loadu_pd(c), v));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void add_to(double* c, __m512 v) {
  add_to(c, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  add_to(c + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}

// 4x16 register tile: 8 accumulators hide the latency of two multiply-adds a cycle.
template <class Acc>
FASTEDIT_AVX2 void block_avx2(const void* a_panel, const void* b_panel, int64_t steps, Acc* c) {
  constexpr int rows = 4;
  for (int j = 0; j < panel_width; j += 16)
    for (int i = 0; i < panel_width; i += rows) {
      const float* a = static_cast<const float*>(a_panel) + i;
      const float* b = static_cast<const float*>(b_panel) + j;
      __m256 sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      for (int64_t k = 0; k < steps; ++k, a += panel_width, b += panel_width) {
        const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
        for (int r = 0; r < rows; ++r) {
          const __m256 ar = _mm256_broadcast_ss(a + r);
          sum[r][0] = _mm256_fmadd_ps(ar, b0, sum[r][0]);
          sum[r][1] = _mm256_fmadd_ps(ar, b1, sum[r][1]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        add_to(c + (i + r) * panel_width + j, sum[r][0]);
        add_to(c + (i + r) * panel_width + j + 8, sum[r][1]);
      }
    }
}

template <class Acc>
FASTEDIT_AVX2 void block_avx2_f64(const void* a_panel, const void* b_panel, int64_t steps, Acc* c) {
  constexpr int rows = 4;
  for (int j = 0; j < panel_width; j += 8)
    for (int i = 0; i < panel_width; i += rows) {
      const double* a = static_cast<const double*>(a_panel) + i;
      const double* b = static_cast<const double*>(b_panel) + j;
      __m256d sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_pd();
      for (int64_t k = 0; k < steps; ++k, a += panel_width, b += panel_width) {
        const __m256d b0 = _mm256_loadu_pd(b), b1 = _mm256_loadu_pd(b + 4);
        for (int r = 0; r < rows; ++r) {
          const __m256d ar = _mm256_broadcast_sd(a + r);
          sum[r][0] = _mm256_fmadd_pd(ar, b0, sum[r][0]);
          sum[r][1] = _mm256_fmadd_pd(ar, b1, sum[r][1]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        add_to(c + (i + r) * panel_width + j, sum[r][0]);
        add_to(c + (i + r) * panel_width + j + 4, sum[r][1]);
      }
    }
}

// 8x32 register tile: 16 accumulators, two vectors of b and one broadcast word of a.
template <class Acc>
FASTEDIT_AVX512 void block_avx512(const void* a_panel, const void* b_panel, int64_t steps, Acc* c) {
  constexpr int rows = 8;
  for (int i = 0; i < panel_width; i += rows) {
    const float* a = static_cast<const float*>(a_panel) + i;
    const float* b = static_cast<const float*>(b_panel);
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, a += panel_width, b += panel_width) {
      const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
      for (int r = 0; r < rows; ++r) {
        const __m512 ar = _mm512_set1_ps(a[r]);
        sum[r][0] = _mm512_fmadd_ps(ar, b0, sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(ar, b1, sum[r][1]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      add_to(c + (i + r) * panel_width, sum[r][0]);
      add_to(c + (i + r) * panel_width + 16, sum[r][1]);
    }
  }
}

template <class Acc>
FASTEDIT_AVX512 void block_avx512_f64(const void* a_panel, const void* b_panel, int64_t steps, Acc* c) {
  constexpr int rows = 8;
  for (int j = 0; j < panel_width; j += 16)
    for (int i = 0; i < panel_width; i += rows) {
      const double* a = static_cast<const double*>(a_panel) + i;
      const double* b = static_cast<const double*>(b_panel) + j;
      __m512d sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_pd();
      for (int64_t k = 0; k < steps; ++k, a += panel_width, b += panel_width) {
        const __m512d b0 = _mm512_loadu_pd(b), b1 = _mm512_loadu_pd(b + 8);
        for (int r = 0; r < rows; ++r) {
          const __m512d ar = _mm512_set1_pd(a[r]);
          sum[r][0] = _mm512_fmadd_pd(ar, b0, sum[r][0]);
          sum[r][1] = _mm512_fmadd_pd(ar, b1, sum[r][1]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        add_to(c + (i + r) * panel_width + j, sum[r][0]);
        add_to(c + (i + r) * panel_width + j + 8, sum[r][1]);
      }
    }
}

// As block_avx512, two tokens a step.
template <class Acc>
FASTEDIT_AVX512_BF16 void block_avx512_bf16(const void* a_panel, const void* b_panel, int64_t steps, Acc* c) {
  constexpr int rows = 8;
  for (int i = 0; i < panel_width; i += rows) {
    const uint32_t* a = static_cast<const uint32_t*>(a_panel) + i;
    const uint32_t* b = static_cast<const uint32_t*>(b_panel);
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < steps; ++k, a += panel_width, b += panel_width) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
      for (int r = 0; r < rows; ++r) {
        const __m512bh ar = (__m512bh)_mm512_set1_epi32(int(a[r]));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], ar, b0);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], ar, b1);
      }
    }
    for (int r = 0; r < rows; ++r) {
      add_to(c + (i + r) * panel_width, sum[r][0]);
      add_to(c + (i + r) * panel_width + 16, sum[r][1]);
    }
  }
}

#endif  // __x86_64__

// --- Packing: one step of all panels, from one token (or two) ------------------------------------------------------

// dst[p * panel_stride + c] = token value of column 32 p + c, zero beyond d. A null second token is zero.
using PackStep = void (*)(const void* first, const void* second, int64_t d, void* dst, int64_t panel_stride);

template <class Type, class Word>
FASTEDIT_INLINE void pack_values(const void* token, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const typename Type::Storage*>(token);
  for (int64_t column = 0; column < d; column += panel_width) {
    Word* out = static_cast<Word*>(dst) + column / panel_width * panel_stride;
    const int64_t n = std::min(panel_width, d - column);
    if (n == panel_width) {
      for (int c = 0; c < panel_width; ++c) out[c] = Type::load(x[column + c]);
    } else {
      for (int c = 0; c < panel_width; ++c) out[c] = c < n ? Type::load(x[column + c]) : Word(0);
    }
  }
}

FASTEDIT_INLINE void pack_doubles(const void* token, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const double*>(token);
  for (int64_t column = 0; column < d; column += panel_width) {
    double* out = static_cast<double*>(dst) + column / panel_width * panel_stride;
    for (int64_t c = 0; c < panel_width; ++c) out[c] = column + c < d ? x[column + c] : 0.0;
  }
}

FASTEDIT_INLINE void pack_pairs(const void* first, const void* second, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const uint16_t*>(first);
  const auto* y = static_cast<const uint16_t*>(second);
  for (int64_t column = 0; column < d; column += panel_width) {
    uint32_t* out = static_cast<uint32_t*>(dst) + column / panel_width * panel_stride;
    const int64_t n = std::min(panel_width, d - column);
    if (n == panel_width && y) {
      for (int c = 0; c < panel_width; ++c) out[c] = x[column + c] | uint32_t(y[column + c]) << 16;
    } else {
      for (int c = 0; c < panel_width; ++c)
        out[c] = c < n ? x[column + c] | (y ? uint32_t(y[column + c]) << 16 : 0u) : 0u;
    }
  }
}

template <class Type>
void pack_scalar(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  pack_values<Type, float>(token, d, dst, panel_stride);
}

void pack_scalar_f64(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  pack_doubles(token, d, dst, panel_stride);
}

#if defined(__x86_64__)

template <class Type>
FASTEDIT_AVX2 void pack_avx2(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  pack_values<Type, float>(token, d, dst, panel_stride);
}

template <>
FASTEDIT_AVX2 void pack_avx2<F16>(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const uint16_t*>(token);
  const int64_t whole = d / panel_width * panel_width;
  for (int64_t column = 0; column < whole; column += 8) {
    float* out = static_cast<float*>(dst) + column / panel_width * panel_stride + column % panel_width;
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + column))));
  }
  float* last = static_cast<float*>(dst) + whole / panel_width * panel_stride;
  if (whole < d) pack_values<F16, float>(x + whole, d - whole, last, panel_stride);
}

template <class Type>
FASTEDIT_AVX512 void pack_avx512(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  pack_values<Type, float>(token, d, dst, panel_stride);
}

template <>
FASTEDIT_AVX512 void pack_avx512<F16>(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const uint16_t*>(token);
  const int64_t whole = d / panel_width * panel_width;
  for (int64_t column = 0; column < whole; column += 16) {
    float* out = static_cast<float*>(dst) + column / panel_width * panel_stride + column % panel_width;
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + column))));
  }
  float* last = static_cast<float*>(dst) + whole / panel_width * panel_stride;
  if (whole < d) pack_values<F16, float>(x + whole, d - whole, last, panel_stride);
}

FASTEDIT_AVX512 void pack_avx512_pairs(const void* first, const void* second, int64_t d, void* dst,
                                       int64_t panel_stride) {
  pack_pairs(first, second, d, dst, panel_stride);
}

#endif  // __x86_64__

// --- What fits the types and the instruction set ------------------------------------------------------------------

template <class Acc>
using Block = void (*)(const void* a, const void* b, int64_t steps, Acc* c);

struct Layout {
  int64_t tokens_per_step;
  int64_t word_bytes;
  int64_t steps_per_slice;  // a slice of a panel stays in the first-level cache
};

Layout layout_of(DType x, Isa isa) {
  if (x == DType::f64) return {1, 8, 64};
  if (x == DType::bf16 && isa == Isa::avx512_bf16) return {2, 4, 128};
  return {1, 4, 128};
}

PackStep pack_of(DType x, Isa isa) {
  if (x == DType::f64) return pack_scalar_f64;
#if defined(__x86_64__)
  if (x == DType::bf16 && isa == Isa::avx512_bf16) return pack_avx512_pairs;
  if (isa >= Isa::avx512)
    return x == DType::bf16 ? pack_avx512<BF16> : x == DType::f16 ? pack_avx512<F16> : pack_avx512<F32>;
  if (isa == Isa::avx2) return x == DType::bf16 ? pack_avx2<BF16> : x == DType::f16 ? pack_avx2<F16> : pack_avx2<F32>;
#endif
  return x == DType::bf16 ? pack_scalar<BF16> : x == DType::f16 ? pack_scalar<F16> : pack_scalar<F32>;
}

template <class Acc>
Block<Acc> block_of(DType x, Isa isa) {
#if defined(__x86_64__)
  if constexpr (sizeof(Acc) == 8) {
    if (x == DType::f64 && isa >= Isa::avx512) return block_avx512_f64<Acc>;
    if (x == DType::f64 && isa == Isa::avx2) return block_avx2_f64<Acc>;
  }
  if (x == DType::bf16 && isa == Isa::avx512_bf16) return block_avx512_bf16<Acc>;
  if (x != DType::f64 && isa >= Isa::avx512) return block_avx512<Acc>;
  if (x != DType::f64 && isa == Isa::avx2) return block_avx2<Acc>;
#endif
  return x == DType::f64 ? block_scalar<double, Acc> : block_scalar<float, Acc>;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t packed_words(int64_t d, int64_t chunk_tokens, const Layout& layout) {
  const int64_t slices = ceil_div(chunk_tokens, layout.tokens_per_step * layout.steps_per_slice);
  return slices * layout.steps_per_slice * ceil_div(d, panel_width) * panel_width;
}

// --- The call ------------------------------------------------------------------------------------------------------

// Tokens of the next chunk that are not masked; moves `next` past the tokens it looked at.
int64_t select_tokens(const TensorView& x, const TensorView* mask, int64_t limit, int64_t& next, int64_t* tokens) {
  const int64_t n_tokens = x.shape[0];
  int64_t count = 0;
  const auto* keep = mask ? static_cast<const uint8_t*>(mask->data) : nullptr;
  for (; next < n_tokens && count < limit; ++next)
    if (!keep || keep[next * mask->stride[0]]) tokens[count++] = next;
  return count;
}

// Packed chunk: slice after slice, in it panel after panel, in it steps_per_slice steps of 32 words.
void pack_chunk(const TensorView& x, const int64_t* tokens, int64_t count, const Layout& layout, PackStep pack,
                char* packed, int threads) {
  const int64_t d = x.shape[1], steps = ceil_div(count, layout.tokens_per_step);
  const int64_t step_bytes = panel_width * layout.word_bytes, panel_bytes = step_bytes * layout.steps_per_slice;
  const int64_t slice_bytes = panel_bytes * ceil_div(d, panel_width);
  const int64_t row_bytes = x.stride[0] * size_of(x.dtype);
  const char* data = static_cast<const char*>(x.data);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t group = 0; group < ceil_div(steps, pack_group); ++group)
    for (int64_t step = group * pack_group; step < std::min(steps, (group + 1) * pack_group); ++step) {
      const int64_t token = step * layout.tokens_per_step;
      const char* first = data + tokens[token] * row_bytes;
      const bool paired = layout.tokens_per_step == 2 && token + 1 < count;
      const char* second = paired ? data + tokens[token + 1] * row_bytes : nullptr;
      char* out = packed + step / layout.steps_per_slice * slice_bytes + step % layout.steps_per_slice * step_bytes;
      pack(first, second, d, out, panel_bytes / layout.word_bytes);
    }
}

// Where block (i, j) of a square lies: blocks are contiguous, since rows a power of two apart would share cache sets.
int64_t block_offset(int64_t i, int64_t j, int64_t tile) { return (i * (tile / panel_width) + j) * block_size; }

// Adds the accumulated square to the lower triangle of cov.
template <class Acc>
void flush_square(const Acc* square, int64_t tile, int64_t row, int64_t column, int64_t d, Acc* cov) {
  for (int64_t r = row; r < std::min(d, row + tile); ++r) {
    const int64_t end = std::min(r + 1, column + tile);
    for (int64_t c = column; c < end; c += panel_width) {
      const Acc* from = square + block_offset((r - row) / panel_width, (c - column) / panel_width, tile) +
                        (r - row) % panel_width * panel_width;
      Acc* to = cov + r * d + c;
      const int64_t n = std::min(panel_width, end - c);
      for (int64_t k = 0; k < n; ++k) to[k] += from[k];
    }
  }
}

// One task: the square of cov at (row, column), over all packed steps.
template <class Acc>
void multiply_square(const char* packed, int64_t steps, const Layout& layout, Block<Acc> block, int64_t tile,
                     int64_t row, int64_t column, int64_t d, Acc* square, Acc* cov) {
  const int64_t panel_bytes = panel_width * layout.word_bytes * layout.steps_per_slice;
  const int64_t panels = ceil_div(d, panel_width), slice_bytes = panel_bytes * panels;
  const int64_t row_end = std::min(panels, (row + tile) / panel_width);
  const int64_t column_end = std::min(panels, (column + tile) / panel_width);
  std::fill(square, square + tile * tile, Acc(0));
  for (int64_t done = 0; done < steps; done += layout.steps_per_slice, packed += slice_bytes) {
    const int64_t now = std::min(layout.steps_per_slice, steps - done);
    for (int64_t j = column / panel_width; j < column_end; ++j)
      for (int64_t i = std::max(j, row / panel_width); i < row_end; ++i)
        block(packed + i * panel_bytes, packed + j * panel_bytes, now,
              square + block_offset(i - row / panel_width, j - column / panel_width, tile));
  }
  flush_square(square, tile, row, column, d, cov);
}

// Row and column of the k-th square of the lower triangle, row by row.
void triangle_position(int64_t k, int64_t& row, int64_t& column) {
  row = 0;
  while ((row + 1) * (row + 2) / 2 <= k) ++row;
  column = k - row * (row + 1) / 2;
}

// Copies the lower triangle onto the upper one. Squares are transposed in a small buffer, so that cov is read and
// written in runs: its rows, too, may share cache sets.
template <class Acc>
void mirror(Acc* cov, int64_t d, int threads) {
  constexpr int64_t side = 128;
  const int64_t n = ceil_div(d, side);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t k = 0; k < n * (n + 1) / 2; ++k) {
    Acc buffer[side][side + 1];
    int64_t i, j;  // reads the square (i, j), writes (j, i)
    triangle_position(k, i, j);
    const int64_t rows = std::min(side, d - i * side), columns = std::min(side, d - j * side);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) buffer[c][r] = cov[(i * side + r) * d + j * side + c];
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = i == j ? c + 1 : 0; r < rows; ++r) cov[(j * side + c) * d + i * side + r] = buffer[c][r];
  }
}

template <class Acc>
void covariance_as(const CovariancePlan& plan, const TensorView& cov, const TensorView& x, const TensorView* mask,
                   char* workspace) {
  const int64_t d = x.shape[1], tile = plan.tile, side = ceil_div(d, tile), tasks = side * (side + 1) / 2;
  const Layout layout = layout_of(x.dtype, plan.isa);
  const Block<Acc> block = block_of<Acc>(x.dtype, plan.isa);
  const PackStep pack = pack_of(x.dtype, plan.isa);
  Acc* squares = reinterpret_cast<Acc*>(workspace);
  char* packed = workspace + plan.threads * tile * tile * int64_t(sizeof(Acc));
  Acc* out = static_cast<Acc*>(cov.data);
  int64_t tokens[max_chunk_tokens], next = 0;
  bool touched = false;
  while (const int64_t count = select_tokens(x, mask, plan.chunk_tokens, next, tokens)) {
    touched = true;
    pack_chunk(x, tokens, count, layout, pack, packed, plan.threads);
    const int64_t steps = ceil_div(count, layout.tokens_per_step);
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
    for (int64_t k = 0; k < tasks; ++k) {
#if defined(_OPENMP)
      const int64_t thread = omp_get_thread_num();
#else
      const int64_t thread = 0;
#endif
      int64_t row, column;
      triangle_position(k, row, column);
      multiply_square(packed, steps, layout, block, tile, row * tile, column * tile, d, squares + thread * tile * tile,
                      out);
    }
  }
  if (touched) mirror(out, d, plan.threads);
}

}  // namespace

Isa covariance_isa(DType x) {
  const Isa best = best_isa();
#if defined(__x86_64__)
  // Intel's cores start an instruction on bfloat16 pairs every second cycle: half the products a cycle of two float
  // multiply-adds, times two tokens, and packing costs more. AMD's start one a cycle.
  if (best == Isa::avx512_bf16 && (x != DType::bf16 || !__builtin_cpu_is("amd"))) return Isa::avx512;
#endif
  (void)x;
  return best;
}

CovariancePlan plan_covariance(const TensorView& cov, const TensorView& x, Isa isa, int threads) {
  const Layout layout = layout_of(x.dtype, isa);
  const int64_t d = x.shape[1], panels = ceil_div(std::max<int64_t>(d, 1), panel_width);
  if (x.shape[0] * d * d < small_work) threads = 1;
  const int64_t slice_tokens = layout.tokens_per_step * layout.steps_per_slice;
  const int64_t slice_bytes = layout.steps_per_slice * panels * panel_width * layout.word_bytes;
  int64_t chunk = std::clamp(packing_bytes / slice_bytes, int64_t(1), max_chunk_tokens / slice_tokens) * slice_tokens;
  chunk = std::min(chunk, ceil_div(std::max<int64_t>(x.shape[0], 1), slice_tokens) * slice_tokens);
  // The largest square that leaves every thread several tasks: fewer, larger squares read packed x less often.
  int64_t tile = isa >= Isa::avx512 ? 256 : 128;
  auto tasks = [&] { return ceil_div(d, tile) * (ceil_div(d, tile) + 1) / 2; };
  while (tile > panel_width && threads > 1 && tasks() < 6 * threads) tile /= 2;
  const int64_t bytes = threads * tile * tile * size_of(cov.dtype) + packed_words(d, chunk, layout) * layout.word_bytes;
  return {isa, threads, tile, chunk, size_t(bytes)};
}

void covariance(const CovariancePlan& plan, const TensorView& cov, const TensorView& x, const TensorView* mask,
                void* workspace) {
  if (x.shape[0] == 0 || x.shape[1] == 0) return;
  if (cov.dtype == DType::f64)
    covariance_as<double>(plan, cov, x, mask, static_cast<char*>(workspace));
  else
    covariance_as<float>(plan, cov, x, mask, static_cast<char*>(workspace));
}

}  // namespace fastedit::cpu
