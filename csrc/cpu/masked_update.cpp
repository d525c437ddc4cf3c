// Masked optimiser steps on a CPU, in one pass over the parameter.
//
// Tasks own rectangles of the matrix and go through them in chunks that stay in cache. The bits of a chunk's rows are
// regenerated or fetched; rows of tensors that are fp32 and contiguous are used where they lie, others are converted
// (and turned, if they lie column by column) into buffers and, the parameter's, back. So the steps themselves know
// nothing but runs of fp32 in memory and a word of mask bits for every 64 of them.
//
// Adam gathers the selected entries of a run side by side, as their moments lie in memory already, updates all lanes,
// and scatters the result: square roots and divisions only for what is selected.
//
// Memory: the parameter read and written, the gradient, clamp_to and the moments of selected entries, once each. Every
// entry's arithmetic is the same for any number of threads and any way the matrix is cut up.

#include "../masked_update.h"

#include <algorithm>
#include <cmath>

#include "mask_bits.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr int64_t run_length = 1024;  // of a chunk of one row
constexpr int64_t task_entries = 16 * mask_block;
constexpr int64_t turned_rows = 32, turned_columns = 128;  // of a chunk where a tensor lies column by column
constexpr int64_t line_floats = 16;
constexpr int64_t few = 6;  // under one entry in so many, fetching each is faster than looking at all (measured)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- Runs: what the steps work on ----------------------------------------------------------------------------------

struct Run {
  float* w;
  const float* g;
  const float* clamp_to;  // or null
  const uint64_t* bits;
  int64_t n;
  float *first, *second;    // Adam: the moments of the first selected entry
  float *packed_w, *packed_g;  // Adam: room for n rounded up to whole vectors, and one more
};

FASTEDIT_INLINE float clamped(float w, float to, float by) {
  const float low = to - by, high = to + by;
  return w < low ? low : w > high ? high : to != to ? to : w;
}

FASTEDIT_INLINE bool touches_all(DecayScope scope, const float* clamp_to) {
  return scope == DecayScope::all || clamp_to;
}

FASTEDIT_INLINE void sgd_generic(const Run& run, const SgdStep& step) {
  const bool all = step.scope == DecayScope::all, decays = step.scope != DecayScope::none;
  for (int64_t start = 0; start < run.n; start += word_bits) {
    const uint64_t word = run.bits[start / word_bits];
    if (word == 0 && !touches_all(step.scope, run.clamp_to)) continue;
    const int64_t n = std::min(word_bits, run.n - start);
    for (int64_t i = 0; i < n; ++i) {
      const bool selected = word >> i & 1;
      float w = run.w[start + i];
      if (selected || all) {
        float change = selected ? run.g[start + i] : 0.0f;
        if (decays) change += step.decay * w;
        w -= step.lr * change;
      }
      if (run.clamp_to) w = clamped(w, run.clamp_to[start + i], step.clamp);
      run.w[start + i] = w;
    }
  }
}

void sgd_scalar(const Run& run, const SgdStep& step) { sgd_generic(run, step); }

// The selected entries of a run side by side; returns how many.
FASTEDIT_INLINE int64_t gather_generic(const Run& run) {
  int64_t count = 0;
  for (int64_t start = 0; start < run.n; start += word_bits)
    for (uint64_t word = run.bits[start / word_bits]; word; word &= word - 1) {
      const int64_t i = start + __builtin_ctzll(word);
      run.packed_w[count] = run.w[i];
      run.packed_g[count++] = run.g[i];
    }
  return count;
}

// Puts the updated entries back, and decays and clamps where that is due.
FASTEDIT_INLINE void scatter_generic(const Run& run, const AdamStep& step) {
  const float* from = run.packed_w;
  for (int64_t start = 0; start < run.n; start += word_bits) {
    uint64_t word = run.bits[start / word_bits];
    if (!touches_all(step.scope, run.clamp_to)) {
      for (; word; word &= word - 1) run.w[start + __builtin_ctzll(word)] = *from++;
      continue;
    }
    const int64_t n = std::min(word_bits, run.n - start);
    for (int64_t i = 0; i < n; ++i) {
      float w = run.w[start + i];
      if (word >> i & 1)
        w = *from++;
      else if (step.scope == DecayScope::all)
        w -= step.weight_decay * w;
      if (run.clamp_to) w = clamped(w, run.clamp_to[start + i], step.clamp);
      run.w[start + i] = w;
    }
  }
}

