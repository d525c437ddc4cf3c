// Merging by magnitude and sign on a CPU.
//
// The entries are cut into ranges of 65,536, which threads take one by one, and ranges into tiles that stay in the
// first-level cache. Trimming keeps the k largest magnitudes |V - W|, compared as bit patterns:
//
//   sample   16,384 magnitudes of each tensor, evenly spread; two order statistics around the k-th make a bracket
//   count    one pass: how many magnitudes of each range are above the bracket and at its ends; those inside (a few
//            per cent) are collected
//   select   the k-th largest among those collected, by histograms of bit patterns; and which range may keep how many
//            of the entries equal to it, so that the lowest indices are kept
//   merge    one pass: trim, elect, average, add
//
// If the counts show that the bracket missed, histograms over the whole tensor find the k-th largest, and it is counted
// again. Memory: each tensor and base are read twice (once if nothing is trimmed), out is written once; workspace: at
// most an eighth of the trimmed differences in float, a third of which is usually touched.

#include "../ties.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "simd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit::cpu {
namespace {

constexpr int64_t tile_entries = 512;
constexpr int64_t range_entries = 65536;
constexpr int64_t unsampled_entries = 32768;  // up to here all magnitudes are collected, without a sample
constexpr int64_t collected_entries = range_entries / 8;  // of a range; more than that is a miss
constexpr int64_t run_entries = 8;                        // neighbours in a sample: they come with the cache line
constexpr int64_t sample_runs = 2048;
constexpr int64_t sample_entries = sample_runs * run_entries;
constexpr int64_t vector_slack = 16;  // collecting writes whole vectors
constexpr int32_t infinity_bits = 0x7F800000;
constexpr int64_t n_bins = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Magnitudes as bit patterns, which have the same order: those inside are low < bits < high.
struct Bracket {
  int32_t low, high;
};
constexpr Bracket everything{-1, std::numeric_limits<int32_t>::max()};

struct Counts {
  int64_t above, at_high, inside, at_low;
};

// --- Tiles ---------------------------------------------------------------------------------------------------------

FASTEDIT_INLINE int32_t magnitude_bits(float delta) { return int32_t(bits_of(delta) & 0x7FFFFFFFu); }

// Counts the magnitudes of v - base, and appends those inside the bracket to `collected`, up to `capacity` of them.
using Count = void (*)(const float* v, const float* base, int64_t n, Bracket bracket, Counts& counts,
                       int32_t* collected, int64_t capacity);

// u = weight (v - base) where the magnitude is at least `bound`, else 0. Returns the largest magnitude.
using Trim = int32_t (*)(const float* v, const float* base, int64_t n, float weight, int32_t bound, float* u);

using Add = void (*)(const float* u, int64_t n, float* total);

// direction = 1 or -1: the sign of total.
using Elect = void (*)(const float* total, int64_t n, bool zero_is_plus, float* direction);

// sum += u and weights += weight where u is not zero and has the sign elected.
using Agree = void (*)(const float* u, const float* direction, int64_t n, float weight, float* sum, float* weights);

// out = base + scale sum / divisor; divisors of 0 count as 1.
using Finish = void (*)(const float* base, const float* sum, const float* divisor, int64_t n, float scale, float* out);

using Load = void (*)(const void* from, int64_t n, float* to);
using Store = void (*)(const float* from, int64_t n, void* to);

FASTEDIT_INLINE void count_entries(const float* v, const float* base, int64_t n, Bracket bracket, Counts& counts,
                                   int32_t* collected, int64_t capacity) {
  for (int64_t t = 0; t < n; ++t) {
    const int32_t bits = magnitude_bits(v[t] - base[t]);
    counts.above += bits > bracket.high;
    counts.at_high += bits == bracket.high;
    counts.at_low += bits == bracket.low;
    if (bits > bracket.low && bits < bracket.high) {
      if (counts.inside < capacity) collected[counts.inside] = bits;
      ++counts.inside;
    }
  }
}

FASTEDIT_INLINE int32_t trim_tile(const float* __restrict v, const float* __restrict base, int64_t n, float weight,
                                  int32_t bound, float* __restrict u) {
  int32_t largest = 0;
  for (int64_t t = 0; t < n; ++t) {
    const float delta = v[t] - base[t];
    const int32_t bits = magnitude_bits(delta);
    largest = std::max(largest, bits);
    u[t] = bits >= bound ? weight * delta : 0.0f;
  }
  return largest;
}

FASTEDIT_INLINE void add_tile(const float* __restrict u, int64_t n, float* __restrict total) {
  for (int64_t t = 0; t < n; ++t) total[t] += u[t];
}

FASTEDIT_INLINE void elect_tile(const float* __restrict total, int64_t n, bool zero_is_plus,
                                float* __restrict direction) {
  if (zero_is_plus)
    for (int64_t t = 0; t < n; ++t) direction[t] = total[t] >= 0.0f ? 1.0f : -1.0f;
  else
    for (int64_t t = 0; t < n; ++t) direction[t] = total[t] > 0.0f ? 1.0f : -1.0f;
}

FASTEDIT_INLINE void agree_tile(const float* __restrict u, const float* __restrict direction, int64_t n, float weight,
                                float* __restrict sum, float* __restrict weights) {
  for (int64_t t = 0; t < n; ++t) {
    const bool agrees = u[t] * direction[t] > 0.0f;
    sum[t] += agrees ? u[t] : 0.0f;
    weights[t] += agrees ? weight : 0.0f;
  }
}

FASTEDIT_INLINE void finish_tile(const float* __restrict base, const float* __restrict sum,
                                 const float* __restrict divisor, int64_t n, float scale, float* __restrict out) {
  for (int64_t t = 0; t < n; ++t) {
    const float one_if_zero = divisor[t] == 0.0f ? 1.0f : 0.0f;
    out[t] = base[t] + scale * sum[t] / (divisor[t] + one_if_zero);
  }
}

template <class Type>
FASTEDIT_INLINE void load_tile(const void* from, int64_t n, float* to) {
  const auto* x = static_cast<const typename Type::Storage*>(from);
  for (int64_t t = 0; t < n; ++t) to[t] = Type::load(x[t]);
}

template <class Type>
FASTEDIT_INLINE void store_tile(const float* from, int64_t n, void* to) {
  auto* x = static_cast<typename Type::Storage*>(to);
  for (int64_t t = 0; t < n; ++t) x[t] = Type::store(from[t]);
}

struct Scalar {
  static void count(const float* v, const float* base, int64_t n, Bracket bracket, Counts& counts, int32_t* collected,
                    int64_t capacity) {
    count_entries(v, base, n, bracket, counts, collected, capacity);
  }
  static int32_t trim(const float* v, const float* base, int64_t n, float weight, int32_t bound, float* u) {
    return trim_tile(v, base, n, weight, bound, u);
  }
  static void add(const float* u, int64_t n, float* total) { add_tile(u, n, total); }
  static void elect(const float* total, int64_t n, bool zero_is_plus, float* direction) {
    elect_tile(total, n, zero_is_plus, direction);
  }
  static void agree(const float* u, const float* direction, int64_t n, float weight, float* sum,
                    float* weights) {
    agree_tile(u, direction, n, weight, sum, weights);
  }
  static void finish(const float* base, const float* sum, const float* divisor, int64_t n, float scale, float* out) {
    finish_tile(base, sum, divisor, n, scale, out);
  }
  template <class Type>
  static void load(const void* from, int64_t n, float* to) {
    load_tile<Type>(from, n, to);
  }
  template <class Type>
  static void store(const float* from, int64_t n, void* to) {
    store_tile<Type>(from, n, to);
  }
};

#if defined(__x86_64__)

struct Avx2 {
  FASTEDIT_AVX2 static void count(const float* v, const float* base, int64_t n, Bracket bracket, Counts& counts,
                                  int32_t* collected, int64_t capacity) {
    const __m256i low = _mm256_set1_epi32(bracket.low), high = _mm256_set1_epi32(bracket.high);
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256i above = _mm256_setzero_si256(), at_high = above, at_low = above;  // minus the counts
    const int64_t whole = n / 8 * 8;
    for (int64_t t = 0; t < whole; t += 8) {
      const __m256 delta = _mm256_sub_ps(_mm256_loadu_ps(v + t), _mm256_loadu_ps(base + t));
      const __m256i bits = _mm256_castps_si256(_mm256_and_ps(delta, magnitude));
      above = _mm256_add_epi32(above, _mm256_cmpgt_epi32(bits, high));
      at_high = _mm256_add_epi32(at_high, _mm256_cmpeq_epi32(bits, high));
      at_low = _mm256_add_epi32(at_low, _mm256_cmpeq_epi32(bits, low));
      const __m256i inside = _mm256_and_si256(_mm256_cmpgt_epi32(bits, low), _mm256_cmpgt_epi32(high, bits));
      unsigned mask = unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
      if (mask == 0) continue;
      alignas(32) int32_t lanes[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), bits);
      for (; mask; mask &= mask - 1) {
        if (counts.inside < capacity) collected[counts.inside] = lanes[__builtin_ctz(mask)];
        ++counts.inside;
      }
    }
    counts.above -= sum(above);
    counts.at_high -= sum(at_high);
    counts.at_low -= sum(at_low);
    count_entries(v + whole, base + whole, n - whole, bracket, counts, collected, capacity);
  }
  FASTEDIT_AVX2 static int64_t sum(__m256i v) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    int64_t total = 0;
    for (int32_t lane : lanes) total += lane;
    return total;
  }
  FASTEDIT_AVX2 static int32_t trim(const float* v, const float* base, int64_t n, float weight, int32_t bound,
                                    float* u) {
    return trim_tile(v, base, n, weight, bound, u);
  }
  FASTEDIT_AVX2 static void add(const float* u, int64_t n, float* total) { add_tile(u, n, total); }
  FASTEDIT_AVX2 static void elect(const float* total, int64_t n, bool zero_is_plus, float* direction) {
    elect_tile(total, n, zero_is_plus, direction);
  }
  FASTEDIT_AVX2 static void agree(const float* u, const float* direction, int64_t n, float weight, float* sum,
                                  float* weights) {
    agree_tile(u, direction, n, weight, sum, weights);
  }
  FASTEDIT_AVX2 static void finish(const float* base, const float* sum, const float* divisor, int64_t n, float scale,
                                   float* out) {
    finish_tile(base, sum, divisor, n, scale, out);
  }
  template <class Type>
  FASTEDIT_AVX2 static void load(const void* from, int64_t n, float* to) {
    load_tile<Type>(from, n, to);
  }
  template <class Type>
  FASTEDIT_AVX2 static void store(const float* from, int64_t n, void* to) {
    store_tile<Type>(from, n, to);
  }
};

