// Selection of the fewest neurons that hold a share of the activation mass, on a GPU.
//
// One block owns one row and keeps it in shared memory if it fits there, so that scores are read once from global
// memory; a longer row is read again in each pass. A radix search on the bit patterns of the scores finds the score at
// which the sum of larger ones reaches the wanted mass: for 11 bits at a time, from the top, a histogram in shared
// memory adds up the mass of the scores that agree with it so far. Masses are integers (grid_bits in the header), so
// the order in which threads add cannot change the result. Then warps count what they will select, and write mask and
// indices in order. Nothing waits for the host.
//
// Memory: scores once, mask, indices and counts once. neuron_scores reads the keys once; a thread owns a neuron, so
// sums have one order. gather_square reads what it selects once and writes coalesced.

#include "../neuron_select.h"

#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 1024;
constexpr int n_warps = n_threads / 32;
constexpr int digit_bits = 11;
constexpr int n_bins = 1 << digit_bits;

using Mass = unsigned long long;  // below 2^63

// --- Bit patterns ----------------------------------------------------------------------------------------------------

// The type a score is searched as; bfloat16 and float16 as float, whose lowest bits are then zero.
template <class Element>
struct Search {
  using Bits = uint32_t;
  static constexpr int mantissa = 23, bits = 31, rounds = sizeof(Element) == 2 ? 2 : 3;
  static __device__ __forceinline__ Bits pattern(Element v) { return __float_as_uint(to_float(v)); }
};
template <>
struct Search<double> {
  using Bits = unsigned long long;
  static constexpr int mantissa = 52, bits = 63, rounds = 6;
  static __device__ __forceinline__ Bits pattern(double v) { return Bits(__double_as_longlong(v)); }
};

// The whole grid steps in a score, where `largest_field` is the exponent field of the row's largest score.
template <class S>
__device__ __forceinline__ Mass steps_in(typename S::Bits pattern, int largest_field, int grid) {
  const int field = int(pattern >> S::mantissa);
  const Mass fraction = pattern & ((typename S::Bits(1) << S::mantissa) - 1);
  const Mass mantissa = field > 0 ? fraction | (Mass(1) << S::mantissa) : fraction;
  const int shift = grid - (S::mantissa + 1) - (largest_field - max(field, 1));
  return shift >= 0 ? mantissa << shift : -shift < 64 ? mantissa >> -shift : 0;
}

// The largest sum that does not yet decide.
__device__ __forceinline__ Mass limit_of(Mass total, double mass, bool prefix) {
  const double target = __dmul_rn(mass, __ull2double_rn(total));
  const Mass whole = Mass(target);
  return !prefix && double(whole) == target && whole > 0 ? whole - 1 : whole;
}

// --- Scans over a warp -----------------------------------------------------------------------------------------------

// Sum over this lane and those after it.
__device__ __forceinline__ Mass sum_from_lane(Mass value) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Mass other = __shfl_down_sync(~0u, value, step);
    if (lane + step < 32) value += other;
  }
  return value;
}

// --- The kernel ------------------------------------------------------------------------------------------------------

// What the threads of a block share besides row and histogram.
template <class Bits>
struct Shared {
  Bits largest[n_warps];
  Mass warp_sum[n_warps];
  int greater[n_warps], equal[n_warps];
  int invalid;
  Bits prefix;   // bits found so far
  Mass above;    // mass of the scores above all that agree with prefix
  Mass limit;
  int everything;
};

// Adds without waiting for other threads' sums; a 64-bit sum in two native additions, the carry going to the second.
__device__ __forceinline__ void add_mass(uint32_t* low, uint32_t* high, int bin, Mass mass) {
  const uint32_t part = uint32_t(mass);
  const uint32_t before = atomicAdd(&low[bin], part);
  const uint32_t carry = before + part < before ? 1u : 0u;
  const uint32_t rest = uint32_t(mass >> 32) + carry;
  if (rest != 0) atomicAdd(&high[bin], rest);
}

