// Selection of the fewest neurons that hold a share of the activation mass, on a CPU.
//
// A row is never sorted. What is looked for is the score at which the sum of larger ones reaches the wanted mass:
//
//   1. scan       the largest score, whether all are valid           reads the row
//   2. bracket    bounds of the wanted score, guessed from a sample
//   3. partition  exact sums above and within the bounds; what is    reads the row, writes some 10 % of it
//                 within is packed (a wrong guess costs another pass)
//   4. bisect     on the bit patterns of what is left, which halves
//   5. emit       mask and indices                                   reads the row, writes the results
//
// Sums are sums of integers (grid_bits in the header): exact, so neither the bounds nor the instruction set nor the
// number of threads can change the result. A row of 14,336 floats stays in the second-level cache throughout.
//
// neuron_scores reads the keys once and keeps a block of sums in the first-level cache. gather_square reads each
// selected row once; where most of the row is selected in ascending order it is packed by mask, not element by element.

#include "../neuron_select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr int64_t padding = 16;  // packing writes whole vectors: elements past the end of a buffer

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// --- Reading rows as float or double ---------------------------------------------------------------------------------

template <class Type, class Real>
FASTEDIT_INLINE void read_values(const void* data, int64_t stride, int64_t n, Real* out) {
  const auto* from = static_cast<const typename Type::Storage*>(data);
  auto value = [](typename Type::Storage v) {
    if constexpr (std::is_same_v<Type, F64>)
      return v;
    else
      return Type::load(v);
  };
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = value(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = value(from[i * stride]);
}

template <class Type, class Real>
void read_scalar(const void* data, int64_t stride, int64_t n, Real* out) {
  read_values<Type, Real>(data, stride, n, out);
}

#if defined(__x86_64__)
template <class Type, class Real>
FASTEDIT_AVX2 void read_avx2(const void* data, int64_t stride, int64_t n, Real* out) {
  int64_t done = 0;
  if constexpr (std::is_same_v<Type, F16>)
    if (stride == 1)
      for (; done + 8 <= n; done += 8) {
        const auto* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + done);
        _mm256_storeu_ps(out + done, _mm256_cvtph_ps(_mm_loadu_si128(from)));
      }
  const auto* rest = static_cast<const typename Type::Storage*>(data) + done * stride;
  read_values<Type, Real>(rest, stride, n - done, out + done);
}
#endif

template <class Real>
using Read = void (*)(const void* data, int64_t stride, int64_t n, Real* out);

template <class Real>
Read<Real> read_of(DType dtype, Isa isa) {
  if constexpr (sizeof(Real) == 8) {
    return read_scalar<F64, double>;
  } else {
#if defined(__x86_64__)
    if (isa >= Isa::avx2)
      return dtype == DType::bf16 ? read_avx2<BF16, float> : dtype == DType::f16 ? read_avx2<F16, float> : read_avx2<F32, float>;
#endif
    (void)isa;
    return dtype == DType::bf16 ? read_scalar<BF16, float> : dtype == DType::f16 ? read_scalar<F16, float> : read_scalar<F32, float>;
  }
}

// --- Scores as integers ----------------------------------------------------------------------------------------------

