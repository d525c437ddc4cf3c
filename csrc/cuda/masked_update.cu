// Masked optimiser steps on a GPU, in one pass over the parameter.
//
// A block of 256 threads works on 4096 entries, a thread on four groups of four consecutive ones: a group is one Philox
// counter, and where all tensors are contiguous one vector access to each. All groups are loaded before the first is
// computed. A parameter stored column by column is gone through with neighbouring threads in neighbouring rows, so that
// accesses stay coalesced.
//
// The block of Adam finds the places of its moments by one scan: the four groups' counts side by side in one word, on
// top of the block's cached rank.
//
// Memory: the parameter read and written, the gradient, clamp_to and the moments of selected entries, once each. Groups
// of which no entry is selected load no gradient, and no weight either where neither a decay nor a clamp reaches them.

#include "../masked_update.h"

#include "../philox.h"
#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 256;
constexpr int n_groups = 4;  // of a thread
constexpr int width = 4;     // entries of a group
constexpr int n_warps = n_threads / 32;
static_assert(n_threads * n_groups * width == mask_block, "a block of threads has one cached rank");

// A tensor of one of three element types; null if it is not there.
struct Matrix {
  char* data;
  DType dtype;
  int64_t stride0, stride1;
  bool aligned;  // groups can be loaded at once
};

struct Arguments {
  Matrix param, grad, clamp_to;
  int64_t n, rows, columns;
  bool by_column;  // neighbouring threads take neighbouring rows; columns divides by 4
  Mask mask;
};

// --- Groups of four entries ------------------------------------------------------------------------------------------

// As they lie in memory: 16 bytes of fp32, or 8 of a 16-bit type in x and y.
struct Raw {
  uint32_t word[4];
};

struct Values {
  float value[width];
};

__device__ __forceinline__ float half_of(uint32_t word, bool high, DType dtype) {
  const uint16_t bits = uint16_t(high ? word >> 16 : word);
  return dtype == DType::bf16 ? __uint_as_float(uint32_t(bits) << 16) : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint32_t to_half(float value, DType dtype) {
  return dtype == DType::bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value)) : __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ Values values_of(const Raw& raw, DType dtype) {
  Values v;
  if (dtype == DType::f32) {
#pragma unroll
    for (int k = 0; k < width; ++k) v.value[k] = __uint_as_float(raw.word[k]);
  } else {
#pragma unroll
    for (int k = 0; k < width; ++k) v.value[k] = half_of(raw.word[k / 2], k % 2, dtype);
  }
  return v;
}

// Four consecutive entries, or fewer.
struct Group {
  int64_t entry;        // the first
  int64_t row, column;  // where it lies; not for contiguous tensors
  int n;                // how many there are, 0 beyond the end
  uint32_t bits;        // which of them are selected
};

// Where the k-th of them lies, in elements.
template <bool Flat>
__device__ __forceinline__ int64_t place(const Matrix& m, const Group& group, int k, int64_t columns) {
  if (Flat) return group.entry + k;
  int64_t row = group.row, column = group.column + k;
  while (column >= columns) column -= columns, ++row;
  return row * m.stride0 + column * m.stride1;
}

// Conversions wait until all loads of a thread are on their way: nothing here uses what was loaded.
template <bool Flat>
__device__ __forceinline__ Raw load(const Matrix& m, const Group& group, int64_t columns) {
  Raw raw{};
  if (Flat && m.aligned && group.n == width) {
    if (m.dtype == DType::f32) {
      const uint4 v = *reinterpret_cast<const uint4*>(m.data + group.entry * 4);
      raw.word[0] = v.x, raw.word[1] = v.y, raw.word[2] = v.z, raw.word[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(m.data + group.entry * 2);
      raw.word[0] = v.x, raw.word[1] = v.y;
    }
    return raw;
  }
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= group.n) continue;
    const int64_t at = place<Flat>(m, group, k, columns);
    if (m.dtype == DType::f32)
      raw.word[k] = reinterpret_cast<const uint32_t*>(m.data)[at];
    else
      raw.word[k / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(m.data)[at]) << 16 * (k % 2);
  }
  return raw;
}

template <bool Flat>
__device__ __forceinline__ void store(const Matrix& m, const Group& group, int64_t columns, const Values& v) {
  if (Flat && m.aligned && group.n == width) {
    if (m.dtype == DType::f32)
      *reinterpret_cast<float4*>(m.data + group.entry * 4) = make_float4(v.value[0], v.value[1], v.value[2], v.value[3]);
    else
      *reinterpret_cast<uint2*>(m.data + group.entry * 2) =
          make_uint2(to_half(v.value[0], m.dtype) | to_half(v.value[1], m.dtype) << 16,
                     to_half(v.value[2], m.dtype) | to_half(v.value[3], m.dtype) << 16);
    return;
  }
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= group.n) continue;
    const int64_t at = place<Flat>(m, group, k, columns);
    if (m.dtype == DType::f32)
      reinterpret_cast<float*>(m.data)[at] = v.value[k];
    else
      reinterpret_cast<uint16_t*>(m.data)[at] = uint16_t(to_half(v.value[k], m.dtype));
  }
}