FASTEDIT_INLINE void adam_one(const AdamStep& step, float& w, float g, float& m, float& v) {
  if (step.gradient_decay != 0) g += step.gradient_decay * w;
  if (step.scope != DecayScope::none) w -= step.weight_decay * w;
  m += step.first_rate * (g - m);
  v = step.second * v + step.second_rate * g * g;
  w -= step.rate * m / (std::sqrt(v) * step.correction + step.eps);
}

int64_t adam_scalar(const Run& run, const AdamStep& step) {
  const int64_t count = gather_generic(run);
  for (int64_t i = 0; i < count; ++i) adam_one(step, run.packed_w[i], run.packed_g[i], run.first[i], run.second[i]);
  if (count || touches_all(step.scope, run.clamp_to)) scatter_generic(run, step);
  return count;
}

#if defined(__x86_64__)

// Eight bits of a word as lanes of ones.
FASTEDIT_AVX2 FASTEDIT_INLINE __m256 lanes_avx2(uint64_t bits) {
  const __m256i place = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  const __m256i spread = _mm256_and_si256(_mm256_set1_epi32(int(bits & 0xFF)), place);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(spread, place));
}

FASTEDIT_AVX2 FASTEDIT_INLINE __m256 clamp_avx2(__m256 w, __m256 to, __m256 by) {
  const __m256 inside = _mm256_min_ps(_mm256_add_ps(to, by), _mm256_max_ps(_mm256_sub_ps(to, by), w));
  return _mm256_blendv_ps(inside, to, _mm256_cmp_ps(to, to, _CMP_UNORD_Q));
}

FASTEDIT_AVX2 void sgd_avx2(const Run& run, const SgdStep& step) {
  const bool all = step.scope == DecayScope::all, decays = step.scope != DecayScope::none;
  const __m256 lr = _mm256_set1_ps(step.lr), decay = _mm256_set1_ps(step.decay), by = _mm256_set1_ps(step.clamp);
  const int64_t whole = run.n / word_bits * word_bits;
  for (int64_t start = 0; start < whole; start += word_bits) {
    const uint64_t word = run.bits[start / word_bits];
    if (word == 0 && !touches_all(step.scope, run.clamp_to)) continue;
    for (int64_t i = start; i < start + word_bits; i += 8) {
      const __m256 selected = lanes_avx2(word >> (i - start));
      const __m256 old = _mm256_loadu_ps(run.w + i);
      __m256 change = _mm256_and_ps(_mm256_loadu_ps(run.g + i), selected);
      if (decays) change = _mm256_fmadd_ps(decay, old, change);
      __m256 w = _mm256_fnmadd_ps(lr, change, old);
      if (!all) w = _mm256_blendv_ps(old, w, selected);
      if (run.clamp_to) w = clamp_avx2(w, _mm256_loadu_ps(run.clamp_to + i), by);
      _mm256_storeu_ps(run.w + i, w);
    }
  }
  Run rest = run;
  rest.w += whole;
  rest.g += whole;
  rest.clamp_to = run.clamp_to ? run.clamp_to + whole : nullptr;
  rest.bits += whole / word_bits;
  rest.n -= whole;
  sgd_generic(rest, step);
}

FASTEDIT_AVX2 int64_t adam_avx2(const Run& run, const AdamStep& step) {
  const int64_t count = gather_generic(run);
  const __m256 first_rate = _mm256_set1_ps(step.first_rate), second = _mm256_set1_ps(step.second);
  const __m256 second_rate = _mm256_set1_ps(step.second_rate), rate = _mm256_set1_ps(step.rate);
  const __m256 correction = _mm256_set1_ps(step.correction), eps = _mm256_set1_ps(step.eps);
  const __m256 gradient_decay = _mm256_set1_ps(step.gradient_decay);
  const __m256 weight_decay = _mm256_set1_ps(step.weight_decay);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 w = _mm256_loadu_ps(run.packed_w + i), g = _mm256_loadu_ps(run.packed_g + i);
    if (step.gradient_decay != 0) g = _mm256_fmadd_ps(gradient_decay, w, g);
    if (step.scope != DecayScope::none) w = _mm256_fnmadd_ps(weight_decay, w, w);
    __m256 m = _mm256_loadu_ps(run.first + i), v = _mm256_loadu_ps(run.second + i);
    m = _mm256_fmadd_ps(first_rate, _mm256_sub_ps(g, m), m);
    v = _mm256_fmadd_ps(second, v, _mm256_mul_ps(_mm256_mul_ps(second_rate, g), g));
    _mm256_storeu_ps(run.first + i, m);
    _mm256_storeu_ps(run.second + i, v);
    const __m256 below = _mm256_fmadd_ps(_mm256_sqrt_ps(v), correction, eps);
    _mm256_storeu_ps(run.packed_w + i, _mm256_sub_ps(w, _mm256_div_ps(_mm256_mul_ps(rate, m), below)));
  }
  for (; i < count; ++i) adam_one(step, run.packed_w[i], run.packed_g[i], run.first[i], run.second[i]);
  if (count || touches_all(step.scope, run.clamp_to)) scatter_generic(run, step);
  return count;
}