template <class Element, bool Staged>
__global__ void __launch_bounds__(n_threads, 1)
    select_kernel(const Element* scores, int64_t stride, int n, double mass, bool prefix_rule, int grid, bool* mask,
                  int32_t* indices, int32_t* counts) {
  using S = Search<Element>;
  using Bits = typename S::Bits;
  __shared__ uint32_t low[n_bins], high[n_bins];
  __shared__ Shared<Bits> shared;
  extern __shared__ __align__(16) unsigned char memory[];
  Element* const staged = reinterpret_cast<Element*>(memory);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t row = blockIdx.x;
  const Element* const from = scores + row * stride;
  mask += row * n;
  indices += row * n;

  auto pattern_at = [&](int i) -> Bits {
    const Bits bits = S::pattern(Staged ? staged[i] : from[i]);
    return bits == Bits(1) << S::bits ? 0 : bits;  // -0.0
  };

  // Largest score and validity: NaN, infinities and negative numbers have the largest patterns.
  if (thread == 0) {
    shared.prefix = 0;
    shared.above = 0;
    shared.everything = 0;
  }
  Bits largest = 0;
  for (int i = thread; i < n; i += n_threads) {
    if constexpr (Staged) staged[i] = from[i];
    largest = max(largest, pattern_at(i));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
  if (lane == 0) shared.largest[warp] = largest;
  __syncthreads();
  largest = shared.largest[lane];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));

  constexpr Bits infinity = ((Bits(1) << (S::bits - S::mantissa)) - 1) << S::mantissa;
  if (largest >= infinity) {
    for (int i = thread; i < n; i += n_threads) {
      mask[i] = false;
      indices[i] = -1;
    }
    if (thread == 0) counts[row] = 0;
    return;
  }

  Bits threshold = 0;
  int n_ties = n;
  if (largest == 0 && mass < 1.0) {
    n_ties = prefix_rule ? n : 1;
  } else if (mass < 1.0) {
    const int largest_field = max(int(largest >> S::mantissa), 1);
#pragma unroll 1
    for (int round = 0; round < S::rounds; ++round) {
      const int top = S::bits - round * digit_bits;  // bits below this one are still open
      const int shift = max(top - digit_bits, 0);
      const Bits found = shared.prefix;
      for (int i = thread; i < n_bins; i += n_threads) low[i] = high[i] = 0;
      __syncthreads();
      for (int i = thread; i < n; i += n_threads) {
        const Bits bits = pattern_at(i);
        if (bits >> top == found >> top)
          add_mass(low, high, int(bits >> shift) & ((1 << (top - shift)) - 1), steps_in<S>(bits, largest_field, grid));
      }
      __syncthreads();

      // Mass of each bin and those after it: a thread owns two bins.
      const Mass first = Mass(high[2 * thread]) << 32 | low[2 * thread];
      const Mass second = Mass(high[2 * thread + 1]) << 32 | low[2 * thread + 1];
      Mass from_here = sum_from_lane(first + second);
      if (lane == 0) shared.warp_sum[warp] = from_here;
      __syncthreads();
      const Mass later = sum_from_lane(shared.warp_sum[lane]);  // of the warps from `lane` on
      const Mass after_warp = __shfl_sync(~0u, later, (warp + 1) % 32);
      if (warp + 1 < n_warps) from_here += after_warp;
      if (round == 0) {
        const Mass total = __shfl_sync(~0u, later, 0);
        const Mass limit = limit_of(total, mass, prefix_rule);
        if (thread == 0) {
          shared.limit = limit;
          shared.everything = total <= limit;  // mass is so near to 1 that their product rounds up
        }
      }
      __syncthreads();
      if (shared.everything) break;
      const Mass above = shared.above, limit = shared.limit;
      __syncthreads();
      const Mass from_second = from_here - first, after = from_second - second;
      // Exactly one bin is the first, from the top, that passes the limit.
      if (above + from_here > limit && above + from_second <= limit) {
        shared.prefix = found | Bits(2 * thread) << shift;
        shared.above = above + from_second;
      } else if (above + from_second > limit && above + after <= limit) {
        shared.prefix = found | Bits(2 * thread + 1) << shift;
        shared.above = above + after;
      }
      __syncthreads();
    }
    if (!shared.everything) {
      threshold = shared.prefix;
      const Mass fit = (shared.limit - shared.above) / steps_in<S>(threshold, largest_field, grid);
      n_ties = prefix_rule ? (fit == 0 && shared.above == 0 ? 1 : int(fit)) : int(fit) + 1;
    }
  }

  // A warp owns a run of elements: it counts, learns what comes before it, and writes.
  const int run = (n + n_threads - 1) / n_threads * 32;
  const int begin = min(warp * run, n), end = min(begin + run, n);
  int greater = 0, equal = 0;
  for (int i = begin; i < end; i += 32) {
    const Bits bits = i + lane < end ? pattern_at(i + lane) : 0;
    greater += __popc(__ballot_sync(~0u, i + lane < end && bits > threshold));
    equal += __popc(__ballot_sync(~0u, i + lane < end && bits == threshold));
  }
  if (lane == 0) {
    shared.greater[warp] = greater;
    shared.equal[warp] = equal;
  }
  __syncthreads();
  greater = equal = 0;
  int n_greater = 0, n_equal = 0;
  for (int w = 0; w < n_warps; ++w) {
    if (w == warp) greater = n_greater, equal = n_equal;
    n_greater += shared.greater[w];
    n_equal += shared.equal[w];
  }
  const uint32_t before_lane = (1u << lane) - 1;
  for (int i = begin; i < end; i += 32) {
    const bool valid = i + lane < end;
    const Bits bits = valid ? pattern_at(i + lane) : 0;
    const uint32_t is_greater = __ballot_sync(~0u, valid && bits > threshold);
    const uint32_t is_equal = __ballot_sync(~0u, valid && bits == threshold);
    const int equal_before = equal + __popc(is_equal & before_lane);
    const bool selected = valid && (bits > threshold || (bits == threshold && equal_before < n_ties));
    if (valid) mask[i + lane] = selected;
    if (selected) indices[greater + __popc(is_greater & before_lane) + min(equal_before, n_ties)] = i + lane;
    greater += __popc(is_greater);
    equal += __popc(is_equal);
  }
  const int count = n_greater + min(n_equal, n_ties);
  for (int i = count + thread; i < n; i += n_threads) indices[i] = -1;
  if (thread == 0) counts[row] = count;
}