template <class Real>
struct Pattern;
template <>
struct Pattern<float> {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Pattern<double> {
  using Bits = uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
};

// Of scores that are not negative, bit patterns have the order of the values.
template <class Real>
typename Pattern<Real>::Bits pattern_of(Real value) {
  typename Pattern<Real>::Bits bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <class Real>
Real value_of(typename Pattern<Real>::Bits bits) {
  Real value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Grid steps in a score: int64(score * first * second). Two factors, because one may exceed the range of double.
struct Grid {
  double first, second;
};

template <class Real>
Grid grid_of(Real largest, int64_t n) {
  using P = Pattern<Real>;
  const int field = std::max(int(pattern_of(largest) >> P::mantissa), 1);
  const int exponent = grid_bits(n) - (field - P::bias + 1);
  if (sizeof(Real) == 4) return {std::ldexp(1.0, exponent), 1.0};
  return {std::ldexp(1.0, exponent / 2), std::ldexp(1.0, exponent - exponent / 2)};
}

template <class Real>
FASTEDIT_INLINE int64_t steps_in(Real value, Grid grid) {
  if constexpr (sizeof(Real) == 4) return int64_t(double(value) * grid.first);
  return int64_t(value * grid.first * grid.second);
}

// The largest sum that does not yet decide: the wanted score is the largest one where the sum of all scores not below
// it exceeds this.
int64_t limit_of(int64_t total, double mass, SelectRule rule) {
  if (mass >= 1.0) return std::numeric_limits<int64_t>::max();
  const double target = mass * double(total);
  const int64_t whole = int64_t(target);
  return rule == SelectRule::at_least && double(whole) == target ? whole - 1 : whole;
}

// --- The passes over a row, in plain code ----------------------------------------------------------------------------
//
// Comparisons become numbers, not branches: which way they go is random.

template <class Real>
struct Summary {
  Real largest;
  bool valid;  // every score is finite and not negative
};

struct Sums {
  int64_t total, above, within;
  int64_t n_kept;
};

struct Split {
  int64_t sum;      // of the values not below the pivot
  int64_t n_upper;  // how many there are
};

template <class Real>
FASTEDIT_INLINE Summary<Real> scan_generic(const Real* row, int64_t n) {
  Real largest = 0;
  int valid = 1;
  for (int64_t i = 0; i < n; ++i) {
    valid &= int(row[i] >= 0) & int(row[i] < std::numeric_limits<Real>::infinity());
    largest = row[i] > largest ? row[i] : largest;
  }
  return {largest, valid != 0};
}

// Sums of all values, of those above `high`, and of those in [low, high], which are packed into `kept`.
template <class Real>
FASTEDIT_INLINE Sums partition_generic(const Real* row, int64_t n, Real low, Real high, Grid grid, Real* kept) {
  Sums sums{};
  for (int64_t i = 0; i < n; ++i) {
    const Real value = row[i];
    const int64_t steps = steps_in(value, grid);
    const int64_t above = value > high, within = int64_t(value >= low) & ~above;
    sums.total += steps;
    sums.above += steps & -above;
    sums.within += steps & -within;
    kept[sums.n_kept] = value;
    sums.n_kept += within;
  }
  return sums;
}

// Packs the values not below the pivot in place, the others into `lower`.
template <class Real>
FASTEDIT_INLINE Split split_generic(Real* values, int64_t n, Real pivot, Grid grid, Real* lower) {
  Split split{};
  for (int64_t i = 0; i < n; ++i) {
    const Real value = values[i];
    const int64_t upper = value >= pivot;
    split.sum += steps_in(value, grid) & -upper;
    lower[i - split.n_upper] = value;
    values[split.n_upper] = value;
    split.n_upper += upper;
  }
  return split;
}

// Selects what is above `threshold` and the first `n_ties` that are equal to it. Continues at element `start`, with
// `count` indices written before it.
template <class Real>
FASTEDIT_INLINE int64_t emit_generic(const Real* row, int64_t start, int64_t n, Real threshold, int64_t n_ties,
                                     int64_t count, uint8_t* mask, int32_t* indices) {
  for (int64_t i = start; i < n; ++i) {
    const int64_t tie = int64_t(row[i] == threshold) & int64_t(n_ties > 0);
    const int64_t selected = int64_t(row[i] > threshold) | tie;
    n_ties -= tie;
    mask[i] = uint8_t(selected);
    indices[count] = int32_t(i);  // overwritten unless selected: count <= i
    count += selected;
  }
  std::fill(indices + count, indices + n, -1);
  return count;
}

template <class Real_>
struct ScalarPasses {
  using Real = Real_;
  static Summary<Real> scan(const Real* row, int64_t n) { return scan_generic(row, n); }
  static Sums partition(const Real* row, int64_t n, Real low, Real high, Grid grid, Real* kept) {
    return partition_generic(row, n, low, high, grid, kept);
  }
  static Split split(Real* values, int64_t n, Real pivot, Grid grid, Real* lower) {
    return split_generic(values, n, pivot, grid, lower);
  }
  static int64_t emit(const Real* row, int64_t n, Real threshold, int64_t n_ties, uint8_t* mask, int32_t* indices) {
    return emit_generic(row, 0, n, threshold, n_ties, 0, mask, indices);
  }
};

#if defined(__x86_64__)

template <class Real_>
struct Avx2Passes {
  using Real = Real_;
  FASTEDIT_AVX2 static Summary<Real> scan(const Real* row, int64_t n) { return scan_generic(row, n); }
  FASTEDIT_AVX2 static Sums partition(const Real* row, int64_t n, Real low, Real high, Grid grid, Real* kept) {
    return partition_generic(row, n, low, high, grid, kept);
  }
  FASTEDIT_AVX2 static Split split(Real* values, int64_t n, Real pivot, Grid grid, Real* lower) {
    return split_generic(values, n, pivot, grid, lower);
  }
  FASTEDIT_AVX2 static int64_t emit(const Real* row, int64_t n, Real threshold, int64_t n_ties, uint8_t* mask,
                                    int32_t* indices) {
    return emit_generic(row, 0, n, threshold, n_ties, 0, mask, indices);
  }
};

// --- The passes with AVX-512 -----------------------------------------------------------------------------------------

// A vector of scores; lanes of a comparison as bits.
template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = __m512;
  static constexpr int n = 16;
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector load_first(const float* p, uint32_t valid) {
    return _mm512_maskz_loadu_ps(__mmask16(valid), p);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector broadcast(float v) { return _mm512_set1_ps(v); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static float largest(Vector v) { return _mm512_reduce_max_ps(v); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t above(Vector a, Vector b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t not_below(Vector a, Vector b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t below(Vector a, Vector b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t equal(Vector a, Vector b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void pack(float* to, Vector v, uint32_t lanes) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(lanes), v));
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void pack_indices(int32_t* to, int64_t first, uint32_t lanes) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(first)));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(lanes), index));
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void store_flags(uint8_t* to, uint32_t lanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(__mmask16(lanes), 1));
  }

  // Grid steps, eight to a vector.
  struct Steps {
    __m512i low, high;
  };
  FASTEDIT_AVX512 FASTEDIT_INLINE static Steps steps(Vector v, Grid grid) {
    const __m512d scale = _mm512_set1_pd(grid.first);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return {_mm512_cvttpd_epi64(_mm512_mul_pd(low, scale)), _mm512_cvttpd_epi64(_mm512_mul_pd(high, scale))};
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static __m512i add(__m512i sum, Steps steps, uint32_t lanes) {
    sum = _mm512_mask_add_epi64(sum, __mmask8(lanes), sum, steps.low);
    return _mm512_mask_add_epi64(sum, __mmask8(lanes >> 8), sum, steps.high);
  }
};

template <>
struct Lanes<double> {
  using Vector = __m512d;
  static constexpr int n = 8;
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector load_first(const double* p, uint32_t valid) {
    return _mm512_maskz_loadu_pd(__mmask8(valid), p);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector broadcast(double v) { return _mm512_set1_pd(v); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static Vector larger(Vector a, Vector b) { return _mm512_max_pd(a, b); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static double largest(Vector v) { return _mm512_reduce_max_pd(v); }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t above(Vector a, Vector b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t not_below(Vector a, Vector b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t below(Vector a, Vector b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static uint32_t equal(Vector a, Vector b) {
    return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void pack(double* to, Vector v, uint32_t lanes) {
    _mm512_storeu_pd(to, _mm512_maskz_compress_pd(__mmask8(lanes), v));
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void pack_indices(int32_t* to, int64_t first, uint32_t lanes) {
    const __m256i index = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(int32_t(first)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_compress_epi32(__mmask8(lanes), index));
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static void store_flags(uint8_t* to, uint32_t lanes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_maskz_set1_epi8(__mmask16(lanes), 1));
  }
  using Steps = __m512i;
  FASTEDIT_AVX512 FASTEDIT_INLINE static Steps steps(Vector v, Grid grid) {
    const __m512d scaled = _mm512_mul_pd(_mm512_mul_pd(v, _mm512_set1_pd(grid.first)), _mm512_set1_pd(grid.second));
    return _mm512_cvttpd_epi64(scaled);
  }
  FASTEDIT_AVX512 FASTEDIT_INLINE static __m512i add(__m512i sum, Steps steps, uint32_t lanes) {
    return _mm512_mask_add_epi64(sum, __mmask8(lanes), sum, steps);
  }
};

// Calls step(first element, values, valid lanes) for every vector of a row, the last one filled up with zeros.
template <class Real, class Step>
FASTEDIT_AVX512 FASTEDIT_INLINE void for_each_vector(const Real* row, int64_t n, const Step& step) {
  using L = Lanes<Real>;
  constexpr uint32_t all = (1u << L::n) - 1;
  int64_t i = 0;
  for (; i + L::n <= n; i += L::n) step(i, L::load(row + i), all);
  if (i < n) {
    const uint32_t valid = all >> (L::n - (n - i));
    step(i, L::load_first(row + i, valid), valid);
  }
}

template <class Real_>
struct Avx512Passes {
  using Real = Real_;
  using L = Lanes<Real>;
  using Vector = typename L::Vector;

  FASTEDIT_AVX512 static Summary<Real> scan(const Real* row, int64_t n) {
    const Vector zero = L::broadcast(0), infinity = L::broadcast(std::numeric_limits<Real>::infinity());
    Vector largest = zero;
    uint32_t invalid = 0;
    int64_t i = 0;
    for (; i + L::n <= n; i += L::n) {
      const Vector v = L::load(row + i);
      largest = L::larger(v, largest);  // NaN in v: gives `largest`
      invalid |= L::below(v, zero) | ~L::below(v, infinity);
    }
    constexpr uint32_t all = (1u << L::n) - 1;
    const Summary<Real> rest = scan_generic(row + i, n - i);
    return {std::max(L::largest(largest), rest.largest), (invalid & all) == 0 && rest.valid};
  }

  FASTEDIT_AVX512 static Sums partition(const Real* row, int64_t n, Real low, Real high, Grid grid, Real* kept) {
    const Vector from = L::broadcast(low), to = L::broadcast(high);
    __m512i total = _mm512_setzero_si512(), above = total, within = total;
    int64_t n_kept = 0, i = 0;
    for (; i + L::n <= n; i += L::n) {
      const Vector v = L::load(row + i);
      const uint32_t over = L::above(v, to), inside = L::not_below(v, from) & ~over;
      const auto steps = L::steps(v, grid);
      total = L::add(total, steps, ~0u);
      above = L::add(above, steps, over);
      within = L::add(within, steps, inside);
      L::pack(kept + n_kept, v, inside);
      n_kept += __builtin_popcount(inside);
    }
    const Sums rest = partition_generic(row + i, n - i, low, high, grid, kept + n_kept);
    return {_mm512_reduce_add_epi64(total) + rest.total, _mm512_reduce_add_epi64(above) + rest.above,
            _mm512_reduce_add_epi64(within) + rest.within, n_kept + rest.n_kept};
  }

  FASTEDIT_AVX512 static Split split(Real* values, int64_t n, Real pivot, Grid grid, Real* lower) {
    const Vector from = L::broadcast(pivot);
    __m512i sum = _mm512_setzero_si512();
    int64_t n_upper = 0;
    constexpr uint32_t all = (1u << L::n) - 1;
    for (int64_t i = 0; i < n; i += L::n) {
      const uint32_t valid = all >> std::max<int64_t>(0, L::n - (n - i));
      const Vector v = L::load_first(values + i, valid);
      const uint32_t upper = L::not_below(v, from) & valid;
      sum = L::add(sum, L::steps(v, grid), upper);
      L::pack(lower + i - n_upper, v, valid & ~upper);
      L::pack(values + n_upper, v, upper);  // writes behind what was read
      n_upper += __builtin_popcount(upper);
    }
    return {_mm512_reduce_add_epi64(sum), n_upper};
  }

  FASTEDIT_AVX512 static int64_t emit(const Real* row, int64_t n, Real threshold, int64_t n_ties, uint8_t* mask,
                                      int32_t* indices) {
    const Vector at = L::broadcast(threshold);
    int64_t count = 0, i = 0;
    for (; i + L::n <= n; i += L::n) {
      const Vector v = L::load(row + i);
      uint32_t selected = L::above(v, at);
      for (uint32_t ties = L::equal(v, at); ties != 0 && n_ties > 0; --n_ties) {
        selected |= ties & -ties;
        ties &= ties - 1;
      }
      L::store_flags(mask + i, selected);
      L::pack_indices(indices + count, i, selected);
      count += __builtin_popcount(selected);
    }
    return emit_generic(row, i, n, threshold, n_ties, count, mask, indices);
  }
};

#endif  // __x86_64__

// --- One row ---------------------------------------------------------------------------------------------------------

template <class Real>
struct Bracket {
  Real low, high;
};

// Bounds between which the wanted score probably lies: the mass by score of a sample, two or three standard deviations
// to either side. The sample is runs of 16, evenly spaced; which they are cannot change the result.
template <class Real>
Bracket<Real> guess(const Real* row, int64_t n, Real largest, double mass) {
  using P = Pattern<Real>;
  using Bits = typename P::Bits;
  constexpr int64_t runs = 64, run = 16, per_binade = 16, n_bins = 512;
  if (n < 4 * runs * run || mass >= 1.0) return {Real(0), largest};
  constexpr int shift = P::mantissa - 4;  // a bin holds the values that agree in all bits above
  const Bits top = pattern_of(largest) >> shift;
  const Real scale = 1 / std::max(largest, std::numeric_limits<Real>::min());
  Real bins[n_bins] = {}, lane_sum[run] = {}, lane_squares[run] = {};
  for (int64_t r = 0; r < runs; ++r) {
    const Real* from = row + (n - run) * r / (runs - 1);
    Real share[run];
    Bits bin[run];
    for (int64_t i = 0; i < run; ++i) {
      share[i] = from[i] * scale;
      bin[i] = std::min(top - (pattern_of(from[i] + Real(0)) >> shift), Bits(n_bins - 1));  // + 0: a negative zero
      lane_sum[i] += share[i];
      lane_squares[i] += share[i] * share[i];
    }
    for (int64_t i = 0; i < run; ++i) bins[bin[i]] += share[i];
  }
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < run; ++i) sum += lane_sum[i], squares += lane_squares[i];
  static_assert(per_binade == 1 << (P::mantissa - shift));
  if (sum == 0) return {Real(0), largest};
  const double margin = 0.6 * std::sqrt(squares);  // the sum over the root of the effective number of scores in it
  int64_t first = 0, last = 0;
  double before = 0;
  for (; first < n_bins - 1 && before + bins[first] < mass * sum - margin; ++first) before += bins[first];
  for (last = first; last < n_bins - 1 && before < mass * sum + margin; ++last) before += bins[last];
  Bracket<Real> bounds{Real(0), largest};
  if (first > 0) bounds.high = value_of<Real>(((top - first + 1) << shift) - 1);
  if (last < n_bins - 1 && int64_t(top) >= last) bounds.low = value_of<Real>((top - last + 1) << shift);
  return bounds;
}

template <class Real>
struct Threshold {
  Real value;
  int64_t n_ties;
};

// The wanted score and how many equal to it belong to the set. `kept` and `other` hold n scores each, and padding.
template <class Passes, class Real = typename Passes::Real>
Threshold<Real> find_threshold(const Real* row, int64_t n, Real largest, double mass, SelectRule rule, Real* kept,
                               Real* other) {
  using Bits = typename Pattern<Real>::Bits;
  const Threshold<Real> everything{Real(0), n};
  if (mass >= 1.0) return everything;
  if (largest == 0) return {Real(0), rule == SelectRule::prefix ? n : 1};
  const Grid grid = grid_of(largest, n);
  Bracket<Real> bounds = guess(row, n, largest, mass);
  Sums sums = Passes::partition(row, n, bounds.low, bounds.high, grid, kept);
  const int64_t limit = limit_of(sums.total, mass, rule);
  if (sums.total <= limit) return everything;  // mass is so near to 1 that their product rounds up
  if (sums.above > limit || sums.above + sums.within <= limit) {
    if (sums.above > limit)
      bounds = {value_of<Real>(pattern_of(bounds.high) + 1), largest};
    else
      bounds = {Real(0), value_of<Real>(pattern_of(bounds.low) - 1)};
    sums = Passes::partition(row, n, bounds.low, bounds.high, grid, kept);
  }
  Bits low = pattern_of(bounds.low), high = pattern_of(bounds.high);
  int64_t above = sums.above, n_kept = sums.n_kept;
  while (low < high && n_kept > 1) {
    const Bits middle = low + (high - low + 1) / 2;
    const Split split = Passes::split(kept, n_kept, value_of<Real>(middle), grid, other);
    if (above + split.sum > limit) {
      n_kept = split.n_upper;
      low = middle;
    } else {
      above += split.sum;
      n_kept -= split.n_upper;
      high = middle - 1;
      std::swap(kept, other);
    }
  }
  const Real value = kept[0];
  const int64_t that_fit = (limit - above) / steps_in(value, grid);
  if (rule == SelectRule::at_least) return {value, that_fit + 1};
  const bool none = above == 0 && that_fit == 0;  // the largest score alone is too much: the set is never empty
  return {value, none ? 1 : that_fit};
}

template <class Passes, class Real = typename Passes::Real>
int64_t select_row(const Real* row, int64_t n, double mass, SelectRule rule, Real* kept, Real* other, uint8_t* mask,
                   int32_t* indices) {
  const Summary<Real> summary = Passes::scan(row, n);
  if (!summary.valid) {
    std::fill(mask, mask + n, uint8_t(0));
    std::fill(indices, indices + n, -1);
    return 0;
  }
  const Threshold<Real> threshold = find_threshold<Passes>(row, n, summary.largest, mass, rule, kept, other);
  return Passes::emit(row, n, threshold.value, threshold.n_ties, mask, indices);
}

template <class Real>
using SelectRow = int64_t (*)(const Real* row, int64_t n, double mass, SelectRule rule, Real* kept, Real* other,
                              uint8_t* mask, int32_t* indices);

template <class Real>
SelectRow<Real> select_row_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return select_row<Avx512Passes<Real>>;
  if (isa == Isa::avx2) return select_row<Avx2Passes<Real>>;
#endif
  (void)isa;
  return select_row<ScalarPasses<Real>>;
}

// --- All rows --------------------------------------------------------------------------------------------------------

// Elements of each of a thread's three buffers: the row as Real, unless it can be read in place, and two for packing.
int64_t buffer_elements(int64_t d) { return round_up(d + padding, 16); }

template <class Real>
void select_rows(const NeuronSelectPlan& plan, const TensorView& scores, double mass, SelectRule rule,
                 const TensorView& mask, const TensorView& indices, const TensorView& counts, Real* buffers) {
  const int64_t n_rows = scores.shape[0], d = scores.shape[1], elements = buffer_elements(d);
  const int64_t row_bytes = scores.stride[0] * size_of(scores.dtype);
  const bool in_place = size_of(scores.dtype) == int64_t(sizeof(Real)) && (scores.stride[1] == 1 || d == 1);
  const Read<Real> read = read_of<Real>(scores.dtype, plan.isa);
  const SelectRow<Real> select = select_row_of<Real>(plan.isa);
#pragma omp parallel for schedule(static) num_threads(plan.threads) if (plan.threads > 1)
  for (int64_t b = 0; b < n_rows; ++b) {
    Real* const kept = buffers + thread_number() * 3 * elements;
    const void* data = static_cast<const char*>(scores.data) + b * row_bytes;
    const Real* row = static_cast<const Real*>(data);
    if (!in_place) {
      read(data, scores.stride[1], d, kept + 2 * elements);
      row = kept + 2 * elements;
    }
    static_cast<int32_t*>(counts.data)[b] =
        int32_t(select(row, d, mass, rule, kept, kept + elements, static_cast<uint8_t*>(mask.data) + b * d,
                       static_cast<int32_t*>(indices.data) + b * d));
  }
}

// --- Scores ----------------------------------------------------------------------------------------------------------

constexpr int64_t score_block = 2048;  // neurons whose sums stay in the first-level cache

// sums[i] += |values of neuron i|, for n neurons and one key after the other. Values of a key are adjacent, keys
// `pitch` apart.
template <class Real>
FASTEDIT_INLINE void add_generic(const Real* values, int64_t pitch, int64_t n_keys, int64_t n, double* sums) {
  int64_t j = 0;
  for (; j + 4 <= n_keys; j += 4) {
    const Real *a = values + j * pitch, *b = a + pitch, *c = b + pitch, *d = c + pitch;
    for (int64_t i = 0; i < n; ++i) {
      double sum = sums[i] + std::fabs(double(a[i]));
      sum += std::fabs(double(b[i]));
      sum += std::fabs(double(c[i]));
      sums[i] = sum + std::fabs(double(d[i]));
    }
  }
  for (; j < n_keys; ++j)
    for (int64_t i = 0; i < n; ++i) sums[i] += std::fabs(double(values[j * pitch + i]));
}

template <class Real>
void add_scalar(const Real* values, int64_t pitch, int64_t n_keys, int64_t n, double* sums) {
  add_generic(values, pitch, n_keys, n, sums);
}

#if defined(__x86_64__)
template <class Real>
FASTEDIT_AVX2 void add_avx2(const Real* values, int64_t pitch, int64_t n_keys, int64_t n, double* sums) {
  add_generic(values, pitch, n_keys, n, sums);
}
template <class Real>
FASTEDIT_AVX512 void add_avx512(const Real* values, int64_t pitch, int64_t n_keys, int64_t n, double* sums) {
  add_generic(values, pitch, n_keys, n, sums);
}
#endif

template <class Real>
using Add = void (*)(const Real* values, int64_t pitch, int64_t n_keys, int64_t n, double* sums);

template <class Real>
Add<Real> add_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return add_avx512<Real>;
  if (isa == Isa::avx2) return add_avx2<Real>;
#endif
  (void)isa;
  return add_scalar<Real>;
}

constexpr int64_t side = 32;  // of the square of keys that is turned at a time

// to[j][i] = from[i * pitch + j]. A float32 square is turned in pieces of 4 by 4.
template <class Real>
FASTEDIT_INLINE void turn(const Real* from, int64_t pitch, Real (&to)[side][side]) {
#if defined(__x86_64__)
  if constexpr (sizeof(Real) == 4) {
    for (int64_t i = 0; i < side; i += 4)
      for (int64_t j = 0; j < side; j += 4) {
        const float* at = from + i * pitch + j;
        __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + pitch);
        __m128 c = _mm_loadu_ps(at + 2 * pitch), d = _mm_loadu_ps(at + 3 * pitch);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(&to[j][i], a);
        _mm_storeu_ps(&to[j + 1][i], b);
        _mm_storeu_ps(&to[j + 2][i], c);
        _mm_storeu_ps(&to[j + 3][i], d);
      }
    return;
  }
#endif
  for (int64_t j = 0; j < side; ++j)
    for (int64_t i = 0; i < side; ++i) to[j][i] = from[i * pitch + j];
}

// Sums of the neurons [start, start + n), n <= score_block.
template <class Real>
void score_neurons(const TensorView& keys, int64_t start, int64_t n, Read<Real> read, Add<Real> add, double* sums) {
  const int64_t n_keys = keys.shape[1], size = size_of(keys.dtype);
  const char* data = static_cast<const char*>(keys.data) + start * keys.stride[0] * size;
  std::fill(sums, sums + n, 0.0);
  if (keys.stride[0] == 1 || n == 1) {
    if (size == int64_t(sizeof(Real))) {
      add(reinterpret_cast<const Real*>(data), keys.stride[1], n_keys, n, sums);
      return;
    }
    Real values[4][score_block];
    for (int64_t j = 0; j < n_keys; j += 4) {
      const int64_t nj = std::min<int64_t>(4, n_keys - j);
      for (int64_t k = 0; k < nj; ++k) read(data + (j + k) * keys.stride[1] * size, 1, n, values[k]);
      add(values[0], score_block, nj, n, sums);
    }
    return;
  }
  const bool in_place = keys.stride[1] == 1 && size == int64_t(sizeof(Real));
  Real square[side][side] = {}, turned[side][side];
  for (int64_t i0 = 0; i0 < n; i0 += side)
    for (int64_t j0 = 0; j0 < n_keys; j0 += side) {
      const int64_t ni = std::min(side, n - i0), nj = std::min(side, n_keys - j0);
      const char* corner = data + (i0 * keys.stride[0] + j0 * keys.stride[1]) * size;
      if (in_place && ni == side && nj == side) {
        turn(reinterpret_cast<const Real*>(corner), keys.stride[0], turned);
      } else {
        for (int64_t i = 0; i < ni; ++i) read(corner + i * keys.stride[0] * size, keys.stride[1], nj, square[i]);
        turn(square[0], side, turned);
      }
      add(turned[0], side, nj, ni, sums + i0);
    }
}

template <class Real>
void score_all(const TensorView& keys, const TensorView& out, Isa isa, int threads) {
  const int64_t d = keys.shape[0];
  if (d == 0) return;
  if (keys.numel() < small_work / 4) threads = 1;
  const int64_t block = std::min(score_block, round_up(ceil_div(d, threads), 64));
  const Read<Real> read = read_of<Real>(keys.dtype, isa);
  const Add<Real> add = add_of<Real>(isa);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t start = 0; start < d; start += block)
    score_neurons(keys, start, std::min(block, d - start), read, add, static_cast<double*>(out.data) + start);
}

// --- Square of a matrix ----------------------------------------------------------------------------------------------

// What columns to take: their indices, and if these ascend and are many, also as bits of all columns.
struct Columns {
  const int32_t* indices;
  int64_t n;
  const uint64_t* bits;  // null: use the indices
  int64_t n_words;
};

template <class Word>
FASTEDIT_INLINE void gather_generic(const Word* row, int64_t stride, const Columns& columns, Word* out) {
  if (stride == 1)
    for (int64_t c = 0; c < columns.n; ++c) out[c] = row[columns.indices[c]];
  else
    for (int64_t c = 0; c < columns.n; ++c) out[c] = row[columns.indices[c] * stride];
}

template <class Word>
void gather_scalar(const Word* row, int64_t, int64_t stride, const Columns& columns, Word* out) {
  gather_generic(row, stride, columns, out);
}

#if defined(__x86_64__)

FASTEDIT_AVX512 FASTEDIT_INLINE void pack_16(const uint16_t* from, uint32_t lanes, uint16_t* to) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i packed = _mm512_maskz_compress_epi32(__mmask16(lanes), wide);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(packed));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void pack_16(const uint32_t* from, uint32_t lanes, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(lanes), _mm512_loadu_si512(from)));
}

FASTEDIT_AVX512 FASTEDIT_INLINE void pack_16(const uint64_t* from, uint32_t lanes, uint64_t* to) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(__mmask8(lanes), _mm512_loadu_si512(from)));
  to += __builtin_popcount(lanes & 0xFF);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi64(__mmask8(lanes >> 8), _mm512_loadu_si512(from + 8)));
}