FASTEDIT_AVX512 FASTEDIT_INLINE __m512 clamp_avx512(__m512 w, __m512 to, __m512 by) {
  const __m512 inside = _mm512_min_ps(_mm512_add_ps(to, by), _mm512_max_ps(_mm512_sub_ps(to, by), w));
  return _mm512_mask_mov_ps(inside, _mm512_cmp_ps_mask(to, to, _CMP_UNORD_Q), to);
}

FASTEDIT_INLINE uint16_t lanes_of(int64_t n) { return n >= 16 ? 0xFFFF : uint16_t((1u << n) - 1); }

template <DecayScope Scope, bool Clamp>
FASTEDIT_AVX512 void sgd_avx512_as(const Run& run, const SgdStep& step) {
  const __m512 lr = _mm512_set1_ps(step.lr), decay = _mm512_set1_ps(step.decay), by = _mm512_set1_ps(step.clamp);
  for (int64_t start = 0; start < run.n; start += word_bits) {
    uint64_t word = run.bits[start / word_bits];
    if (Scope != DecayScope::all && !Clamp && word == 0) continue;
    for (int64_t i = start; i < std::min(run.n, start + word_bits); i += 16, word >>= 16) {
      const __mmask16 there = lanes_of(run.n - i), selected = __mmask16(word);
      const __m512 old = _mm512_maskz_loadu_ps(there, run.w + i);
      __m512 change = _mm512_maskz_loadu_ps(selected, run.g + i);
      if (Scope != DecayScope::none) change = _mm512_fmadd_ps(decay, old, change);
      const __mmask16 changed = Scope == DecayScope::all ? there : selected;
      __m512 w = _mm512_mask3_fnmadd_ps(lr, change, old, changed);
      if (Clamp) w = clamp_avx512(w, _mm512_maskz_loadu_ps(there, run.clamp_to + i), by);
      _mm512_mask_storeu_ps(run.w + i, there, w);
    }
  }
}

void sgd_avx512(const Run& run, const SgdStep& step) {
  switch (step.scope) {
    case DecayScope::all:
      return run.clamp_to ? sgd_avx512_as<DecayScope::all, true>(run, step) : sgd_avx512_as<DecayScope::all, false>(run, step);
    case DecayScope::masked:
      return run.clamp_to ? sgd_avx512_as<DecayScope::masked, true>(run, step)
                          : sgd_avx512_as<DecayScope::masked, false>(run, step);
    case DecayScope::none:
      return run.clamp_to ? sgd_avx512_as<DecayScope::none, true>(run, step) : sgd_avx512_as<DecayScope::none, false>(run, step);
  }
}

FASTEDIT_AVX512 FASTEDIT_INLINE int64_t gather_avx512(const Run& run) {
  int64_t count = 0;
  for (int64_t start = 0; start < run.n; start += word_bits) {
    uint64_t word = run.bits[start / word_bits];
    for (int64_t i = start; word; i += 16, word >>= 16) {
      const __mmask16 selected = __mmask16(word);
      // whole vectors: what lies beyond is overwritten by the next
      _mm512_storeu_ps(run.packed_w + count, _mm512_maskz_compress_ps(selected, _mm512_maskz_loadu_ps(selected, run.w + i)));
      _mm512_storeu_ps(run.packed_g + count, _mm512_maskz_compress_ps(selected, _mm512_maskz_loadu_ps(selected, run.g + i)));
      count += __builtin_popcount(selected);
    }
  }
  return count;
}