template <>
FASTEDIT_AVX2 void Avx2::load<F16>(const void* from, int64_t n, float* to) {
  const auto* x = static_cast<const uint16_t*>(from);
  const int64_t whole = n / 8 * 8;
  for (int64_t t = 0; t < whole; t += 8)
    _mm256_storeu_ps(to + t, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + t))));
  load_tile<F16>(x + whole, n - whole, to + whole);
}

template <>
FASTEDIT_AVX2 void Avx2::store<F16>(const float* from, int64_t n, void* to) {
  auto* x = static_cast<uint16_t*>(to);
  const int64_t whole = n / 8 * 8;
  for (int64_t t = 0; t < whole; t += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x + t),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  store_tile<F16>(from + whole, n - whole, x + whole);
}

struct Avx512 {
  FASTEDIT_AVX512 static void count(const float* v, const float* base, int64_t n, Bracket bracket, Counts& counts,
                                    int32_t* collected, int64_t capacity) {
    const __m512i low = _mm512_set1_epi32(bracket.low), high = _mm512_set1_epi32(bracket.high);
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), one = _mm512_set1_epi32(1);
    __m512i above = _mm512_setzero_si512(), at_high = above, at_low = above;
    int64_t inside = counts.inside;
    for (int64_t t = 0; t < n; t += 16) {
      const __mmask16 valid = n - t >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - t)) - 1);
      const __m512 delta = _mm512_sub_ps(_mm512_maskz_loadu_ps(valid, v + t), _mm512_maskz_loadu_ps(valid, base + t));
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(delta), magnitude);
      above = _mm512_mask_add_epi32(above, _mm512_mask_cmpgt_epi32_mask(valid, bits, high), above, one);
      at_high = _mm512_mask_add_epi32(at_high, _mm512_mask_cmpeq_epi32_mask(valid, bits, high), at_high, one);
      at_low = _mm512_mask_add_epi32(at_low, _mm512_mask_cmpeq_epi32_mask(valid, bits, low), at_low, one);
      const __mmask16 in =
          _mm512_mask_cmplt_epi32_mask(_mm512_mask_cmpgt_epi32_mask(valid, bits, low), bits, high);
      // Unconditional, because a branch would be mispredicted; past the capacity it overwrites the last ones.
      _mm512_storeu_si512(collected + std::min(inside, capacity), _mm512_maskz_compress_epi32(in, bits));
      inside += __builtin_popcount(in);
    }
    counts.inside = inside;
    counts.above += _mm512_reduce_add_epi32(above);
    counts.at_high += _mm512_reduce_add_epi32(at_high);
    counts.at_low += _mm512_reduce_add_epi32(at_low);
  }
  FASTEDIT_AVX512 static int32_t trim(const float* v, const float* base, int64_t n, float weight, int32_t bound,
                                      float* u) {
    return trim_tile(v, base, n, weight, bound, u);
  }
  FASTEDIT_AVX512 static void add(const float* u, int64_t n, float* total) { add_tile(u, n, total); }
  FASTEDIT_AVX512 static void elect(const float* total, int64_t n, bool zero_is_plus, float* direction) {
    elect_tile(total, n, zero_is_plus, direction);
  }
  FASTEDIT_AVX512 static void agree(const float* u, const float* direction, int64_t n, float weight, float* sum,
                                    float* weights) {
    agree_tile(u, direction, n, weight, sum, weights);
  }
  FASTEDIT_AVX512 static void finish(const float* base, const float* sum, const float* divisor, int64_t n, float scale,
                                     float* out) {
    finish_tile(base, sum, divisor, n, scale, out);
  }
  template <class Type>
  FASTEDIT_AVX512 static void load(const void* from, int64_t n, float* to) {
    load_tile<Type>(from, n, to);
  }
  template <class Type>
  FASTEDIT_AVX512 static void store(const float* from, int64_t n, void* to) {
    store_tile<Type>(from, n, to);
  }
};