// Packs the row by bits while whole vectors can be read and written inside row and output; the rest by index.
template <class Word>
FASTEDIT_AVX512 void gather_avx512(const Word* row, int64_t d, int64_t stride, const Columns& columns, Word* out) {
  int64_t count = 0;
  if (columns.bits != nullptr && stride == 1)
    for (int64_t w = 0; w < columns.n_words; ++w) {
      const uint64_t word = columns.bits[w];
      const int64_t next = count + __builtin_popcountll(word);
      if (w * 64 + 64 > d || next + 16 > columns.n) break;
      for (int part = 0; part < 4; ++part) {
        const uint32_t lanes = uint32_t(word >> (16 * part)) & 0xFFFF;
        pack_16(row + w * 64 + part * 16, lanes, out + count);
        count += __builtin_popcount(lanes);
      }
    }
  gather_generic(row, stride, Columns{columns.indices + count, columns.n - count, nullptr, 0}, out + count);
}

#endif  // __x86_64__

template <class Word>
using GatherRow = void (*)(const Word* row, int64_t d, int64_t stride, const Columns& columns, Word* out);

template <class Word>
GatherRow<Word> gather_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return gather_avx512<Word>;
#endif
  (void)isa;
  return gather_scalar<Word>;
}

template <class Word>
void gather_rows(const TensorView& matrix, const Columns& columns, const TensorView& out, Isa isa, int threads) {
  const int64_t d = matrix.shape[0], n = columns.n;
  const GatherRow<Word> gather = gather_of<Word>(isa);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r)
    gather(static_cast<const Word*>(matrix.data) + columns.indices[r] * matrix.stride[0], d, matrix.stride[1], columns,
           static_cast<Word*>(out.data) + r * n);
}