// --- Masks -------------------------------------------------------------------------------------------------------------

// The mask bits of the four entries of counter `counter`.
__device__ __forceinline__ uint32_t philox_nibble(const Mask& mask, uint64_t counter) {
  const PhiloxWords words = philox(counter, mask.seed, mask.shard, mask.layer);
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < width; ++k) bits |= uint32_t(words.word[k] < mask.threshold) << k;
  return bits;
}

// Of entries e to e + n - 1; e divides by 4.
__device__ __forceinline__ uint32_t selected(const Mask& mask, int64_t e, int n) {
  uint32_t bits = 0xF;
  if (mask.kind == Mask::Kind::philox)
    bits = philox_nibble(mask, uint64_t(e) / width);
  else if (mask.kind == Mask::Kind::bits)
    bits = static_cast<const uint8_t*>(mask.data)[e / 8] >> (e % 8);
  return bits & ((1u << n) - 1);
}

// --- What a thread works on ----------------------------------------------------------------------------------------------

template <bool Flat>
__device__ __forceinline__ Group group_of(const Arguments& arg, int i) {
  const int64_t g = (int64_t(blockIdx.x) * n_groups + i) * n_threads + threadIdx.x;
  Group group{g * width, 0, 0, 0, 0};
  if (group.entry >= arg.n) return group;
  group.n = int(min(arg.n - group.entry, int64_t(width)));
  if (!Flat && arg.by_column) {
    group.row = g % arg.rows;
    group.column = g / arg.rows * width;
    group.entry = group.row * arg.columns + group.column;
  } else if (!Flat) {
    group.row = group.entry / arg.columns;
    group.column = group.entry % arg.columns;
  }
  group.bits = selected(arg.mask, group.entry, group.n);
  return group;
}

__device__ __forceinline__ float clamped(float value, float to, float by) {
  const float low = to - by, high = to + by;
  return value < low ? low : value > high ? high : to != to ? to : value;
}

__device__ __forceinline__ void clamp_all(Values& v, const Raw& to, const Matrix& clamp_to, float by) {
  const Values middle = values_of(to, clamp_to.dtype);
#pragma unroll
  for (int k = 0; k < width; ++k) v.value[k] = clamped(v.value[k], middle.value[k], by);
}

// --- SGD -------------------------------------------------------------------------------------------------------------------

template <bool Flat>
__global__ void __launch_bounds__(n_threads) sgd_kernel(Arguments arg, SgdStep step) {
  const bool all = step.scope == DecayScope::all, decays = step.scope != DecayScope::none;
  const bool dense = all || arg.clamp_to.data;
  Group group[n_groups];
  Raw w[n_groups], g[n_groups], to[n_groups];
#pragma unroll
  for (int i = 0; i < n_groups; ++i) {
    group[i] = group_of<Flat>(arg, i);
    if (group[i].n > 0 && (dense || group[i].bits)) w[i] = load<Flat>(arg.param, group[i], arg.columns);
    if (group[i].bits) g[i] = load<Flat>(arg.grad, group[i], arg.columns);
    if (arg.clamp_to.data && group[i].n > 0)
      to[i] = load<Flat>(arg.clamp_to, group[i], arg.columns);
  }
#pragma unroll
  for (int i = 0; i < n_groups; ++i) {
    if (group[i].n == 0 || !(dense || group[i].bits)) continue;
    Values v = values_of(w[i], arg.param.dtype);
    const Values gradient = values_of(g[i], arg.grad.dtype);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const bool on = group[i].bits >> k & 1;
      float change = on ? gradient.value[k] : 0.0f;
      if (decays) change += step.decay * v.value[k];
      if (on || all) v.value[k] -= step.lr * change;
    }
    if (arg.clamp_to.data) clamp_all(v, to[i], arg.clamp_to, step.clamp);
    store<Flat>(arg.param, group[i], arg.columns, v);
  }
}

// --- Adam ------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float adam_one(const AdamStep& step, float w, float g, float& m, float& v) {
  if (step.gradient_decay != 0) g += step.gradient_decay * w;
  if (step.scope != DecayScope::none) w -= step.weight_decay * w;
  m += step.first_rate * (g - m);
  v = step.second * v + step.second_rate * g * g;
  return w - step.rate * m / (sqrtf(v) * step.correction + step.eps);
}