template <>
FASTEDIT_AVX512 void Avx512::load<F16>(const void* from, int64_t n, float* to) {
  const auto* x = static_cast<const uint16_t*>(from);
  const int64_t whole = n / 16 * 16;
  for (int64_t t = 0; t < whole; t += 16)
    _mm512_storeu_ps(to + t, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t))));
  load_tile<F16>(x + whole, n - whole, to + whole);
}

template <>
FASTEDIT_AVX512 void Avx512::store<F16>(const float* from, int64_t n, void* to) {
  auto* x = static_cast<uint16_t*>(to);
  const int64_t whole = n / 16 * 16;
  for (int64_t t = 0; t < whole; t += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + t),
                        _mm512_cvtps_ph(_mm512_loadu_ps(from + t), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  store_tile<F16>(from + whole, n - whole, x + whole);
}

#endif  // __x86_64__

struct Kernels {
  Count count;
  Trim trim;
  Add add;
  Elect elect;
  Agree agree;
  Finish finish;
  Load load;    // null: entries are floats already
  Store store;  // null likewise
};

template <class Set>
Kernels kernels_of(DType type) {
  Kernels kernels{Set::count, Set::trim, Set::add, Set::elect, Set::agree, Set::finish, nullptr, nullptr};
  if (type == DType::bf16) {
    kernels.load = Set::template load<BF16>;
    kernels.store = Set::template store<BF16>;
  } else if (type == DType::f16) {
    kernels.load = Set::template load<F16>;
    kernels.store = Set::template store<F16>;
  }
  return kernels;
}

Kernels kernels_of(DType type, Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return kernels_of<Avx512>(type);
  if (isa == Isa::avx2) return kernels_of<Avx2>(type);
#endif
  (void)isa;
  return kernels_of<Scalar>(type);
}

// --- The workspace -------------------------------------------------------------------------------------------------

// What a range may keep of the entries equal to the threshold: the first `quota`, or all of them.
constexpr int64_t keep_all = -1;

struct Threshold {
  int32_t bits;
  bool missed;
};

// What a range found in the last pass.
struct Found {
  int64_t sign_balance;  // sums above zero minus sums below
  int64_t undecided;     // zero sums of entries that are not all zero
  int first_nonfinite;   // input
};

// Hands out parts of one block of memory, or only adds up how much they take.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(memory_ + used_);
    used_ += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

struct Workspace {
  int64_t n_ranges, capacity;
  Counts* counts;       // (inputs, ranges)
  int64_t* quotas;      // (inputs, ranges)
  Found* found;         // (ranges)
  Bracket* brackets;    // (inputs)
  Threshold* chosen;    // (inputs)
  int32_t* collected;   // (inputs, ranges, capacity + slack)
  int32_t* samples;     // (inputs, sample_entries)
  float* tiles;         // (threads, inputs + 6, tile_entries)
  size_t bytes;

  Workspace(int64_t n, int64_t m, int threads, void* memory) {
    Arena arena(memory);
    n_ranges = ceil_div(n, range_entries);
    capacity = n <= unsampled_entries ? n : collected_entries;
    counts = arena.take<Counts>(m * n_ranges);
    quotas = arena.take<int64_t>(m * n_ranges);
    found = arena.take<Found>(n_ranges);
    brackets = arena.take<Bracket>(m);
    chosen = arena.take<Threshold>(m);
    tiles = arena.take<float>(threads * (m + 6) * tile_entries);
    samples = arena.take<int32_t>(n <= unsampled_entries ? 0 : m * sample_entries);
    collected = arena.take<int32_t>(m * n_ranges * (capacity + vector_slack));
    bytes = arena.used();
  }
};

struct Call {
  const TiesProblem& problem;
  Kernels kernels;
  Workspace work;
  int threads;
  int64_t n, entry_bytes;

  bool trims(int i) const { return problem.inputs[i].keep < n; }
  // Entries of base or an input as floats, in place or converted into `buffer`.
  const float* row(const void* data, int64_t start, int64_t count, float* buffer) const {
    const char* from = static_cast<const char*>(data) + start * entry_bytes;
    if (!kernels.load) return reinterpret_cast<const float*>(from);
    kernels.load(from, count, buffer);
    return buffer;
  }
  int32_t* collected(int i, int64_t range) const {
    return work.collected + (i * work.n_ranges + range) * (work.capacity + vector_slack);
  }
  Counts& counts(int i, int64_t range) const { return work.counts[i * work.n_ranges + range]; }
  int64_t& quota(int i, int64_t range) const { return work.quotas[i * work.n_ranges + range]; }
};

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// --- Finding the threshold -----------------------------------------------------------------------------------------

// The start of a run: somewhere in its share of the tensor. Equal steps could meet one column of a matrix only.
int64_t run_start(int64_t run, int64_t n) {
  const int64_t first = n / sample_runs * run, room = n / sample_runs - run_entries;
  uint64_t mixed = uint64_t(run + 1) * 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9u;
  return first + int64_t((mixed >> 33) % uint64_t(room + 1));
}

void sample(const Call& call) {
  const int m = call.problem.n_inputs;
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t run = 0; run < sample_runs; ++run) {
    const int64_t start = run_start(run, call.n);
    float base_buffer[run_entries], buffer[run_entries];
    const float* base = call.row(call.problem.base.data, start, run_entries, base_buffer);
    for (int i = 0; i < m; ++i) {
      if (!call.trims(i)) continue;
      const float* v = call.row(call.problem.inputs[i].data, start, run_entries, buffer);
      int32_t* to = call.work.samples + i * sample_entries + run * run_entries;
      for (int64_t t = 0; t < run_entries; ++t) to[t] = magnitude_bits(v[t] - base[t]);
    }
  }
}