// --- Scores ----------------------------------------------------------------------------------------------------------

constexpr int score_threads = 64;  // few, so that a wide layer occupies every multiprocessor

template <class Element>
__global__ void __launch_bounds__(score_threads)
    scores_kernel(const Element* keys, int64_t stride_d, int64_t stride_n, int64_t d, int64_t n_keys, double* out) {
  const int64_t i = int64_t(blockIdx.x) * score_threads + threadIdx.x;
  if (i >= d) return;
  keys += i * stride_d;
  double sum = 0;
  constexpr int batch = 8;  // loads on their way at a time
  int64_t j = 0;
  for (; j + batch <= n_keys; j += batch) {
    Element values[batch];
#pragma unroll
    for (int k = 0; k < batch; ++k) values[k] = keys[(j + k) * stride_n];
#pragma unroll
    for (int k = 0; k < batch; ++k) sum += fabs(double(to_float(values[k])));
  }
  for (; j < n_keys; ++j) sum += fabs(double(to_float(keys[j * stride_n])));
  out[i] = sum;
}

// --- Square of a matrix ----------------------------------------------------------------------------------------------

constexpr int gather_threads = 256, gather_rows = 8;

template <class Word, class Index>
__global__ void __launch_bounds__(gather_threads)
    gather_kernel(const Word* matrix, int64_t stride_row, int64_t stride_column, int64_t d, const Index* indices,
                  int64_t stride_index, int64_t n, int64_t n_column_blocks, Word nan, Word* out) {
  const int64_t column = blockIdx.x % n_column_blocks * gather_threads + threadIdx.x;
  const int64_t first = blockIdx.x / n_column_blocks * gather_rows;
  if (column >= n) return;
  const int64_t from_column = indices[column * stride_index];
  const bool column_inside = from_column >= 0 && from_column < d;
  Word values[gather_rows];
#pragma unroll
  for (int r = 0; r < gather_rows; ++r) {
    const int64_t from_row = first + r < n ? int64_t(indices[(first + r) * stride_index]) : -1;
    const bool inside = column_inside && from_row >= 0 && from_row < d;
    values[r] = inside ? matrix[from_row * stride_row + from_column * stride_column] : nan;
  }
#pragma unroll
  for (int r = 0; r < gather_rows; ++r)
    if (first + r < n) out[(first + r) * n + column] = values[r];
}

// --- The launchers ---------------------------------------------------------------------------------------------------

template <class Element, bool Staged>
int launch_select(const TensorView& scores, double mass, SelectRule rule, const TensorView& mask,
                  const TensorView& indices, const TensorView& counts, size_t bytes, cudaStream_t stream) {
  const auto kernel = select_kernel<Element, Staged>;
  if (bytes > 0) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (status != cudaSuccess) return int(status);
  }
  kernel<<<unsigned(scores.shape[0]), n_threads, bytes, stream>>>(
      static_cast<const Element*>(scores.data), scores.stride[0], int(scores.shape[1]), mass,
      rule == SelectRule::prefix, grid_bits(scores.shape[1]), static_cast<bool*>(mask.data),
      static_cast<int32_t*>(indices.data), static_cast<int32_t*>(counts.data));
  return int(cudaGetLastError());
}