template <class Index>
bool read_indices(const TensorView& view, int64_t d, int32_t* out) {
  const auto* from = static_cast<const Index*>(view.data);
  bool inside = true;
  for (int64_t i = 0; i < view.shape[0]; ++i) {
    const int64_t index = from[i * view.stride[0]];
    inside &= index >= 0 && index < d;
    out[i] = int32_t(index);
  }
  return inside;
}

bool ascending(const int32_t* indices, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (indices[i] <= indices[i - 1]) return false;
  return true;
}

}  // namespace

NeuronSelectPlan plan_neuron_select(const TensorView& scores, Isa isa, int threads) {
  const int64_t n_rows = scores.shape[0], d = scores.shape[1];
  if (n_rows * d < small_work / 8) threads = 1;
  threads = int(std::clamp<int64_t>(n_rows, 1, threads));
  const int64_t real = scores.dtype == DType::f64 ? 8 : 4;
  return {isa, threads, size_t(threads * 3 * buffer_elements(d) * real)};
}

void neuron_select(const NeuronSelectPlan& plan, const TensorView& scores, double mass, SelectRule rule,
                   const TensorView& mask, const TensorView& indices, const TensorView& counts, void* workspace) {
  if (scores.shape[1] == 0) {
    std::fill_n(static_cast<int32_t*>(counts.data), scores.shape[0], 0);
    return;
  }
  if (scores.dtype == DType::f64)
    select_rows(plan, scores, mass, rule, mask, indices, counts, static_cast<double*>(workspace));
  else
    select_rows(plan, scores, mass, rule, mask, indices, counts, static_cast<float*>(workspace));
}