FASTEDIT_AVX512 FASTEDIT_INLINE void scatter_avx512(const Run& run, const AdamStep& step) {
  const __m512 decay = _mm512_set1_ps(step.weight_decay), by = _mm512_set1_ps(step.clamp);
  const bool dense = touches_all(step.scope, run.clamp_to);
  const float* from = run.packed_w;
  for (int64_t start = 0; start < run.n; start += word_bits) {
    uint64_t word = run.bits[start / word_bits];
    const int64_t end = dense ? std::min(run.n, start + word_bits) : start + word_bits;
    for (int64_t i = start; i < end && (dense || word); i += 16, word >>= 16) {
      const __mmask16 selected = __mmask16(word);
      const __m512 updated = _mm512_maskz_expand_ps(selected, _mm512_loadu_ps(from));
      from += __builtin_popcount(selected);
      if (!dense) {
        _mm512_mask_storeu_ps(run.w + i, selected, updated);
        continue;
      }
      const __mmask16 there = lanes_of(run.n - i);
      __m512 w = _mm512_maskz_loadu_ps(there, run.w + i);
      if (step.scope == DecayScope::all) w = _mm512_fnmadd_ps(decay, w, w);
      w = _mm512_mask_mov_ps(w, selected, updated);
      if (run.clamp_to) w = clamp_avx512(w, _mm512_maskz_loadu_ps(there, run.clamp_to + i), by);
      _mm512_mask_storeu_ps(run.w + i, there, w);
    }
  }
}

struct AdamLanes {
  __m512 first_rate, second, second_rate, rate, correction, eps, gradient_decay, weight_decay;
};

FASTEDIT_AVX512 FASTEDIT_INLINE AdamLanes lanes_of(const AdamStep& step) {
  return {_mm512_set1_ps(step.first_rate), _mm512_set1_ps(step.second),     _mm512_set1_ps(step.second_rate),
          _mm512_set1_ps(step.rate),       _mm512_set1_ps(step.correction), _mm512_set1_ps(step.eps),
          _mm512_set1_ps(step.gradient_decay), _mm512_set1_ps(step.weight_decay)};
}

// The new values of 16 selected entries, fewer at the end; `at` is the place of their moments.
FASTEDIT_AVX512 FASTEDIT_INLINE __m512 adam_16(const AdamStep& step, const AdamLanes& k, __m512 w, __m512 g,
                                               const Run& run, int64_t at, __mmask16 there) {
  if (step.gradient_decay != 0) g = _mm512_fmadd_ps(k.gradient_decay, w, g);
  if (step.scope != DecayScope::none) w = _mm512_fnmadd_ps(k.weight_decay, w, w);
  __m512 m = _mm512_maskz_loadu_ps(there, run.first + at), v = _mm512_maskz_loadu_ps(there, run.second + at);
  m = _mm512_fmadd_ps(k.first_rate, _mm512_sub_ps(g, m), m);
  v = _mm512_fmadd_ps(k.second, v, _mm512_mul_ps(_mm512_mul_ps(k.second_rate, g), g));
  _mm512_mask_storeu_ps(run.first + at, there, m);
  _mm512_mask_storeu_ps(run.second + at, there, v);
  const __m512 below = _mm512_fmadd_ps(_mm512_sqrt_ps(v), k.correction, k.eps);
  return _mm512_sub_ps(w, _mm512_div_ps(_mm512_mul_ps(k.rate, m), below));
}

// The places of the selected entries of a run. Eight at a time, wanted or not: how many there are cannot be predicted.
FASTEDIT_AVX512 FASTEDIT_INLINE void list_avx512(const Run& run, int32_t* out) {
  int64_t count = 0;
  for (int64_t start = 0; start < run.n; start += word_bits) {
    uint64_t word = run.bits[start / word_bits];
    const int n = __builtin_popcountll(word);
    for (int done = 0; done < n; done += 8)
      for (int i = 0; i < 8; ++i, word &= word - 1) out[count + done + i] = int32_t(start + __builtin_ctzll(word));
    count += n;
  }
}

// Few selected entries: fetched one by one.
FASTEDIT_AVX512 FASTEDIT_INLINE void adam_listed_avx512(const Run& run, const AdamStep& step, int64_t count) {
  const AdamLanes lanes = lanes_of(step);
  const auto* list = reinterpret_cast<const int32_t*>(run.packed_g);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = lanes_of(count - i);
    const __m512i at = _mm512_maskz_loadu_epi32(there, list + i);
    const __m512 w = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, at, run.w, 4);
    const __m512 g = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, at, run.g, 4);
    _mm512_mask_i32scatter_ps(run.w, there, at, adam_16(step, lanes, w, g, run, i, there), 4);
  }
}

FASTEDIT_AVX512 int64_t adam_avx512(const Run& run, const AdamStep& step) {
  const bool dense = touches_all(step.scope, run.clamp_to);
  int64_t count = count_bits(run.bits, words_for(run.n));
  if (!dense && count < run.n / few) {
    list_avx512(run, reinterpret_cast<int32_t*>(run.packed_g));
    adam_listed_avx512(run, step, count);
    return count;
  }
  count = gather_avx512(run);
  const AdamLanes lanes = lanes_of(step);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 w = _mm512_loadu_ps(run.packed_w + i), g = _mm512_loadu_ps(run.packed_g + i);
    _mm512_storeu_ps(run.packed_w + i, adam_16(step, lanes, w, g, run, i, lanes_of(count - i)));
  }
  if (count || dense) scatter_avx512(run, step);
  return count;
}

