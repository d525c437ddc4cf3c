// Merging by magnitude and sign on a GPU, in the steps of cpu/ties.cpp, without waiting for the device in between.
//
// Tensors are cut into as many ranges as there are blocks to fill the GPU; a block of 256 threads walks over its range
// tile by tile, so that it alone counts, collects and ranks the range's entries: no order depends on timing, and the
// entries that equal the threshold are kept in index order.
//
//   sample     32,768 magnitudes of each tensor, evenly spread
//   bracket    one block a tensor: two order statistics of the sample, by radix selection
//   count      one pass: counts above and at the bracket's ends; what is inside is collected, range by range
//   select     one block a tensor: the k-th largest of what was collected, and each range's share of the entries equal
//   histogram, descend    three times, only where the bracket missed (elsewhere these blocks return at once): 11, 10
//              and 10 bits of the k-th largest from the whole tensor; then count and select again
//   merge      one pass: trim, elect, average, add; again only if zero sums must become negative ("majority")
//   poison     only if something was not finite
//
// Memory: each tensor and base twice, out once; workspace: an eighth of the trimmed differences in float.

#include "../ties.h"

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 256;
constexpr int n_warps = n_threads / 32;
constexpr int per_thread = 4;  // entries of a tile, neighbours in memory
constexpr int tile_entries = n_threads * per_thread;
constexpr int select_threads = 1024;
constexpr int n_bins = 2048;
constexpr int sample_entries = 32768;
constexpr int64_t small_entries = 4 * sample_entries;  // up to here everything is collected, without a sample
constexpr int blocks_per_multiprocessor = 8;
constexpr int keep_all = -1;
constexpr int32_t largest_bits = 0x7FFFFFFF;
constexpr int32_t infinity_bits = 0x7F800000;

// Magnitudes as bit patterns, which have the same order: those inside are low < bits < high.
struct Bracket {
  int32_t low, high;
};

struct Counts {
  int above, at_high, inside, at_low;
};

struct Threshold {
  int32_t bits;
  int32_t missed;
  // While histograms are taken: the rank among values in [first, first + 2^width).
  int64_t rank;
  int64_t first;
};

struct Input {
  const void* data;
  float weight;
  int64_t keep;
};

struct Workspace {
  Counts* counts;        // (inputs, ranges)
  int* quotas;           // (inputs, ranges): how many entries at the threshold are kept, from the first on
  Bracket* brackets;     // (inputs)
  Threshold* chosen;     // (inputs)
  int32_t* collected;    // (inputs, ranges, capacity)
  int32_t* samples;      // (inputs, sample_entries)
  unsigned long long* bins;  // (inputs, n_bins)
  int* any_missed;       // (1)
  int* first_nonfinite;  // (1), the caller's
  unsigned long long* sign_balance;  // (1), in two's complement
  int* undecided;                    // (1)
};

template <class T>
struct Arguments {
  const T* base;
  T* out;
  int64_t n, range;  // entries in all and of a range; a multiple of a tile
  int n_inputs, n_ranges, capacity;
  TiesOptions options;
  Workspace work;
  Input inputs[max_ties_tensors];
};

template <class T>
__device__ __forceinline__ int32_t magnitude_bits(T v, T base) {
  return int32_t(__float_as_uint(__fsub_rn(to_float(v), to_float(base))) & 0x7FFFFFFFu);
}

// per_thread neighbours from `start` on; those at `end` and beyond are not read.
template <class T>
struct Entries {
  alignas(per_thread * sizeof(T)) T value[per_thread];

