// cov += xᵀ diag(mask) x on a CPU.
//
// Tokens are packed, a chunk at a time, into panels of 32 columns: steps of 32 consecutive words, where a word is
// one token's value (float or double), or two tokens' bfloat16 values side by side for the instruction that
// multiplies pairs. Packing skips masked tokens. Then tasks, each owning one square of the lower triangle of cov,
// multiply panels with panels: 32x32 blocks, accumulated in registers over at most `steps_per_slice` steps, summed
// over slices in a small square kept in cache, and added to cov once a chunk. With the last chunk a task also writes
// the mirror image of its square. What a task needs next (panels of the next slice; in the last one, its square of
// cov) is prefetched between blocks.
//
// Work: T d (d + 32) multiply-adds instead of 2 T d². Memory: x once, packed x d/tile times from the outer caches, the
// lower triangle of cov once a chunk, the upper one written once. Error: sums of at most 128 products (256 of bfloat16)
// in registers, of a chunk's slices in the accumulator, then of chunks in cov: errors of independent short sums, not of
// one long one.

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

// Memory that will be needed soon: two lines at a time, so that fetching them never holds up what is needed now.
struct Ahead {
  const char* at;
  int64_t stride;

  FASTEDIT_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    at += stride;
  }
};
constexpr int64_t ahead_per_block = 32;  // fetches in a block over a whole slice

// --- Blocks: c (32, 32), contiguous, = or += aᵀ b, where a and b are panels of `steps` steps ------------------------

template <class Word, class Acc>
void block_scalar(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh, Ahead) {
  const Word *a = static_cast<const Word*>(a_panel), *b = static_cast<const Word*>(b_panel);
  constexpr int rows = 4, columns = 8;
  for (int i = 0; i < panel_width; i += rows)
    for (int j = 0; j < panel_width; j += columns) {
      Word sum[rows][columns] = {};
      for (int64_t k = 0; k < steps; ++k)
        for (int r = 0; r < rows; ++r)
          for (int q = 0; q < columns; ++q)
            sum[r][q] += a[k * panel_width + i + r] * b[k * panel_width + j + q];
      for (int r = 0; r < rows; ++r)
        for (int q = 0; q < columns; ++q) {
          Acc& to = c[(i + r) * panel_width + j + q];
          to = fresh ? Acc(sum[r][q]) : to + Acc(sum[r][q]);
        }
    }
}

#if defined(__x86_64__)

FASTEDIT_AVX2 FASTEDIT_INLINE void put(float* c, __m256 v, bool fresh) {
  _mm256_storeu_ps(c, fresh ? v : _mm256_add_ps(_mm256_loadu_ps(c), v));
}

FASTEDIT_AVX2 FASTEDIT_INLINE void put(double* c, __m256d v, bool fresh) {
  _mm256_storeu_pd(c, fresh ? v : _mm256_add_pd(_mm256_loadu_pd(c), v));
}

FASTEDIT_AVX2 FASTEDIT_INLINE void put(double* c, __m256 v, bool fresh) {
  put(c, _mm256_cvtps_pd(_mm256_castps256_ps128(v)), fresh);
  put(c + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)), fresh);
}

FASTEDIT_AVX512 FASTEDIT_INLINE void put(float* c, __m512 v, bool fresh) {
  _mm512_storeu_ps(c, fresh ? v : _mm512_add_ps(_mm512_loadu_ps(c), v));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void put(double* c, __m512d v, bool fresh) {
  _mm512_storeu_pd(c, fresh ? v : _mm512_add_pd(_mm512_loadu_pd(c), v));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void put(double* c, __m512 v, bool fresh) {
  put(c, _mm512_cvtps_pd(_mm512_castps512_ps256(v)), fresh);
  put(c + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)), fresh);
}