#endif  // __x86_64__

int64_t take(void (*kernel)(const Run&, const SgdStep&), const Run& run, const SgdStep& step) {
  kernel(run, step);
  return 0;
}
int64_t take(int64_t (*kernel)(const Run&, const AdamStep&), const Run& run, const AdamStep& step) {
  return kernel(run, step);
}

auto kernel_of(Isa isa, const SgdStep&) -> void (*)(const Run&, const SgdStep&) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return sgd_avx512;
  if (isa == Isa::avx2) return sgd_avx2;
#endif
  (void)isa;
  return sgd_scalar;
}

auto kernel_of(Isa isa, const AdamStep&) -> int64_t (*)(const Run&, const AdamStep&) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return adam_avx512;
  if (isa == Isa::avx2) return adam_avx2;
#endif
  (void)isa;
  return adam_scalar;
}

// --- Conversions: chunks of any type and strides to fp32 and back --------------------------------------------------

template <class Type>
FASTEDIT_INLINE float load_one(const void* from, int64_t at) {
  return Type::load(static_cast<const typename Type::Storage*>(from)[at]);
}
template <>
FASTEDIT_INLINE float load_one<F64>(const void* from, int64_t at) {
  return float(static_cast<const double*>(from)[at]);
}

// Element (r, c) of a matrix in memory, rows and columns of a chunk of it, and a buffer with rows `pitch` apart.
struct Block {
  char* data;
  int64_t row_stride, column_stride;
  int64_t rows, columns;
  float* buffer;
  int64_t pitch;
};

template <class Type>
FASTEDIT_INLINE void load_generic(const Block& b) {
  if (b.column_stride == 1) {
    for (int64_t r = 0; r < b.rows; ++r) {
      float* to = b.buffer + r * b.pitch;
      for (int64_t c = 0; c < b.columns; ++c) to[c] = load_one<Type>(b.data, r * b.row_stride + c);
    }
  } else {
    for (int64_t c = 0; c < b.columns; ++c)
      for (int64_t r = 0; r < b.rows; ++r)
        b.buffer[r * b.pitch + c] = load_one<Type>(b.data, r * b.row_stride + c * b.column_stride);
  }
}

template <class Type>
FASTEDIT_INLINE void store_generic(const Block& b) {
  auto* to = reinterpret_cast<typename Type::Storage*>(b.data);
  if (b.column_stride == 1) {
    for (int64_t r = 0; r < b.rows; ++r) {
      const float* from = b.buffer + r * b.pitch;
      for (int64_t c = 0; c < b.columns; ++c) to[r * b.row_stride + c] = Type::store(from[c]);
    }
  } else {
    for (int64_t c = 0; c < b.columns; ++c)
      for (int64_t r = 0; r < b.rows; ++r)
        to[r * b.row_stride + c * b.column_stride] = Type::store(b.buffer[r * b.pitch + c]);
  }
}

template <class Type>
void load_scalar(const Block& b) { load_generic<Type>(b); }
template <class Type>
void store_scalar(const Block& b) { store_generic<Type>(b); }

#if defined(__x86_64__)

template <class Type>
FASTEDIT_AVX2 void load_avx2(const Block& b) { load_generic<Type>(b); }
template <class Type>
FASTEDIT_AVX2 void store_avx2(const Block& b) { store_generic<Type>(b); }
template <class Type>
FASTEDIT_AVX512 void load_avx512(const Block& b) { load_generic<Type>(b); }
template <class Type>
FASTEDIT_AVX512 void store_avx512(const Block& b) { store_generic<Type>(b); }

// fp16 by the processor's own conversion, 8 at a time.
FASTEDIT_AVX2 void load_f16(const Block& b) {
  if (b.column_stride != 1) return load_generic<F16>(b);
  for (int64_t r = 0; r < b.rows; ++r) {
    const auto* from = reinterpret_cast<const uint16_t*>(b.data) + r * b.row_stride;
    float* to = b.buffer + r * b.pitch;
    int64_t c = 0;
    for (; c + 8 <= b.columns; c += 8)
      _mm256_storeu_ps(to + c, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c))));
    for (; c < b.columns; ++c) to[c] = from_f16(from[c]);
  }
}