// Order statistics of the sample five standard deviations on either side of the k-th largest.
Bracket bracket_of(int32_t* samples, int64_t keep, int64_t n) {
  const double share = double(keep) / double(n), s = double(sample_entries);
  const int64_t expected = int64_t(share * s), margin = int64_t(5.0 * std::sqrt(s * share * (1.0 - share))) + 8;
  const int64_t upper = expected - margin, lower = expected + margin;  // ranks from the largest
  Bracket bracket = everything;
  int32_t* const end = samples + sample_entries;
  if (lower < sample_entries) {
    std::nth_element(samples, samples + lower, end, std::greater<int32_t>());
    bracket.low = samples[lower];
  }
  if (upper >= 0) {
    std::nth_element(samples, samples + upper, samples + std::min(lower, sample_entries), std::greater<int32_t>());
    bracket.high = samples[upper];
  }
  return bracket;
}

void count_range(const Call& call, int64_t range) {
  const int64_t end = std::min(call.n, (range + 1) * range_entries);
  const int m = call.problem.n_inputs;
  float* base_tile = call.work.tiles + thread_number() * (m + 6) * tile_entries;
  float* tile = base_tile + tile_entries;
  for (int i = 0; i < m; ++i) call.counts(i, range) = {};
  for (int64_t start = range * range_entries; start < end; start += tile_entries) {
    const int64_t count = std::min(tile_entries, end - start);
    const float* base = call.row(call.problem.base.data, start, count, base_tile);
    for (int i = 0; i < m; ++i) {
      if (!call.trims(i)) continue;
      const float* v = call.row(call.problem.inputs[i].data, start, count, tile);
      call.kernels.count(v, base, count, call.work.brackets[i], call.counts(i, range), call.collected(i, range),
                         call.work.capacity);
    }
  }
}