// 4x16 register tile: 8 accumulators hide the latency of two multiply-adds a cycle.
template <class Acc>
FASTEDIT_AVX2 void block_avx2(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh,
                              Ahead ahead) {
  constexpr int rows = 4;
  for (int j = 0; j < panel_width; j += 16)
    for (int i = 0; i < panel_width; i += rows) {
      const float* a = static_cast<const float*>(a_panel) + i;
      const float* b = static_cast<const float*>(b_panel) + j;
      __m256 sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      for (int64_t left = steps; left > 0; left -= 64) {
        ahead.fetch();
        for (int64_t k = std::min<int64_t>(left, 64); k > 0; --k, a += panel_width, b += panel_width) {
          const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
          for (int r = 0; r < rows; ++r) {
            const __m256 ar = _mm256_broadcast_ss(a + r);
            sum[r][0] = _mm256_fmadd_ps(ar, b0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(ar, b1, sum[r][1]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        put(c + (i + r) * panel_width + j, sum[r][0], fresh);
        put(c + (i + r) * panel_width + j + 8, sum[r][1], fresh);
      }
    }
}

template <class Acc>
FASTEDIT_AVX2 void block_avx2_f64(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh,
                                  Ahead ahead) {
  constexpr int rows = 4;
  for (int j = 0; j < panel_width; j += 8)
    for (int i = 0; i < panel_width; i += rows) {
      const double* a = static_cast<const double*>(a_panel) + i;
      const double* b = static_cast<const double*>(b_panel) + j;
      __m256d sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_pd();
      for (int64_t left = steps; left > 0; left -= 64) {
        ahead.fetch();
        for (int64_t k = std::min<int64_t>(left, 64); k > 0; --k, a += panel_width, b += panel_width) {
          const __m256d b0 = _mm256_loadu_pd(b), b1 = _mm256_loadu_pd(b + 4);
          for (int r = 0; r < rows; ++r) {
            const __m256d ar = _mm256_broadcast_sd(a + r);
            sum[r][0] = _mm256_fmadd_pd(ar, b0, sum[r][0]);
            sum[r][1] = _mm256_fmadd_pd(ar, b1, sum[r][1]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        put(c + (i + r) * panel_width + j, sum[r][0], fresh);
        put(c + (i + r) * panel_width + j + 4, sum[r][1], fresh);
      }
    }
}

// 8x32 register tile: 16 accumulators, two vectors of b and one broadcast word of a.
template <class Acc>
FASTEDIT_AVX512 void block_avx512(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh,
                                  Ahead ahead) {
  constexpr int rows = 8;
  for (int i = 0; i < panel_width; i += rows) {
    const float* a = static_cast<const float*>(a_panel) + i;
    const float* b = static_cast<const float*>(b_panel);
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t left = steps; left > 0; left -= 16) {
      ahead.fetch();
      for (int64_t k = std::min<int64_t>(left, 16); k > 0; --k, a += panel_width, b += panel_width) {
        const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
        for (int r = 0; r < rows; ++r) {
          const __m512 ar = _mm512_set1_ps(a[r]);
          sum[r][0] = _mm512_fmadd_ps(ar, b0, sum[r][0]);
          sum[r][1] = _mm512_fmadd_ps(ar, b1, sum[r][1]);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      put(c + (i + r) * panel_width, sum[r][0], fresh);
      put(c + (i + r) * panel_width + 16, sum[r][1], fresh);
    }
  }
}

template <class Acc>
FASTEDIT_AVX512 void block_avx512_f64(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh,
                                      Ahead ahead) {
  constexpr int rows = 8;
  for (int j = 0; j < panel_width; j += 16)
    for (int i = 0; i < panel_width; i += rows) {
      const double* a = static_cast<const double*>(a_panel) + i;
      const double* b = static_cast<const double*>(b_panel) + j;
      __m512d sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_pd();
      for (int64_t left = steps; left > 0; left -= 16) {
        ahead.fetch();
        for (int64_t k = std::min<int64_t>(left, 16); k > 0; --k, a += panel_width, b += panel_width) {
          const __m512d b0 = _mm512_loadu_pd(b), b1 = _mm512_loadu_pd(b + 8);
          for (int r = 0; r < rows; ++r) {
            const __m512d ar = _mm512_set1_pd(a[r]);
            sum[r][0] = _mm512_fmadd_pd(ar, b0, sum[r][0]);
            sum[r][1] = _mm512_fmadd_pd(ar, b1, sum[r][1]);
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        put(c + (i + r) * panel_width + j, sum[r][0], fresh);
        put(c + (i + r) * panel_width + j + 8, sum[r][1], fresh);
      }
    }
}

// As block_avx512, two tokens a step.
template <class Acc>
FASTEDIT_AVX512_BF16 void block_avx512_bf16(const void* a_panel, const void* b_panel, int64_t steps, Acc* c, bool fresh,
                                            Ahead ahead) {
  constexpr int rows = 8;
  for (int i = 0; i < panel_width; i += rows) {
    const uint32_t* a = static_cast<const uint32_t*>(a_panel) + i;
    const uint32_t* b = static_cast<const uint32_t*>(b_panel);
    __m512 sum[rows][2];
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t left = steps; left > 0; left -= 16) {
      ahead.fetch();
      for (int64_t k = std::min<int64_t>(left, 16); k > 0; --k, a += panel_width, b += panel_width) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
        for (int r = 0; r < rows; ++r) {
          const __m512bh ar = (__m512bh)_mm512_set1_epi32(int(a[r]));
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], ar, b0);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], ar, b1);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      put(c + (i + r) * panel_width, sum[r][0], fresh);
      put(c + (i + r) * panel_width + 16, sum[r][1], fresh);
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

FASTEDIT_AVX2 FASTEDIT_INLINE __m256 load_8(F32, const float* x) { return _mm256_loadu_ps(x); }
FASTEDIT_AVX2 FASTEDIT_INLINE __m256 load_8(BF16, const uint16_t* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FASTEDIT_AVX2 FASTEDIT_INLINE __m256 load_8(F16, const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

template <class Type>
FASTEDIT_AVX2 void pack_avx2(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const typename Type::Storage*>(token);
  float* out = static_cast<float*>(dst);
  int64_t column = 0;
  for (; column + panel_width <= d; column += panel_width, out += panel_stride)
    for (int c = 0; c < panel_width; c += 8) _mm256_storeu_ps(out + c, load_8(Type{}, x + column + c));
  if (column < d) pack_values<Type, float>(x + column, d - column, out, panel_stride);
}

FASTEDIT_AVX512 FASTEDIT_INLINE __m512 load_16(F32, const float* x) { return _mm512_loadu_ps(x); }
FASTEDIT_AVX512 FASTEDIT_INLINE __m512 load_16(BF16, const uint16_t* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FASTEDIT_AVX512 FASTEDIT_INLINE __m512 load_16(F16, const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

template <class Type>
FASTEDIT_AVX512 void pack_avx512(const void* token, const void*, int64_t d, void* dst, int64_t panel_stride) {
  const auto* x = static_cast<const typename Type::Storage*>(token);
  float* out = static_cast<float*>(dst);
  int64_t column = 0;
  for (; column + panel_width <= d; column += panel_width, out += panel_stride) {
    _mm512_storeu_ps(out, load_16(Type{}, x + column));
    _mm512_storeu_ps(out + 16, load_16(Type{}, x + column + 16));
  }
  if (column < d) pack_values<Type, float>(x + column, d - column, out, panel_stride);
}

FASTEDIT_AVX512 void pack_avx512_pairs(const void* first, const void* second, int64_t d, void* dst,
                                       int64_t panel_stride) {
  pack_pairs(first, second, d, dst, panel_stride);
}

#endif  // __x86_64__

// --- Mirroring a block: to[c * pitch + r] = block[r * 32 + c] --------------------------------------------------------

template <class Acc>
void mirror_scalar(const Acc* block, int64_t rows, int64_t columns, Acc* to, int64_t pitch) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * pitch + r] = block[r * panel_width + c];
}

#if defined(__x86_64__)

// Transposes 16x16 values in registers. Where a row of 16 is a whole line it goes past the caches: nothing reads it
// soon, and the line need not be fetched to be overwritten.
FASTEDIT_AVX512 FASTEDIT_INLINE void mirror_16(const float* from, float* to, int64_t pitch, bool stream) {
  __m512 a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(from + r * panel_width);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4)
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[r + h]), high = _mm512_castps_pd(b[r + h + 2]);
      a[r + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[r + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // Lane l of a[4 g + m]: rows 4 g to 4 g + 3 of column 4 l + m.
  for (int m = 0; m < 4; ++m) {
    const __m512 even = _mm512_shuffle_f32x4(a[m], a[4 + m], 0x88), odd = _mm512_shuffle_f32x4(a[m], a[4 + m], 0xDD);
    const __m512 even2 = _mm512_shuffle_f32x4(a[8 + m], a[12 + m], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(a[8 + m], a[12 + m], 0xDD);
    b[m] = _mm512_shuffle_f32x4(even, even2, 0x88);
    b[4 + m] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    b[8 + m] = _mm512_shuffle_f32x4(even, even2, 0xDD);
    b[12 + m] = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
  }
  if (stream)
    for (int c = 0; c < 16; ++c) _mm512_stream_ps(to + c * pitch, b[c]);
  else
    for (int c = 0; c < 16; ++c) _mm512_storeu_ps(to + c * pitch, b[c]);
}

FASTEDIT_AVX512 void mirror_avx512(const float* block, int64_t rows, int64_t columns, float* to, int64_t pitch) {
  if (rows != panel_width || columns != panel_width) return mirror_scalar(block, rows, columns, to, pitch);
  const bool stream = reinterpret_cast<uintptr_t>(to) % 64 == 0 && pitch % 16 == 0;
  for (int c = 0; c < panel_width; c += 16)
    for (int r = 0; r < panel_width; r += 16)
      mirror_16(block + r * panel_width + c, to + c * pitch + r, pitch, stream);
  if (stream) _mm_sfence();
}

#endif  // __x86_64__

// --- What fits the types and the instruction set ------------------------------------------------------------------

template <class Acc>
using Block = void (*)(const void* a, const void* b, int64_t steps, Acc* c, bool fresh, Ahead ahead);

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

template <class Acc>
using Mirror = void (*)(const Acc* block, int64_t rows, int64_t columns, Acc* to, int64_t pitch);

template <class Acc>
Mirror<Acc> mirror_of(Isa isa) {
#if defined(__x86_64__)
  if constexpr (sizeof(Acc) == 4)
    if (isa >= Isa::avx512) return mirror_avx512;
#endif
  (void)isa;
  return mirror_scalar<Acc>;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t packed_words(int64_t d, int64_t chunk_tokens, const Layout& layout) {
  const int64_t slices = ceil_div(chunk_tokens, layout.tokens_per_step * layout.steps_per_slice);
  return slices * layout.steps_per_slice * ceil_div(d, panel_width) * panel_width;
}

// --- The call ------------------------------------------------------------------------------------------------------

// Tokens of the next chunk that are not masked; moves `next` to the first token of the chunk after it, or to the end.
int64_t select_tokens(const TensorView& x, const TensorView* mask, int64_t limit, int64_t& next, int64_t* tokens) {
  const auto* keep = mask ? static_cast<const uint8_t*>(mask->data) : nullptr;
  int64_t count = 0;
  for (; next < x.shape[0]; ++next)
    if (!keep || keep[next * mask->stride[0]]) {
      if (count == limit) break;
      tokens[count++] = next;
    }
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

// What the tasks of a call share.
template <class Acc>
struct Task {
  Layout layout;
  Block<Acc> block;
  Mirror<Acc> mirror;
  const char* packed;
  int64_t steps, tile, d;
  Acc* cov;
  bool last;  // chunk

  int64_t panels() const { return ceil_div(d, panel_width); }
  int64_t panel_bytes() const { return panel_width * layout.word_bytes * layout.steps_per_slice; }
  int64_t slice_bytes() const { return panel_bytes() * panels(); }
};

// Adds a block of sums to the lower triangle of cov, at (row, column), and with the last chunk mirrors what comes out.
template <class Acc>
void flush_block(const Task<Acc>& task, Acc* block, int64_t row, int64_t column) {
  const int64_t d = task.d, rows = std::min(panel_width, d - row), columns = std::min(panel_width, d - column);
  const bool diagonal = row == column;
  for (int64_t r = 0; r < rows; ++r) {
    Acc* from = block + r * panel_width;
    Acc* to = task.cov + (row + r) * d + column;
    const int64_t n = diagonal ? r + 1 : columns;
    for (int64_t c = 0; c < n; ++c) from[c] = to[c] += from[c];
  }
  if (!task.last) return;
  if (!diagonal) return task.mirror(block, rows, columns, task.cov + column * d + row, d);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < r; ++c) task.cov[(column + c) * d + row + r] = block[r * panel_width + c];
}

// One task: the square of cov at (row, column), given as panels, over all packed steps.
template <class Acc>
void multiply_square(const Task<Acc>& task, int64_t row, int64_t column, Acc* square) {
  const int64_t side = task.tile / panel_width, panel_bytes = task.panel_bytes();
  const int64_t row_end = std::min(task.panels(), row + side), column_end = std::min(task.panels(), column + side);
  auto block_at = [&](int64_t i, int64_t j) { return square + ((i - row) * side + j - column) * block_size; };
  // The panels of the next slice, in parts: first those of the rows, then those of the columns if they are others.
  constexpr int64_t part = ahead_per_block * 128;
  const int64_t row_parts = (row_end - row) * panel_bytes / part;
  const int64_t column_parts = row == column ? 0 : (column_end - column) * panel_bytes / part;
  auto ahead_of = [&](const char* next, int64_t n) -> Ahead {
    if (n < row_parts) return {next + row * panel_bytes + n * part, 128};
    if (n - row_parts < column_parts) return {next + column * panel_bytes + (n - row_parts) * part, 128};
    return {next, 0};
  };
  const char* slice = task.packed;
  for (int64_t done = 0; done < task.steps; done += task.layout.steps_per_slice, slice += task.slice_bytes()) {
    const int64_t now = std::min(task.layout.steps_per_slice, task.steps - done);
    const bool last = done + now == task.steps;
    int64_t n = 0;
    for (int64_t j = column; j < column_end; ++j)
      for (int64_t i = std::max(j, row); i < row_end; ++i, ++n) {
        const Ahead cov = {reinterpret_cast<const char*>(task.cov + i * panel_width * task.d + j * panel_width),
                           task.d * int64_t(sizeof(Acc))};
        task.block(slice + i * panel_bytes, slice + j * panel_bytes, now, block_at(i, j), done == 0,
                   last ? cov : ahead_of(slice + task.slice_bytes(), n));
      }
  }
  for (int64_t i = row; i < row_end; ++i)
    for (int64_t j = column; j < std::min(i + 1, column_end); ++j)
      flush_block(task, block_at(i, j), i * panel_width, j * panel_width);
}

// Row and column of the k-th square of the lower triangle, row by row.
void triangle_position(int64_t k, int64_t& row, int64_t& column) {
  row = 0;
  while ((row + 1) * (row + 2) / 2 <= k) ++row;
  column = k - row * (row + 1) / 2;
}

template <class Acc>
void covariance_as(const CovariancePlan& plan, const TensorView& cov, const TensorView& x, const TensorView* mask,
                   char* workspace) {
  const int64_t d = x.shape[1], tile = plan.tile, side = ceil_div(d, tile), tasks = side * (side + 1) / 2;
  const Layout layout = layout_of(x.dtype, plan.isa);
  const PackStep pack = pack_of(x.dtype, plan.isa);
  Acc* squares = reinterpret_cast<Acc*>(workspace);
  char* packed = workspace + plan.threads * tile * tile * int64_t(sizeof(Acc));
  Task<Acc> task = {layout, block_of<Acc>(x.dtype, plan.isa), mirror_of<Acc>(plan.isa), packed, 0, tile, d,
                    static_cast<Acc*>(cov.data), false};
  int64_t tokens[max_chunk_tokens], next = 0;
  while (const int64_t count = select_tokens(x, mask, plan.chunk_tokens, next, tokens)) {
    pack_chunk(x, tokens, count, layout, pack, packed, plan.threads);
    task.steps = ceil_div(count, layout.tokens_per_step);
    task.last = next == x.shape[0];
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
    for (int64_t k = 0; k < tasks; ++k) {
#if defined(_OPENMP)
      const int64_t thread = omp_get_thread_num();
#else
      const int64_t thread = 0;
#endif
      int64_t row, column;
      triangle_position(k, row, column);
      multiply_square(task, row * tile / panel_width, column * tile / panel_width, squares + thread * tile * tile);
    }
  }
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

void covariance_layers(const std::vector<CovarianceLayer>& layers, int threads,
                       const std::function<void*(size_t bytes)>& allocate) {
  auto run = [](const CovariancePlan& plan, const CovarianceLayer& layer, void* workspace) {
    covariance(plan, layer.cov, layer.x, layer.has_mask ? &layer.mask : nullptr, workspace);
  };
  std::vector<CovariancePlan> plans;
  std::vector<int64_t> narrow;
  size_t bytes = 0, narrow_bytes = 0;
  for (const CovarianceLayer& layer : layers) {
    plans.push_back(plan_covariance(layer.cov, layer.x, layer.isa, threads));
    const CovariancePlan alone = plan_covariance(layer.cov, layer.x, layer.isa, 1);
    if (plans.back().tile < alone.tile || plans.back().threads == 1) {
      narrow.push_back(int64_t(plans.size()) - 1);
      narrow_bytes = std::max(narrow_bytes, alone.workspace_bytes);
    }
    bytes = std::max(bytes, plans.back().workspace_bytes);
  }
  if (int64_t(narrow.size()) < 4 * threads) narrow.clear();  // too few to share out evenly
  narrow_bytes = ceil_div(int64_t(narrow_bytes), 4096) * 4096;
  char* workspace = static_cast<char*>(allocate(std::max(bytes, narrow.empty() ? 0 : threads * narrow_bytes)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (!narrow.empty())
  for (size_t k = 0; k < narrow.size(); ++k) {
#if defined(_OPENMP)
    const size_t thread = size_t(omp_get_thread_num());
#else
    const size_t thread = 0;
#endif
    const CovarianceLayer& layer = layers[size_t(narrow[k])];
    run(plan_covariance(layer.cov, layer.x, layer.isa, 1), layer, workspace + thread * narrow_bytes);
  }
  for (size_t i = 0, k = 0; i < layers.size(); ++i)
    if (k < narrow.size() && narrow[k] == int64_t(i))
      ++k;
    else
      run(plans[i], layers[i], workspace);
}

}  // namespace fastedit::cpu