FASTEDIT_AVX2 void store_f16(const Block& b) {
  if (b.column_stride != 1) return store_generic<F16>(b);
  for (int64_t r = 0; r < b.rows; ++r) {
    auto* to = reinterpret_cast<uint16_t*>(b.data) + r * b.row_stride;
    const float* from = b.buffer + r * b.pitch;
    int64_t c = 0;
    for (; c + 8 <= b.columns; c += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (; c < b.columns; ++c) to[c] = to_f16(from[c]);
  }
}

#endif  // __x86_64__

using Convert = void (*)(const Block& b);

template <class Type>
Convert load_as(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return load_avx512<Type>;
  if (isa == Isa::avx2) return load_avx2<Type>;
#endif
  (void)isa;
  return load_scalar<Type>;
}

template <class Type>
Convert store_as(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return store_avx512<Type>;
  if (isa == Isa::avx2) return store_avx2<Type>;
#endif
  (void)isa;
  return store_scalar<Type>;
}

Convert load_of(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (dtype == DType::f16 && isa >= Isa::avx2) return load_f16;
#endif
  switch (dtype) {
    case DType::f64: return load_as<F64>(isa);
    case DType::bf16: return load_as<BF16>(isa);
    case DType::f16: return load_as<F16>(isa);
    default: return load_as<F32>(isa);
  }
}

Convert store_of(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (dtype == DType::f16 && isa >= Isa::avx2) return store_f16;
#endif
  switch (dtype) {
    case DType::bf16: return store_as<BF16>(isa);
    case DType::f16: return store_as<F16>(isa);
    default: return store_as<F32>(isa);
  }
}

// --- Chunks of a tensor as rows of fp32 -----------------------------------------------------------------------------

int64_t row_stride(const TensorView& view) { return view.shape[0] > 1 ? view.stride[0] : view.shape[1]; }
int64_t column_stride(const TensorView& view) { return view.shape[1] > 1 ? view.stride[1] : 1; }

bool is_direct(const TensorView& view) { return view.dtype == DType::f32 && column_stride(view) == 1; }

// A tensor of which chunks are wanted: where they lie if they can be used there, otherwise converted.
class Rows {
 public:
  Rows(const TensorView* view, Isa isa, float* buffer, int64_t pitch) : view_(view), buffer_(buffer), pitch_(pitch) {
    if (!view) return;
    direct_ = is_direct(*view);
    load_ = load_of(view->dtype, isa);
    store_ = store_of(view->dtype, isa);
  }
  void fetch(int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (!view_) return;
    const int64_t first = row_stride(*view_), second = column_stride(*view_);
    block_ = {static_cast<char*>(view_->data) + (row * first + column * second) * size_of(view_->dtype),
              first, second, rows, columns, buffer_, pitch_};
    if (!direct_) load_(block_);
  }
  // Asks for the part of a row that belongs to a chunk.
  void announce(int64_t row, int64_t column, Upcoming& upcoming) const {
    if (!view_ || column_stride(*view_) != 1) return;
    const int64_t size = size_of(view_->dtype);
    upcoming.add(static_cast<const char*>(view_->data) + (row * row_stride(*view_) + column) * size, word_bits * size);
  }
  void put_back() const {
    if (!direct_) store_(block_);
  }
  float* row(int64_t r) const {
    if (!view_) return nullptr;
    return direct_ ? reinterpret_cast<float*>(block_.data) + r * block_.row_stride : buffer_ + r * pitch_;
  }

 private:
  const TensorView* view_;
  float* buffer_;
  int64_t pitch_;
  bool direct_ = false;
  Convert load_ = nullptr, store_ = nullptr;
  Block block_{};
};

// --- The call -------------------------------------------------------------------------------------------------------

// The place of entry `index` among the selected ones.
int64_t rank_of(const Mask& mask, PhiloxBits philox_bits, const int64_t* offsets, int64_t index) {
  if (mask.kind == Mask::Kind::all) return index;
  const int64_t block = index / mask_block, rest = index % mask_block;
  uint64_t bits[mask_block / word_bits + 1];
  if (rest == 0) return offsets[block];
  mask_bits(mask, philox_bits, block * mask_block, rest, bits);
  return offsets[block] + count_bits(bits, words_for(rest));
}

// What a thread works with, cut from the workspace.
struct Buffers {
  float *param, *grad, *clamp_to, *packed_w, *packed_g;
  int64_t* rank;
  uint64_t* bits;

  static size_t bytes(int64_t rows, int64_t pitch) {
    const int64_t packed = round_up(pitch + line_floats, line_floats);
    return size_t(round_up(3 * rows * pitch * 4 + 2 * packed * 4 + rows * 8 + rows * (words_for(pitch) + 2) * 8, 64));
  }
  Buffers(char* memory, int64_t rows, int64_t pitch) {
    const int64_t packed = round_up(pitch + line_floats, line_floats);
    param = reinterpret_cast<float*>(memory);
    grad = param + rows * pitch;
    clamp_to = grad + rows * pitch;
    packed_w = clamp_to + rows * pitch;
    packed_g = packed_w + packed;
    rank = reinterpret_cast<int64_t*>(packed_g + packed);
    bits = reinterpret_cast<uint64_t*>(rank + rows);
  }
};

int64_t pitch_of(int64_t columns) { return round_up(columns, line_floats) + line_floats; }

template <class Step>
void update(const MaskedPlan& plan, const TensorView& param, const TensorView& grad, const Mask& mask,
            const AdamState* state, const Step& step, const TensorView* clamp_to, char* workspace) {
  const int64_t n_rows = param.shape[0], n_columns = param.shape[1], pitch = pitch_of(plan.columns);
  const int64_t bits_pitch = words_for(pitch) + 2;
  const PhiloxBits philox_bits = philox_bits_of(plan.isa);
  const auto kernel = kernel_of(plan.isa, step);
  const int64_t across = ceil_div(n_columns, plan.task_columns), tasks = ceil_div(n_rows, plan.task_rows) * across;
#pragma omp parallel for schedule(dynamic, 1) num_threads(plan.threads)
  for (int64_t task = 0; task < tasks; ++task) {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    const Buffers buffers(workspace + thread * plan.thread_bytes, plan.rows, pitch);
    Rows weights(&param, plan.isa, buffers.param, pitch), bounds(clamp_to, plan.isa, buffers.clamp_to, pitch);
    Rows gradient(&grad, plan.isa, buffers.grad, pitch);
    const int64_t task_row = task / across * plan.task_rows, first_column = task % across * plan.task_columns;
    const int64_t last_row = std::min(n_rows, task_row + plan.task_rows);
    const int64_t last_column = std::min(n_columns, first_column + plan.task_columns);
    for (int64_t row = task_row; row < last_row; row += plan.rows) {
      const int64_t rows = std::min(plan.rows, last_row - row);
      if (state)
        for (int64_t r = 0; r < rows; ++r)
          buffers.rank[r] = rank_of(mask, philox_bits, state->offsets,
                                    mask.start + (row + r) * n_columns + first_column);
      for (int64_t column = first_column; column < last_column; column += plan.columns) {
        const int64_t columns = std::min(plan.columns, last_column - column);
        for (int64_t r = 0; r < rows; ++r) {
          Upcoming upcoming;
          for (const Rows* tensor : {&weights, &gradient, &bounds}) tensor->announce(row + r, column, upcoming);
          mask_bits(mask, philox_bits, mask.start + (row + r) * n_columns + column, columns,
                    buffers.bits + r * bits_pitch, upcoming);
        }
        weights.fetch(row, column, rows, columns);
        gradient.fetch(row, column, rows, columns);
        bounds.fetch(row, column, rows, columns);
        for (int64_t r = 0; r < rows; ++r) {
          Run run{weights.row(r), gradient.row(r), bounds.row(r), buffers.bits + r * bits_pitch, columns,
                  nullptr,        nullptr,         buffers.packed_w, buffers.packed_g};
          if (state) {
            run.first = state->first + buffers.rank[r];
            run.second = state->second + buffers.rank[r];
          }
          const int64_t count = take(kernel, run, step);
          if (state) buffers.rank[r] += count;
        }
        weights.put_back();
      }
    }
  }
}

// --- Few entries, given by index ------------------------------------------------------------------------------------

template <class Index>
int64_t index_at(const Mask& mask, int64_t i) { return static_cast<const Index*>(mask.data)[i]; }

float load_any(const TensorView& view, int64_t row, int64_t column) {
  const int64_t at = row * view.stride[0] + column * view.stride[1];
  switch (view.dtype) {
    case DType::f64: return load_one<F64>(view.data, at);
    case DType::bf16: return load_one<BF16>(view.data, at);
    case DType::f16: return load_one<F16>(view.data, at);
    default: return load_one<F32>(view.data, at);
  }
}

void store_any(const TensorView& view, int64_t row, int64_t column, float value) {
  const int64_t at = row * view.stride[0] + column * view.stride[1];
  switch (view.dtype) {
    case DType::bf16: static_cast<uint16_t*>(view.data)[at] = to_bf16(value); break;
    case DType::f16: static_cast<uint16_t*>(view.data)[at] = to_f16(value); break;
    default: static_cast<float*>(view.data)[at] = value;
  }
}

template <class Index, class Change>
void update_listed(const TensorView& param, const TensorView& grad, const Mask& mask, int threads, const Change& change) {
  const int64_t n_columns = param.shape[1];
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < mask.size; ++i) {
    const int64_t index = index_at<Index>(mask, i), row = index / n_columns, column = index % n_columns;
    store_any(param, row, column, change(i, load_any(param, row, column), load_any(grad, row, column)));
  }
}