void count(const Call& call) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads)
  for (int64_t range = 0; range < call.work.n_ranges; ++range) count_range(call, range);
}

// The rank-th largest of values in [first, last), which `histogram(first, last, shift, bins)` counts in steps of
// 2^shift. Afterwards rank counts from the first value equal to the result.
template <class Histogram>
int32_t kth_largest(int64_t first, int64_t last, int64_t& rank, const Histogram& histogram) {
  while (last - first > 1) {
    int shift = 0;
    while ((last - first - 1) >> shift >= n_bins) ++shift;
    int64_t bins[n_bins] = {};
    histogram(first, last, shift, bins);
    int64_t bin = n_bins - 1;
    while (rank > bins[bin]) rank -= bins[bin--];
    first += bin << shift;
    last = std::min(last, first + (int64_t(1) << shift));
  }
  return int32_t(first);
}

FASTEDIT_INLINE void add_to_bins(const int32_t* values, int64_t n, int64_t first, int64_t last, int shift,
                                 int64_t* bins) {
  for (int64_t j = 0; j < n; ++j)
    if (values[j] >= first && values[j] < last) ++bins[(values[j] - first) >> shift];
}

// The threshold of one input from what was counted and collected, and how many entries equal to it the ranges may keep.
Threshold select(const Call& call, int i) {
  const Bracket bracket = call.work.brackets[i];
  const int64_t n_ranges = call.work.n_ranges;
  Counts all = {};
  bool overflow = false;
  for (int64_t range = 0; range < n_ranges; ++range) {
    const Counts& counts = call.counts(i, range);
    all.above += counts.above;
    all.at_high += counts.at_high;
    all.inside += counts.inside;
    all.at_low += bracket.low == bracket.high ? 0 : counts.at_low;
    overflow |= counts.inside > call.work.capacity;
  }
  int64_t rank = call.problem.inputs[i].keep - all.above;
  if (rank <= 0) return {0, true};
  int32_t bits = bracket.high;
  if (rank > all.at_high) {
    rank -= all.at_high;
    if (rank <= all.inside) {
      if (overflow) return {0, true};
      bits = kth_largest(bracket.low + 1, bracket.high, rank,
                         [&](int64_t first, int64_t last, int shift, int64_t* bins) {
                           for (int64_t range = 0; range < n_ranges; ++range)
                             add_to_bins(call.collected(i, range), call.counts(i, range).inside, first, last, shift,
                                         bins);
                         });
    } else {
      rank -= all.inside;
      bits = bracket.low;
      if (rank > all.at_low) return {0, true};
    }
  }
  // A threshold of zero trims nothing.
  const bool every = call.problem.options.all_at_threshold || bits == 0;
  for (int64_t range = 0; range < n_ranges; ++range) {
    const Counts& counts = call.counts(i, range);
    int64_t tied = bits == bracket.high ? counts.at_high : counts.at_low;
    if (bits != bracket.high && bits != bracket.low)
      tied = std::count(call.collected(i, range), call.collected(i, range) + counts.inside, bits);
    const int64_t quota = std::min(rank, tied);
    call.quota(i, range) = every || quota == tied ? keep_all : quota;
    rank -= quota;
  }
  return {bits, false};
}