// The sums of `counts`, four numbers of 16 bits, over the threads before this one and over all of the block.
__device__ __forceinline__ uint64_t scan(uint64_t counts, uint64_t& total) {
  __shared__ uint64_t of_warp[n_warps];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  uint64_t sum = counts;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, (unsigned long long)sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  uint64_t before = sum - counts;
  total = 0;
#pragma unroll
  for (int k = 0; k < n_warps; ++k) {
    if (k < warp) before += of_warp[k];
    total += of_warp[k];
  }
  return before;
}

template <bool Flat>
__global__ void __launch_bounds__(n_threads) adam_kernel(Arguments arg, AdamState state, AdamStep step) {
  const bool all = step.scope == DecayScope::all, dense = all || arg.clamp_to.data;
  Group group[n_groups];
  uint64_t counts = 0;
#pragma unroll
  for (int i = 0; i < n_groups; ++i) {
    group[i] = group_of<Flat>(arg, i);
    counts |= uint64_t(__popc(group[i].bits)) << (16 * i);
  }
  uint64_t total;
  const uint64_t before = scan(counts, total);
  int64_t rank = arg.mask.kind == Mask::Kind::all ? int64_t(blockIdx.x) * mask_block : state.offsets[blockIdx.x];
#pragma unroll
  for (int i = 0; i < n_groups; ++i) {
    const int64_t first = rank + int64_t(before >> (16 * i) & 0xFFFF);
    rank += int64_t(total >> (16 * i) & 0xFFFF);
    if (group[i].n == 0 || !(dense || group[i].bits)) continue;
    Values v = values_of(load<Flat>(arg.param, group[i], arg.columns), arg.param.dtype);
    Raw to{};
    if (arg.clamp_to.data) to = load<Flat>(arg.clamp_to, group[i], arg.columns);
    Values gradient{};
    if (group[i].bits) gradient = values_of(load<Flat>(arg.grad, group[i], arg.columns), arg.grad.dtype);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (group[i].bits >> k & 1) {
        const int64_t at = first + __popc(group[i].bits & ((1u << k) - 1));
        float m = state.first[at], s = state.second[at];
        v.value[k] = adam_one(step, v.value[k], gradient.value[k], m, s);
        state.first[at] = m;
        state.second[at] = s;
      } else if (all) {
        v.value[k] -= step.weight_decay * v.value[k];
      }
    }
    if (arg.clamp_to.data) clamp_all(v, to, arg.clamp_to, step.clamp);
    store<Flat>(arg.param, group[i], arg.columns, v);
  }
}

// --- Few entries, given by index ---------------------------------------------------------------------------------------------

__device__ __forceinline__ Group single(int64_t e, int64_t columns) { return {e, e / columns, e % columns, 1, 1}; }

__device__ __forceinline__ float load_one(const Matrix& m, const Group& group, int64_t columns) {
  return values_of(load<false>(m, group, columns), m.dtype).value[0];
}

// The i-th index, or -1 if it lies outside the tensor.
__device__ __forceinline__ int64_t index_at(const Arguments& arg, int64_t i) {
  const int64_t e = arg.mask.wide ? static_cast<const int64_t*>(arg.mask.data)[i]
                                  : int64_t(static_cast<const int32_t*>(arg.mask.data)[i]);
  return e >= 0 && e < arg.n ? e : -1;
}

__global__ void __launch_bounds__(n_threads) listed_sgd_kernel(Arguments arg, SgdStep step) {
  const int64_t i = int64_t(blockIdx.x) * n_threads + threadIdx.x;
  if (i >= arg.mask.size) return;
  const int64_t e = index_at(arg, i);
  if (e < 0) return;
  const Group group = single(e, arg.columns);
  const float w = load_one(arg.param, group, arg.columns);
  float change = load_one(arg.grad, group, arg.columns);
  if (step.scope != DecayScope::none) change += step.decay * w;
  store<false>(arg.param, group, arg.columns, Values{{w - step.lr * change}});
}

__global__ void __launch_bounds__(n_threads) listed_adam_kernel(Arguments arg, AdamState state, AdamStep step) {
  const int64_t i = int64_t(blockIdx.x) * n_threads + threadIdx.x;
  if (i >= arg.mask.size) return;
  const int64_t e = index_at(arg, i);
  if (e < 0) return;
  const Group group = single(e, arg.columns);
  const float g = load_one(arg.grad, group, arg.columns);
  float m = state.first[i], v = state.second[i];
  const float w = adam_one(step, load_one(arg.param, group, arg.columns), g, m, v);
  state.first[i] = m;
  state.second[i] = v;
  store<false>(arg.param, group, arg.columns, Values{{w}});
}