template <class Change>
void update_listed(const TensorView& param, const TensorView& grad, const Mask& mask, int threads, const Change& change) {
  if (mask.wide)
    update_listed<int64_t>(param, grad, mask, threads, change);
  else
    update_listed<int32_t>(param, grad, mask, threads, change);
}

}  // namespace

MaskedPlan plan_masked_update(const TensorView& param, const TensorView& grad, const TensorView* clamp_to, Isa isa,
                              int threads) {
  const int64_t n_rows = std::max<int64_t>(param.shape[0], 1), n_columns = std::max<int64_t>(param.shape[1], 1);
  if (n_rows * n_columns * 16 < small_work) threads = 1;
  MaskedPlan plan{isa, threads, 1, run_length, 1, n_columns, 0, 0};
  if (column_stride(param) == 1 && column_stride(grad) == 1 && (!clamp_to || column_stride(*clamp_to) == 1)) {
    plan.task_columns = std::min(n_columns, task_entries);
    plan.task_rows = std::max<int64_t>(1, task_entries / n_columns);
  } else {
    plan.rows = plan.task_rows = turned_rows;
    plan.columns = turned_columns;
  }
  plan.rows = std::min(plan.rows, n_rows);
  plan.columns = std::min(plan.columns, n_columns);
  plan.thread_bytes = Buffers::bytes(plan.rows, pitch_of(plan.columns));
  plan.workspace_bytes = size_t(threads) * plan.thread_bytes;
  return plan;
}