// The same threshold from the whole tensor, for a bracket that missed.
Bracket bracket_by_histograms(const Call& call, int i) {
  int64_t rank = call.problem.inputs[i].keep;
  const int32_t bits = kth_largest(
      0, int64_t(1) << 31, rank, [&](int64_t first, int64_t last, int shift, int64_t* bins) {
#pragma omp parallel num_threads(call.threads)
        {
          int64_t own[n_bins] = {};
          float base_tile[tile_entries], tile[tile_entries];
          int32_t bits_tile[tile_entries];
#pragma omp for schedule(static)
          for (int64_t start = 0; start < call.n; start += tile_entries) {
            const int64_t count = std::min(tile_entries, call.n - start);
            const float* base = call.row(call.problem.base.data, start, count, base_tile);
            const float* v = call.row(call.problem.inputs[i].data, start, count, tile);
            for (int64_t t = 0; t < count; ++t) bits_tile[t] = magnitude_bits(v[t] - base[t]);
            add_to_bins(bits_tile, count, first, last, shift, own);
          }
#pragma omp critical
          for (int64_t b = 0; b < n_bins; ++b) bins[b] += own[b];
        }
      });
  return {bits, bits};
}

void find_thresholds(const Call& call) {
  const int m = call.problem.n_inputs;
  const bool sampled = call.n > unsampled_entries;
  bool any = false;
  for (int i = 0; i < m; ++i) {
    const bool none = call.problem.inputs[i].keep == 0;
    call.work.chosen[i] = {none ? std::numeric_limits<int32_t>::max() : 0, false};
    std::fill_n(&call.quota(i, 0), call.work.n_ranges, none ? 0 : keep_all);
    call.work.brackets[i] = everything;
    any |= call.trims(i) && !none;
  }
  if (!any) return;
  if (sampled) {
    sample(call);
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads)
    for (int i = 0; i < m; ++i)
      if (call.trims(i))
        call.work.brackets[i] = bracket_of(call.work.samples + i * sample_entries, call.problem.inputs[i].keep, call.n);
  }
  count(call);
  bool missed = false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) reduction(|| : missed)
  for (int i = 0; i < m; ++i)
    if (call.trims(i) && call.problem.inputs[i].keep > 0) {
      call.work.chosen[i] = select(call, i);
      missed = missed || call.work.chosen[i].missed;
    }
  if (!missed) return;
  for (int i = 0; i < m; ++i)
    if (call.work.chosen[i].missed) call.work.brackets[i] = bracket_by_histograms(call, i);
  count(call);
  for (int i = 0; i < m; ++i)
    if (call.work.chosen[i].missed) call.work.chosen[i] = select(call, i);
}