template <class Element>
int select_typed(const TensorView& scores, double mass, SelectRule rule, const TensorView& mask,
                 const TensorView& indices, const TensorView& counts, cudaStream_t stream) {
  int limit = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, scores.device_index);
  if (status != cudaSuccess) return int(status);
  const size_t bytes = size_t(scores.shape[1]) * sizeof(Element);
  const size_t fixed = 2 * n_bins * sizeof(uint32_t) + 2048;
  if (bytes + fixed <= size_t(limit))
    return launch_select<Element, true>(scores, mass, rule, mask, indices, counts, bytes, stream);
  return launch_select<Element, false>(scores, mass, rule, mask, indices, counts, 0, stream);
}

template <class Element>
int scores_typed(const TensorView& keys, const TensorView& out, cudaStream_t stream) {
  const int64_t d = keys.shape[0], blocks = (d + score_threads - 1) / score_threads;
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  scores_kernel<<<unsigned(blocks), score_threads, 0, stream>>>(static_cast<const Element*>(keys.data), keys.stride[0],
                                                                keys.stride[1], d, keys.shape[1],
                                                                static_cast<double*>(out.data));
  return int(cudaGetLastError());
}

template <class Word>
int gather_typed(const TensorView& matrix, const TensorView& indices, const TensorView& out, Word nan,
                 cudaStream_t stream) {
  const int64_t n = indices.shape[0], column_blocks = (n + gather_threads - 1) / gather_threads;
  const int64_t blocks = column_blocks * ((n + gather_rows - 1) / gather_rows);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  auto launch = [&](auto index) {
    using Index = decltype(index);
    gather_kernel<<<unsigned(blocks), gather_threads, 0, stream>>>(
        static_cast<const Word*>(matrix.data), matrix.stride[0], matrix.stride[1], matrix.shape[0],
        static_cast<const Index*>(indices.data), indices.stride[0], n, column_blocks, nan,
        static_cast<Word*>(out.data));
  };
  if (indices.dtype == DType::i64)
    launch(int64_t());
  else
    launch(int32_t());
  return int(cudaGetLastError());
}

}  // namespace

int neuron_select(const TensorView& scores, double mass, SelectRule rule, const TensorView& mask,
                  const TensorView& indices, const TensorView& counts, void* stream) {
  if (scores.shape[0] == 0) return 0;
  const DeviceGuard guard(scores.device_index);
  if (guard.status() != 0) return guard.status();
  if (scores.shape[0] > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const auto on = static_cast<cudaStream_t>(stream);
  if (scores.shape[1] == 0)
    return int(cudaMemsetAsync(counts.data, 0, size_t(scores.shape[0]) * sizeof(int32_t), on));
  switch (scores.dtype) {
    case DType::bf16: return select_typed<__nv_bfloat16>(scores, mass, rule, mask, indices, counts, on);
    case DType::f16: return select_typed<__half>(scores, mass, rule, mask, indices, counts, on);
    case DType::f32: return select_typed<float>(scores, mass, rule, mask, indices, counts, on);
    case DType::f64: return select_typed<double>(scores, mass, rule, mask, indices, counts, on);
    default: return int(cudaErrorInvalidValue);
  }
}

int neuron_scores(const TensorView& keys, const TensorView& out, void* stream) {
  if (keys.shape[0] == 0) return 0;
  const DeviceGuard guard(keys.device_index);
  if (guard.status() != 0) return guard.status();
  const auto on = static_cast<cudaStream_t>(stream);
  switch (keys.dtype) {
    case DType::bf16: return scores_typed<__nv_bfloat16>(keys, out, on);
    case DType::f16: return scores_typed<__half>(keys, out, on);
    case DType::f32: return scores_typed<float>(keys, out, on);
    case DType::f64: return scores_typed<double>(keys, out, on);
    default: return int(cudaErrorInvalidValue);
  }
}

int gather_square(const TensorView& matrix, const TensorView& indices, const TensorView& out, void* stream) {
  if (indices.shape[0] == 0) return 0;
  const DeviceGuard guard(matrix.device_index);
  if (guard.status() != 0) return guard.status();
  const auto on = static_cast<cudaStream_t>(stream);
  switch (matrix.dtype) {
    case DType::bf16: return gather_typed<uint16_t>(matrix, indices, out, 0x7FC0, on);
    case DType::f16: return gather_typed<uint16_t>(matrix, indices, out, 0x7E00, on);
    case DType::f32: return gather_typed<uint32_t>(matrix, indices, out, 0x7FC00000u, on);
    case DType::f64: return gather_typed<unsigned long long>(matrix, indices, out, 0x7FF8000000000000ull, on);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace fastedit::cuda