  __device__ __forceinline__ void load(const T* from, int64_t start, int64_t end, bool aligned) {
    if (aligned && start + per_thread <= end) {
      if constexpr (sizeof(T) == 4)
        *reinterpret_cast<uint4*>(value) = *reinterpret_cast<const uint4*>(from + start);
      else
        *reinterpret_cast<uint2*>(value) = *reinterpret_cast<const uint2*>(from + start);
    } else {
#pragma unroll
      for (int k = 0; k < per_thread; ++k) value[k] = start + k < end ? from[start + k] : from_float<T>(0.0f);
    }
  }
  __device__ __forceinline__ void load_input(const Arguments<T>& arg, int i, int64_t start, int64_t end) {
    const T* data = static_cast<const T*>(arg.inputs[i].data);
    load(data, start, end, reinterpret_cast<uintptr_t>(data) % sizeof(value) == 0);
  }
  __device__ __forceinline__ void store(T* to, int64_t start, int64_t end, bool aligned) const {
    if (aligned && start + per_thread <= end) {
      if constexpr (sizeof(T) == 4)
        *reinterpret_cast<uint4*>(to + start) = *reinterpret_cast<const uint4*>(value);
      else
        *reinterpret_cast<uint2*>(to + start) = *reinterpret_cast<const uint2*>(value);
    } else {
#pragma unroll
      for (int k = 0; k < per_thread; ++k)
        if (start + k < end) to[start + k] = value[k];
    }
  }
};

template <class T>
__device__ __forceinline__ bool aligned_to_entries(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Entries<T>) == 0;
}

// The sum of the values of this lane and those before it.
template <class Value>
__device__ __forceinline__ Value sum_up_to_lane(Value value) {
  for (int step = 1; step < 32; step *= 2) {
    const Value other = __shfl_up_sync(0xFFFFFFFFu, value, step);
    if (int(threadIdx.x) % 32 >= step) value += other;
  }
  return value;
}

// --- Selection in one block ----------------------------------------------------------------------------------------

// In shared memory: what select_in_block needs.
struct Selection {
  unsigned bins[n_bins];
  int64_t first, rank;
};

// From the counts of 2^shift-wide bins: moves first to the bin that holds the rank-th largest and makes the rank one
// within it. Called by all threads of the first warp; every lane owns a run of bins.
template <class Bin>
__device__ __forceinline__ void descend(const Bin* bins, int shift, int64_t& first, int64_t& rank) {
  constexpr int run = n_bins / 32;
  const int lane = int(threadIdx.x) % 32, top = n_bins - lane * run;  // lane 0 owns the largest values
  int64_t sum = 0;
  for (int b = 1; b <= run; ++b) sum += int64_t(bins[top - b]);
  const int64_t before = sum_up_to_lane(sum) - sum;
  const int64_t start = first, wanted = rank;
  int64_t found_first = start, found_rank = wanted;
  if (before < wanted && wanted <= before + sum) {
    int bin = top - 1;
    int64_t left = wanted - before;
    while (left > int64_t(bins[bin])) left -= int64_t(bins[bin--]);
    found_first = start + (int64_t(bin) << shift);
    found_rank = left;
  }
  const unsigned owner = __ballot_sync(0xFFFFFFFFu, before < wanted && wanted <= before + sum);
  const int source = owner ? __ffs(int(owner)) - 1 : 0;
  first = __shfl_sync(0xFFFFFFFFu, found_first, source);
  rank = __shfl_sync(0xFFFFFFFFu, found_rank, source);
}