// --- Merging -------------------------------------------------------------------------------------------------------

// Drops entries at the threshold, except the first `left`.
void drop_tied(const float* v, const float* base, int64_t n, int32_t threshold, int64_t& left, float* u) {
  for (int64_t t = 0; t < n; ++t)
    if (magnitude_bits(v[t] - base[t]) == threshold && --left < 0) u[t] = 0.0f;
}

// The tiles of one thread.
struct Tiles {
  float *base, *v, *total, *direction, *sum, *divisor, *u;  // u: one for each input
};

Tiles tiles_of(const Call& call) {
  float* first = call.work.tiles + thread_number() * (call.problem.n_inputs + 6) * tile_entries;
  return {first, first + tile_entries, first + 2 * tile_entries, first + 3 * tile_entries, first + 4 * tile_entries,
          first + 5 * tile_entries, first + 6 * tile_entries};
}

void count_signs(const float* total, const float* sum, int64_t n, Found& found) {
  for (int64_t t = 0; t < n; ++t) {
    found.sign_balance += (total[t] > 0.0f) - (total[t] < 0.0f);
    found.undecided += total[t] == 0.0f && sum[t] != 0.0f;
  }
}

void merge_range(const Call& call, int64_t range, bool zero_is_plus) {
  const TiesProblem& problem = call.problem;
  const TiesOptions& options = problem.options;
  const int64_t end = std::min(call.n, (range + 1) * range_entries);
  const Tiles tiles = tiles_of(call);
  int64_t left[max_ties_tensors];
  for (int i = 0; i < problem.n_inputs; ++i) left[i] = call.quota(i, range);
  Found found{0, 0, problem.n_inputs};
  char* out = static_cast<char*>(problem.out.data);
  for (int64_t start = range * range_entries; start < end; start += tile_entries) {
    const int64_t count = std::min(tile_entries, end - start);
    const float* base = call.row(problem.base.data, start, count, tiles.base);
    std::fill_n(tiles.total, count, 0.0f);
    for (int i = 0; i < problem.n_inputs; ++i) {
      const float* v = call.row(problem.inputs[i].data, start, count, tiles.v);
      const int32_t threshold = call.work.chosen[i].bits;
      float* u = tiles.u + i * tile_entries;
      const bool none = left[i] != keep_all && left[i] <= 0;
      const int32_t bound = none && threshold < everything.high ? threshold + 1 : threshold;
      const int32_t largest = call.kernels.trim(v, base, count, problem.inputs[i].weight, bound, u);
      if (largest >= infinity_bits) found.first_nonfinite = std::min(found.first_nonfinite, i);
      if (left[i] > 0) {
        drop_tied(v, base, count, threshold, left[i], u);
        left[i] = std::max<int64_t>(left[i], 0);
      }
      call.kernels.add(u, count, tiles.total);
    }
    const float* sum = tiles.total;
    std::fill_n(tiles.divisor, count, options.normalise ? 0.0f : options.divisor);
    if (options.elect) {
      sum = tiles.sum;
      std::fill_n(tiles.sum, count, 0.0f);
      call.kernels.elect(tiles.total, count, zero_is_plus, tiles.direction);
      float* weights = options.normalise ? tiles.divisor : tiles.v;
      for (int i = 0; i < problem.n_inputs; ++i)
        call.kernels.agree(tiles.u + i * tile_entries, tiles.direction, count, problem.inputs[i].weight, tiles.sum,
                           weights);
      if (options.majority) count_signs(tiles.total, tiles.sum, count, found);
    }
    float* merged = call.kernels.store ? tiles.v : reinterpret_cast<float*>(out) + start;
    call.kernels.finish(base, sum, tiles.divisor, count, options.scale, merged);
    if (call.kernels.store) call.kernels.store(merged, count, out + start * call.entry_bytes);
  }
  call.work.found[range] = found;
}