void neuron_scores(const TensorView& keys, const TensorView& out, Isa isa, int threads) {
  if (keys.dtype == DType::f64)
    score_all<double>(keys, out, isa, threads);
  else
    score_all<float>(keys, out, isa, threads);
}

size_t gather_square_workspace(const TensorView& matrix, const TensorView& indices) {
  return size_t(ceil_div(matrix.shape[0], 64) * 8 + indices.shape[0] * 4);
}

bool gather_square(const TensorView& matrix, const TensorView& indices, const TensorView& out, Isa isa, int threads,
                   void* workspace) {
  const int64_t d = matrix.shape[0], n = indices.shape[0], n_words = ceil_div(d, 64);
  if (n == 0) return true;
  auto* bits = static_cast<uint64_t*>(workspace);
  auto* list = reinterpret_cast<int32_t*>(bits + n_words);
  const bool inside = indices.dtype == DType::i64 ? read_indices<int64_t>(indices, d, list)
                                                  : read_indices<int32_t>(indices, d, list);
  if (!inside) return false;
  Columns columns{list, n, nullptr, n_words};
  if (n >= d / 8 && ascending(list, n)) {  // fewer are taken one by one sooner than the row is read
    std::fill(bits, bits + n_words, uint64_t(0));
    for (int64_t i = 0; i < n; ++i) bits[list[i] / 64] |= uint64_t(1) << (list[i] % 64);
    columns.bits = bits;
  }
  if (n * n < small_work / 4) threads = 1;
  switch (size_of(matrix.dtype)) {
    case 2: gather_rows<uint16_t>(matrix, columns, out, isa, threads); break;
    case 4: gather_rows<uint32_t>(matrix, columns, out, isa, threads); break;
    default: gather_rows<uint64_t>(matrix, columns, out, isa, threads); break;
  }
  return true;
}

}  // namespace fastedit::cpu