// --- Bits --------------------------------------------------------------------------------------------------------------------

// A thread writes four bytes.
__global__ void __launch_bounds__(n_threads) bits_kernel(uint8_t* bits, int64_t n_bytes, Mask mask, int64_t start) {
  const int64_t first = (int64_t(blockIdx.x) * n_threads + threadIdx.x) * 4;
  if (first >= n_bytes) return;
  const uint64_t counter = uint64_t(start + first * 8) / width;
  uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) word |= philox_nibble(mask, counter + k) << (4 * k);
  if (first + 4 <= n_bytes && reinterpret_cast<uintptr_t>(bits) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(bits + first) = word;
  } else {
    for (int k = 0; k < 4 && first + k < n_bytes; ++k) bits[first + k] = uint8_t(word >> (8 * k));
  }
}

// --- Launchers ---------------------------------------------------------------------------------------------------------------

Matrix matrix_of(const TensorView& view) {
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (view.dtype == DType::f32 ? 16 : 8) == 0;
  return {static_cast<char*>(view.data), view.dtype, view.stride[0], view.stride[1], aligned};
}

bool is_contiguous(const TensorView& view) {
  return (view.shape[1] == 1 || view.stride[1] == 1) && (view.shape[0] == 1 || view.stride[0] == view.shape[1]);
}

bool is_served(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16; }

int64_t blocks_for(int64_t n, int64_t of_block) { return (n + of_block - 1) / of_block; }

// Checks, and calls launch(arguments, flat, grid).
template <class Launch>
int launch_with(const TensorView& param, const TensorView& grad, const Mask& mask, const TensorView* clamp_to,
                bool any_order, const Launch& launch) {
  const int64_t n = param.numel();
  const bool listed = mask.kind == Mask::Kind::indices;
  if (n == 0 || (listed && mask.size == 0)) return 0;
  if (!is_served(param.dtype) || !is_served(grad.dtype) || (clamp_to && !is_served(clamp_to->dtype)))
    return int(cudaErrorInvalidValue);
  const DeviceGuard guard(param.device_index);
  if (guard.status() != 0) return guard.status();
  Arguments arg{matrix_of(param), matrix_of(grad), clamp_to ? matrix_of(*clamp_to) : Matrix{}, n, param.shape[0],
                param.shape[1], false, mask};
  const bool flat = is_contiguous(param) && is_contiguous(grad) && (!clamp_to || is_contiguous(*clamp_to));
  arg.by_column = any_order && !flat && param.stride[0] == 1 && param.shape[1] % width == 0;
  const int64_t blocks = listed ? blocks_for(mask.size, n_threads) : blocks_for(n, mask_block);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  launch(arg, flat, unsigned(blocks));
  return int(cudaGetLastError());
}

}  // namespace

int masked_sgd(const TensorView& param, const TensorView& grad, const Mask& mask, const SgdStep& step,
               const TensorView* clamp_to, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  return launch_with(param, grad, mask, clamp_to, true, [&](const Arguments& arg, bool flat, unsigned grid) {
    if (mask.kind == Mask::Kind::indices)
      listed_sgd_kernel<<<grid, n_threads, 0, stream>>>(arg, step);
    else if (flat)
      sgd_kernel<true><<<grid, n_threads, 0, stream>>>(arg, step);
    else
      sgd_kernel<false><<<grid, n_threads, 0, stream>>>(arg, step);
  });
}

int masked_adam(const TensorView& param, const TensorView& grad, const Mask& mask, const AdamState& state,
                const AdamStep& step, const TensorView* clamp_to, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  return launch_with(param, grad, mask, clamp_to, false, [&](const Arguments& arg, bool flat, unsigned grid) {
    if (mask.kind == Mask::Kind::indices)
      listed_adam_kernel<<<grid, n_threads, 0, stream>>>(arg, state, step);
    else if (flat)
      adam_kernel<true><<<grid, n_threads, 0, stream>>>(arg, state, step);
    else
      adam_kernel<false><<<grid, n_threads, 0, stream>>>(arg, state, step);
  });
}

int philox_bits(const TensorView& bits, const Mask& mask, int64_t start, void* stream_handle) {
  const DeviceGuard guard(bits.device_index);
  if (guard.status() != 0) return guard.status();
  const int64_t blocks = blocks_for(bits.numel(), int64_t(n_threads) * 4);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  bits_kernel<<<unsigned(blocks), n_threads, 0, static_cast<cudaStream_t>(stream_handle)>>>(
      static_cast<uint8_t*>(bits.data), bits.numel(), mask, start);
  return int(cudaGetLastError());
}

}  // namespace fastedit::cuda