// The rank-th largest (from 1) of values in [first, last) that `visit(add)` hands to add(value), thread by thread. On
// return rank counts from the first value equal to the result. All threads of the block call it and get the results.
template <class Visit>
__device__ int32_t select_in_block(Selection& shared, int64_t first, int64_t last, int64_t& rank, const Visit& visit) {
  while (last - first > 1) {
    int shift = 0;
    while ((last - first - 1) >> shift >= n_bins) ++shift;
    for (int b = int(threadIdx.x); b < n_bins; b += int(blockDim.x)) shared.bins[b] = 0;
    __syncthreads();
    visit([&](int32_t value) {
      if (value >= first && value < last) atomicAdd(&shared.bins[(value - first) >> shift], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      int64_t from = first, within = rank;
      descend(shared.bins, shift, from, within);
      if (threadIdx.x == 0) {
        shared.first = from;
        shared.rank = within;
      }
    }
    __syncthreads();
    first = shared.first;
    rank = shared.rank;
    const int64_t end = first + (int64_t(1) << shift);
    last = end < last ? end : last;
    __syncthreads();  // all have read before the next round writes
  }
  return int32_t(first);
}

// --- The steps before merging --------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ bool trims(const Arguments<T>& arg, int i) {
  return arg.inputs[i].keep > 0 && arg.inputs[i].keep < arg.n;
}

// One thread: one entry of the sample, somewhere in its share of the tensor.
template <class T>
__global__ void __launch_bounds__(n_threads) sample_kernel(const __grid_constant__ Arguments<T> arg) {
  const int i = int(blockIdx.y), s = int(blockIdx.x) * n_threads + int(threadIdx.x);
  if (!trims(arg, i) || s >= sample_entries) return;
  const int64_t share = arg.n / sample_entries;
  uint64_t mixed = uint64_t(s + 1) * 0x9E3779B97F4A7C15u;
  mixed = (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9u;
  const int64_t at = share * s + int64_t((mixed >> 33) % uint64_t(share));
  const T* v = static_cast<const T*>(arg.inputs[i].data);
  arg.work.samples[int64_t(i) * sample_entries + s] = magnitude_bits(v[at], arg.base[at]);
}

// One block: the bracket of one input, and what later steps start from.
template <class T>
__global__ void __launch_bounds__(select_threads) bracket_kernel(const __grid_constant__ Arguments<T> arg) {
  __shared__ Selection shared;
  const int i = int(blockIdx.x);
  if (i == 0 && threadIdx.x == 0) {
    *arg.work.first_nonfinite = arg.n_inputs;
    *arg.work.any_missed = 0;
    *arg.work.sign_balance = 0;
    *arg.work.undecided = 0;
  }
  const int64_t keep = arg.inputs[i].keep;
  const bool none = keep == 0;
  for (int r = int(threadIdx.x); r < arg.n_ranges; r += select_threads)
    arg.work.quotas[int64_t(i) * arg.n_ranges + r] = none ? 0 : keep_all;
  Bracket bracket{-1, largest_bits};
  if (trims(arg, i) && arg.n > small_entries) {
    // Order statistics five standard deviations on either side of the k-th largest.
    const double share = double(keep) / double(arg.n), s = double(sample_entries);
    const int64_t expected = int64_t(share * s), margin = int64_t(5.0 * sqrt(s * share * (1.0 - share))) + 8;
    const int32_t* samples = arg.work.samples + int64_t(i) * sample_entries;
    const auto visit = [&](const auto& add) {
      for (int k = int(threadIdx.x); k < sample_entries; k += select_threads) add(samples[k]);
    };
    int64_t upper = expected - margin + 1, lower = expected + margin + 1;  // ranks from 1
    if (lower <= sample_entries) bracket.low = select_in_block(shared, 0, int64_t(1) << 31, lower, visit);
    if (upper >= 1) bracket.high = select_in_block(shared, 0, int64_t(1) << 31, upper, visit);
  }
  if (threadIdx.x == 0) {
    arg.work.brackets[i] = bracket;
    arg.work.chosen[i] = {none ? largest_bits : 0, 0, keep, 0};
  }
}

// One block: one range of all trimmed inputs; `again`: only of those whose bracket missed.
template <class T>
__global__ void __launch_bounds__(n_threads) count_kernel(const __grid_constant__ Arguments<T> arg, bool again) {
  if (again && *arg.work.any_missed == 0) return;
  __shared__ Counts counts[max_ties_tensors];
  for (int i = int(threadIdx.x); i < arg.n_inputs; i += n_threads) counts[i] = {0, 0, 0, 0};
  __syncthreads();
  const int range = int(blockIdx.x);
  const int64_t begin = range * arg.range, limit = begin + arg.range, end = limit < arg.n ? limit : arg.n;
  const bool base_aligned = aligned_to_entries(arg.base);
  for (int64_t tile = begin; tile < end; tile += tile_entries) {
    const int64_t start = tile + int64_t(threadIdx.x) * per_thread;
    Entries<T> base;
    base.load(arg.base, start, end, base_aligned);
    Entries<T> next;
    next.load_input(arg, 0, start, end);
    for (int i = 0; i < arg.n_inputs; ++i) {
      const Entries<T> v = next;
      if (i + 1 < arg.n_inputs) next.load_input(arg, i + 1, start, end);  // on its way while v is counted
      if (!trims(arg, i) || (again && !arg.work.chosen[i].missed)) continue;
      const Bracket bracket = arg.work.brackets[i];
      unsigned packed = 0;  // three counts of at most 128 each after adding up a warp
      int32_t bits[per_thread];
      int inside = 0;
#pragma unroll
      for (int k = 0; k < per_thread; ++k) {
        const bool valid = start + k < end;
        bits[k] = valid ? magnitude_bits(v.value[k], base.value[k]) : -2;  // below every bracket
        packed += unsigned(bits[k] > bracket.high) | unsigned(bits[k] == bracket.high) << 10 |
                  unsigned(bits[k] == bracket.low) << 20;
        inside += bits[k] > bracket.low && bits[k] < bracket.high;
      }
      for (int step = 16; step > 0; step /= 2) packed += __shfl_xor_sync(0xFFFFFFFFu, packed, step);
      if (threadIdx.x % 32 == 0 && packed != 0) {
        atomicAdd(&counts[i].above, int(packed & 1023u));
        atomicAdd(&counts[i].at_high, int(packed >> 10 & 1023u));
        atomicAdd(&counts[i].at_low, int(packed >> 20));
      }
      if (inside > 0) {
        int at = atomicAdd(&counts[i].inside, inside);
        int32_t* to = arg.work.collected + (int64_t(i) * arg.n_ranges + range) * arg.capacity;
#pragma unroll
        for (int k = 0; k < per_thread; ++k)
          if (bits[k] > bracket.low && bits[k] < bracket.high) {
            if (at < arg.capacity) to[at] = bits[k];
            ++at;
          }
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < arg.n_inputs; i += n_threads)
    if (!again || arg.work.chosen[i].missed) arg.work.counts[int64_t(i) * arg.n_ranges + range] = counts[i];
}

// One block: the threshold of one input from what was counted and collected, and what each range may keep.
template <class T>
__global__ void __launch_bounds__(select_threads) select_kernel(const __grid_constant__ Arguments<T> arg, bool again) {
  __shared__ Selection shared;
  __shared__ unsigned long long sums[4];
  __shared__ int overflow;
  const int i = int(blockIdx.x);
  const int64_t keep = arg.inputs[i].keep;
  if (!trims(arg, i) || (again && !arg.work.chosen[i].missed)) return;
  const Bracket bracket = arg.work.brackets[i];
  const Counts* counts = arg.work.counts + int64_t(i) * arg.n_ranges;
  const int32_t* collected = arg.work.collected + int64_t(i) * arg.n_ranges * arg.capacity;
  if (threadIdx.x < 4) sums[threadIdx.x] = 0;
  if (threadIdx.x == 0) overflow = 0;
  __syncthreads();
  for (int r = int(threadIdx.x); r < arg.n_ranges; r += select_threads) {
    const Counts c = counts[r];
    atomicAdd(&sums[0], static_cast<unsigned long long>(c.above));
    atomicAdd(&sums[1], static_cast<unsigned long long>(c.at_high));
    atomicAdd(&sums[2], static_cast<unsigned long long>(c.inside));
    atomicAdd(&sums[3], static_cast<unsigned long long>(bracket.low == bracket.high ? 0 : c.at_low));
    if (c.inside > arg.capacity) overflow = 1;
  }
  __syncthreads();
  const int64_t above = int64_t(sums[0]), at_high = int64_t(sums[1]);
  const int64_t inside = int64_t(sums[2]), at_low = int64_t(sums[3]);
  int64_t rank = keep - above;
  int32_t bits = bracket.high;
  bool missed = rank <= 0;
  if (!missed && rank > at_high) {
    rank -= at_high;
    if (rank <= inside) {
      missed = overflow != 0;
      if (!missed)  // one warp a range: neighbours read neighbours
        bits = select_in_block(shared, int64_t(bracket.low) + 1, bracket.high, rank, [&](const auto& add) {
          for (int r = int(threadIdx.x) / 32; r < arg.n_ranges; r += select_threads / 32)
            for (int k = int(threadIdx.x) % 32; k < counts[r].inside; k += 32)
              add(collected[int64_t(r) * arg.capacity + k]);
        });
    } else {
      rank -= inside;
      bits = bracket.low;
      missed = rank > at_low;
    }
  }
  if (missed) {
    if (threadIdx.x == 0) {
      arg.work.chosen[i] = {0, 1, keep, 0};
      *arg.work.any_missed = 1;
    }
    for (int b = int(threadIdx.x); b < n_bins; b += select_threads) arg.work.bins[i * n_bins + b] = 0;
    return;
  }
  // Entries at the threshold in every range, then how many of them it may keep: the lowest indices of all.
  int* quotas = arg.work.quotas + int64_t(i) * arg.n_ranges;
  for (int r = int(threadIdx.x) / 32; r < arg.n_ranges; r += select_threads / 32) {
    int tied = 0;
    if (bits == bracket.high) {
      tied = counts[r].at_high;
    } else if (bits == bracket.low) {
      tied = counts[r].at_low;
    } else {
      for (int k = int(threadIdx.x) % 32; k < counts[r].inside; k += 32)
        tied += collected[int64_t(r) * arg.capacity + k] == bits;
      for (int step = 16; step > 0; step /= 2) tied += __shfl_xor_sync(0xFFFFFFFFu, tied, step);
    }
    if (threadIdx.x % 32 == 0) quotas[r] = tied;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const bool every = arg.options.all_at_threshold || bits == 0;  // a threshold of zero trims nothing
    const int lane = int(threadIdx.x);
    int64_t before = 0;
    for (int first = 0; first < arg.n_ranges; first += 32) {
      const int r = first + lane, tied = r < arg.n_ranges ? quotas[r] : 0;
      const int64_t up_to_here = before + sum_up_to_lane(tied), room = rank - (up_to_here - tied);
      const int64_t quota = room < 0 ? 0 : room < tied ? room : tied;
      if (r < arg.n_ranges) quotas[r] = every || quota == tied ? keep_all : int(quota);
      before = __shfl_sync(0xFFFFFFFFu, up_to_here, 31);
    }
    if (lane == 0) arg.work.chosen[i] = {bits, 0, keep, 0};
  }
}

// Where the bracket missed: how the next bits of magnitudes are distributed, of those that agree with what is known.
template <class T>
__global__ void __launch_bounds__(n_threads) histogram_kernel(const __grid_constant__ Arguments<T> arg, int shift,
                                                              int width) {
  __shared__ unsigned bins[n_bins];
  const int i = int(blockIdx.y);
  if (!arg.work.chosen[i].missed) return;
  for (int b = int(threadIdx.x); b < n_bins; b += n_threads) bins[b] = 0;
  __syncthreads();
  const int64_t first = arg.work.chosen[i].first, last = first + (int64_t(1) << width);
  const int64_t begin = blockIdx.x * arg.range, limit = begin + arg.range, end = limit < arg.n ? limit : arg.n;
  const T* data = static_cast<const T*>(arg.inputs[i].data);
  for (int64_t at = begin + int64_t(threadIdx.x); at < end; at += n_threads) {
    const int32_t bits = magnitude_bits(data[at], arg.base[at]);
    if (bits >= first && bits < last) atomicAdd(&bins[(bits - first) >> shift], 1u);
  }
  __syncthreads();
  for (int b = int(threadIdx.x); b < n_bins; b += n_threads)
    if (bins[b] != 0) atomicAdd(&arg.work.bins[i * n_bins + b], static_cast<unsigned long long>(bins[b]));
}

// One warp: one input. After the last bits its bracket is the threshold itself.
template <class T>
__global__ void __launch_bounds__(32) descend_kernel(const __grid_constant__ Arguments<T> arg, int shift) {
  const int i = int(blockIdx.x);
  if (!arg.work.chosen[i].missed) return;
  Threshold chosen = arg.work.chosen[i];
  descend(arg.work.bins + i * n_bins, shift, chosen.first, chosen.rank);
  __syncwarp();
  for (int b = int(threadIdx.x); b < n_bins; b += 32) arg.work.bins[i * n_bins + b] = 0;
  if (threadIdx.x == 0) {
    arg.work.chosen[i] = chosen;
    if (shift == 0) arg.work.brackets[i] = {int32_t(chosen.first), int32_t(chosen.first)};
  }
}

// --- Merging -------------------------------------------------------------------------------------------------------

// In shared memory: the inputs of merge_kernel, and where a range stands.
struct Running {
  int32_t bits[max_ties_tensors];
  int left[max_ties_tensors];  // entries at the threshold that may still be kept, or keep_all
  int by_warp[n_warps];
};

// Of `mine` tied entries of each thread, how many come before this thread's in the tile, and how many there are in all.
__device__ __forceinline__ int tied_before(Running& shared, int mine, int& all) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int before = sum_up_to_lane(mine);
  if (lane == 31) shared.by_warp[warp] = before;
  __syncthreads();
  all = 0;
  before -= mine;
  for (int w = 0; w < n_warps; ++w) {
    if (w < warp) before += shared.by_warp[w];
    all += shared.by_warp[w];
  }
  __syncthreads();  // all have read before the next input writes
  return before;
}

// One block: one range. Inputs are read twice, the second time from the first-level cache. `again`: only if the zero
// sums must be negative after all.
template <class T>
__global__ void __launch_bounds__(n_threads) merge_kernel(const __grid_constant__ Arguments<T> arg, bool again) {
  if (again && !(static_cast<long long>(*arg.work.sign_balance) < 0 && *arg.work.undecided > 0)) return;
  const bool zero_is_plus = !again;
  __shared__ Running shared;
  const int range = int(blockIdx.x);
  for (int i = int(threadIdx.x); i < arg.n_inputs; i += n_threads) {
    shared.bits[i] = arg.work.chosen[i].bits;
    shared.left[i] = arg.work.quotas[int64_t(i) * arg.n_ranges + range];
  }
  __syncthreads();
  const int64_t begin = range * arg.range, limit = begin + arg.range, end = limit < arg.n ? limit : arg.n;
  const bool base_aligned = aligned_to_entries(arg.base), out_aligned = aligned_to_entries(arg.out);
  const TiesOptions& options = arg.options;
  int first_nonfinite = arg.n_inputs, undecided = 0;
  int64_t sign_balance = 0;
  for (int64_t tile = begin; tile < end; tile += tile_entries) {
    const int64_t start = tile + int64_t(threadIdx.x) * per_thread;
    Entries<T> base;
    base.load(arg.base, start, end, base_aligned);
    float total[per_thread] = {}, sum[per_thread] = {}, divisor[per_thread] = {};

    // Hands weight (v - base) of every entry kept, otherwise 0, to use(k, u, weight). `last`: the quotas are spent.
    const auto for_each_kept = [&](bool last, const auto& use) {
      Entries<T> next;
      next.load_input(arg, 0, start, end);
      for (int i = 0; i < arg.n_inputs; ++i) {
        const Entries<T> v = next;
        if (i + 1 < arg.n_inputs) next.load_input(arg, i + 1, start, end);
        const float weight = arg.inputs[i].weight;
        const int32_t bound = shared.bits[i];
        const int left = shared.left[i];
        float delta[per_thread];
        int32_t bits[per_thread];
        int tied = 0;
#pragma unroll
        for (int k = 0; k < per_thread; ++k) {
          delta[k] = __fsub_rn(to_float(v.value[k]), to_float(base.value[k]));
          bits[k] = start + k < end ? int32_t(__float_as_uint(delta[k]) & 0x7FFFFFFFu) : -2;
          tied += bits[k] == bound;
          if (bits[k] >= infinity_bits && i < first_nonfinite) first_nonfinite = i;
        }
        int rank = 0, all = 0;
        if (left > 0) rank = tied_before(shared, tied, all);  // the same in all threads, and only where a quota ends
#pragma unroll
        for (int k = 0; k < per_thread; ++k) {
          const bool at_bound = bits[k] == bound;
          const bool kept = bits[k] > bound || (at_bound && (left == keep_all || rank < left));
          rank += at_bound;
          use(k, kept ? __fmul_rn(weight, delta[k]) : 0.0f, weight);
        }
        if (last && left > 0 && threadIdx.x == 0) shared.left[i] = left > all ? left - all : 0;  // all have read it
      }
    };

    for_each_kept(!options.elect, [&](int k, float u, float) { total[k] = __fadd_rn(total[k], u); });
    if (options.elect) {
      for_each_kept(true, [&](int k, float u, float weight) {
        const bool plus = zero_is_plus ? total[k] >= 0.0f : total[k] > 0.0f;
        const bool agrees = plus ? u > 0.0f : u < 0.0f;
        sum[k] = __fadd_rn(sum[k], agrees ? u : 0.0f);
        divisor[k] = __fadd_rn(divisor[k], agrees ? weight : 0.0f);
      });
    }
    Entries<T> out;
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const float added = options.elect ? sum[k] : total[k];
      const float by = !options.normalise ? options.divisor : divisor[k] == 0.0f ? 1.0f : divisor[k];
      const float merged = __fdiv_rn(__fmul_rn(options.scale, added), by);
      out.value[k] = from_float<T>(__fadd_rn(to_float(base.value[k]), merged));
      sign_balance += int(total[k] > 0.0f) - int(total[k] < 0.0f);
      undecided += total[k] == 0.0f && added != 0.0f;
    }
    out.store(arg.out, start, end, out_aligned);
    __syncthreads();  // the quotas are settled before the next tile
  }
  if (first_nonfinite < arg.n_inputs) atomicMin(arg.work.first_nonfinite, first_nonfinite);
  if (options.majority && !again) {
    for (int step = 16; step > 0; step /= 2) {
      sign_balance += __shfl_xor_sync(0xFFFFFFFFu, sign_balance, step);
      undecided |= __shfl_xor_sync(0xFFFFFFFFu, undecided, step);
    }
    if (threadIdx.x % 32 == 0) {
      atomicAdd(arg.work.sign_balance, static_cast<unsigned long long>(sign_balance));
      if (undecided) atomicOr(arg.work.undecided, 1);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(n_threads) poison_kernel(const __grid_constant__ Arguments<T> arg) {
  if (*arg.work.first_nonfinite >= arg.n_inputs) return;
  const int64_t begin = blockIdx.x * arg.range, limit = begin + arg.range, end = limit < arg.n ? limit : arg.n;
  for (int64_t at = begin + int64_t(threadIdx.x); at < end; at += n_threads)
    arg.out[at] = from_float<T>(__uint_as_float(0x7FC00000u));
}

// --- The launcher --------------------------------------------------------------------------------------------------

struct Layout {
  int64_t range;
  int n_ranges, capacity;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Layout layout_of(int64_t n, int n_multiprocessors) {
  const int64_t wanted = std::max<int64_t>(1, int64_t(n_multiprocessors) * blocks_per_multiprocessor);
  const int64_t range = ceil_div(ceil_div(n, wanted), tile_entries) * tile_entries;
  // A bracket holds some three per cent; up to four times that in one range. Counts of a range are 32 bits.
  const int64_t capacity = n <= small_entries ? range : range / 8;
  return {range, int(ceil_div(n, range)), int(capacity)};
}

// Lays the parts of the workspace out from `memory` on; returns their bytes.
size_t lay_out(Workspace& work, const Layout& layout, int64_t m, bool trims, char* memory) {
  size_t used = 0;
  const auto take = [&](auto*& part, int64_t count) {
    using Part = std::remove_reference_t<decltype(*part)>;
    part = reinterpret_cast<Part*>(memory + used);
    used += (size_t(count) * sizeof(Part) + 255) / 256 * 256;
  };
  take(work.counts, m * layout.n_ranges);
  take(work.quotas, m * layout.n_ranges);
  take(work.brackets, m);
  take(work.chosen, m);
  take(work.any_missed, 1);
  take(work.sign_balance, 1);
  take(work.undecided, 1);
  take(work.samples, trims ? m * sample_entries : 0);
  take(work.bins, trims ? m * n_bins : 0);
  take(work.collected, trims ? m * layout.n_ranges * layout.capacity : 0);
  return used;
}

bool any_trimmed(const TiesProblem& problem) {
  for (int i = 0; i < problem.n_inputs; ++i)
    if (problem.inputs[i].keep < problem.base.numel() && problem.inputs[i].keep > 0) return true;
  return false;
}

int layout_for(const TiesProblem& problem, Layout* layout) {
  int n_multiprocessors = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, problem.base.device_index);
  if (status == cudaSuccess) *layout = layout_of(problem.base.numel(), n_multiprocessors);
  return int(status);
}

template <class T>
int launch(const TiesProblem& problem, const Layout& layout, int* status, char* memory, cudaStream_t stream) {
  const int m = problem.n_inputs;
  const bool trims = any_trimmed(problem);
  Arguments<T> arg;
  arg.base = static_cast<const T*>(problem.base.data);
  arg.out = static_cast<T*>(problem.out.data);
  arg.n = problem.base.numel();
  arg.range = layout.range;
  arg.n_inputs = m;
  arg.n_ranges = layout.n_ranges;
  arg.capacity = layout.capacity;
  arg.options = problem.options;
  lay_out(arg.work, layout, m, trims, memory);
  arg.work.first_nonfinite = status;
  for (int i = 0; i < m; ++i) {
    const TiesInput& input = problem.inputs[i];
    arg.inputs[i] = {input.data, input.weight, input.keep};
  }

  const unsigned ranges = unsigned(layout.n_ranges), inputs = unsigned(m);
  const bool sampled = trims && arg.n > small_entries;
  if (sampled) sample_kernel<T><<<dim3(sample_entries / n_threads, inputs), n_threads, 0, stream>>>(arg);
  bracket_kernel<T><<<inputs, select_threads, 0, stream>>>(arg);
  if (trims) {
    count_kernel<T><<<ranges, n_threads, 0, stream>>>(arg, false);
    select_kernel<T><<<inputs, select_threads, 0, stream>>>(arg, false);
  }
  if (sampled) {  // otherwise everything was collected: nothing to miss
    int width = 31;
    for (const int shift : {20, 10, 0}) {
      histogram_kernel<T><<<dim3(ranges, inputs), n_threads, 0, stream>>>(arg, shift, width);
      descend_kernel<T><<<inputs, 32, 0, stream>>>(arg, shift);
      width = shift;
    }
    count_kernel<T><<<ranges, n_threads, 0, stream>>>(arg, true);
    select_kernel<T><<<inputs, select_threads, 0, stream>>>(arg, true);
  }
  merge_kernel<T><<<ranges, n_threads, 0, stream>>>(arg, false);
  if (problem.options.majority) merge_kernel<T><<<ranges, n_threads, 0, stream>>>(arg, true);
  poison_kernel<T><<<ranges, n_threads, 0, stream>>>(arg);
  return int(cudaGetLastError());
}

}  // namespace

int ties_workspace(const TiesProblem& problem, size_t* bytes) {
  Layout layout{};
  const int status = layout_for(problem, &layout);
  if (status != 0) return status;
  Workspace work;
  *bytes = lay_out(work, layout, problem.n_inputs, any_trimmed(problem), nullptr);
  return 0;
}

int ties(const TiesProblem& problem, int* status, void* workspace, void* stream) {
  const DeviceGuard guard(problem.base.device_index);
  if (guard.status() != 0) return guard.status();
  Layout layout{};
  if (const int code = layout_for(problem, &layout)) return code;
  char* memory = static_cast<char*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (problem.base.dtype) {
    case DType::f32: return launch<float>(problem, layout, status, memory, on);
    case DType::bf16: return launch<__nv_bfloat16>(problem, layout, status, memory, on);
    case DType::f16: return launch<__half>(problem, layout, status, memory, on);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace fastedit::cuda