Found merge(const Call& call, bool zero_is_plus) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads)
  for (int64_t range = 0; range < call.work.n_ranges; ++range) merge_range(call, range, zero_is_plus);
  Found all{0, 0, call.problem.n_inputs};
  for (int64_t range = 0; range < call.work.n_ranges; ++range) {
    const Found& found = call.work.found[range];
    all.sign_balance += found.sign_balance;
    all.undecided += found.undecided;
    all.first_nonfinite = std::min(all.first_nonfinite, found.first_nonfinite);
  }
  return all;
}

void fill_with_nan(const TiesProblem& problem) {
  const int64_t n = problem.out.numel();
  if (problem.out.dtype == DType::f32) {
    std::fill_n(static_cast<float*>(problem.out.data), n, std::numeric_limits<float>::quiet_NaN());
  } else {
    const uint16_t nan = problem.out.dtype == DType::bf16 ? 0x7FC0 : 0x7E00;
    std::fill_n(static_cast<uint16_t*>(problem.out.data), n, nan);
  }
}

}  // namespace

TiesPlan plan_ties(const TiesProblem& problem, Isa isa, int threads) {
  const int64_t n = problem.base.numel();
  if (n * (problem.n_inputs + 2) < small_work) threads = 1;
  return {isa, threads, Workspace(n, problem.n_inputs, threads, nullptr).bytes};
}

int ties(const TiesPlan& plan, const TiesProblem& problem, void* workspace) {
  const int64_t n = problem.base.numel();
  if (n == 0) return problem.n_inputs;
  const Call call{problem,
                  kernels_of(problem.base.dtype, plan.isa),
                  Workspace(n, problem.n_inputs, plan.threads, workspace),
                  plan.threads,
                  n,
                  size_of(problem.base.dtype)};
  find_thresholds(call);
  Found found = merge(call, true);
  if (problem.options.majority && found.sign_balance < 0 && found.undecided > 0) found = merge(call, false);
  if (found.first_nonfinite < problem.n_inputs) fill_with_nan(problem);
  return found.first_nonfinite;
}

}  // namespace fastedit::cpu