void masked_sgd(const MaskedPlan& plan, const TensorView& param, const TensorView& grad, const Mask& mask,
                const SgdStep& step, const TensorView* clamp_to, void* workspace) {
  if (param.numel() == 0) return;
  if (mask.kind != Mask::Kind::indices)
    return update(plan, param, grad, mask, nullptr, step, clamp_to, static_cast<char*>(workspace));
  update_listed(param, grad, mask, plan.threads, [&](int64_t, float w, float g) {
    return w - step.lr * (step.scope == DecayScope::none ? g : g + step.decay * w);
  });
}

void masked_adam(const MaskedPlan& plan, const TensorView& param, const TensorView& grad, const Mask& mask,
                 const AdamState& state, const AdamStep& step, const TensorView* clamp_to, void* workspace) {
  if (param.numel() == 0) return;
  if (mask.kind != Mask::Kind::indices)
    return update(plan, param, grad, mask, &state, step, clamp_to, static_cast<char*>(workspace));
  update_listed(param, grad, mask, plan.threads, [&](int64_t i, float w, float g) {
    adam_one(step, w, g, state.first[i], state.second[i]);
    return w;
  });
}

bool fits(const Mask& mask, const int64_t* offsets, int64_t n, int64_t count, Isa isa) {
  const int64_t blocks = ceil_div(n, mask_block);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t next = b + 1 < blocks ? offsets[b + 1] : count;
    if (offsets[b] < 0 || next < offsets[b] || next - offsets[b] > mask_block) return false;
  }
  if (blocks == 0) return true;
  uint64_t bits[mask_block / word_bits + 1];
  const int64_t last = (blocks - 1) * mask_block;
  mask_bits(mask, philox_bits_of(isa), last, n - last, bits);
  return offsets[blocks - 1] + count_bits(bits, words_for(n - last)) == count;
}

void philox_bits(const TensorView& bits, const Mask& mask, int64_t start, Isa isa, int threads) {
  constexpr int64_t step = mask_block;  // entries at a time
  const int64_t n = bits.numel() * 8;
  const PhiloxBits philox_bits = philox_bits_of(isa);
  if (n < small_work) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; i += step) {
    uint64_t words[step / word_bits + 1];
    mask_bits(mask, philox_bits, start + i, std::min(step, n - i), words);
    std::memcpy(static_cast<uint8_t*>(bits.data) + i / 8, words, size_t(std::min(step, n - i) / 8));
  }
}

}  // namespace fastedit::cpu
