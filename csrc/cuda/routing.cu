// scores[t, m] = ‖σ(W0 x_t + b) − σ(W_m x_t + b)‖ over the outputs, on a GPU.
//
// A block owns some tokens and some outputs. It multiplies its tokens with its rows of the base weight, keeps the
// activated results in registers, and does the same with one memory after the other: each weight is read once for each
// tile of tokens, and only sums of squares are written. Tiles of tokens and weights come through a ring of
// shared-memory stages by asynchronous copies, which does not run dry between weights.
//
//   bfloat16, float16   tensor cores (mma.sync m16n8k16, fp32 accumulators, promoted every `promote_steps` of d_in)
//   float32             multiply-adds
//
// The block's sums go to partial[tile of outputs, memory, token]; a second kernel adds them up in the order of tiles:
// every sum has one owner and one order, so results are the same bits on every run, without atomics.
//
// Up to 16 tokens a call is bound by reading the weights; tiles are then narrow, so that there are blocks enough.

#include "../routing.h"

#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int few_tokens = 16;
constexpr int max_memories = 8;  // in a launch
constexpr int n_stages = 4;
constexpr int promote_steps = 512;

template <class Element>
struct Arguments {
  const Element* x;
  const Element* weight[1 + max_memories];  // the base, then the memories
  int64_t stride[1 + max_memories];
  const float* bias;  // may be null
  float* partial;     // of this launch's first memory
  int64_t n_tokens, d_in, d_out, stride_x, n_partial;  // n_partial: memories in a row of partial
  int n_weights;
  Activation activation;
};

// --- σ -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float relu(float y) { return y < 0.0f ? 0.0f : y; }  // NaN stays NaN
__device__ __forceinline__ float silu(float y) { return y / (1.0f + expf(-y)); }
__device__ __forceinline__ float gelu(float y) { return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f)); }
__device__ __forceinline__ float gelu_tanh(float y) {  // tanh(u/2) = 2 / (1 + e^-u) - 1
  return y / (1.0f + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
}

// Results stay in registers, so the loop is unrolled; the choice is the same for all threads.
template <int N>
__device__ __forceinline__ void activate(Activation activation, float (&y)[N]) {
  if (activation == Activation::silu) {
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = silu(y[k]);
  } else if (activation == Activation::gelu_tanh) {
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = gelu_tanh(y[k]);
  } else if (activation == Activation::gelu) {
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = gelu(y[k]);
  } else if (activation == Activation::relu) {
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = relu(y[k]);
  }
}

// --- Shapes of tiles -----------------------------------------------------------------------------------------------

// Tokens by outputs, and the bytes of d_in in a stage. Threads: WarpRows by WarpColumns warps.
struct Few {
  static constexpr int tokens = 16, outputs = 32, step_bytes = 256, warp_rows = 1, warp_columns = 4;
};
struct Many {
  static constexpr int tokens = 64, outputs = 128, step_bytes = 64, warp_rows = 2, warp_columns = 4;
};

template <class Element_, class Shape_, bool Columns_>
struct Tile {
  using Element = Element_;
  using Shape = Shape_;
  static constexpr bool columns = Columns_;  // weights are stored (d_in, d_out)
  static constexpr int n_threads = 32 * Shape::warp_rows * Shape::warp_columns;
  static constexpr int width = 16 / int(sizeof(Element));  // elements of a copy
  static constexpr int steps = Shape::step_bytes / int(sizeof(Element));
  static constexpr int x_pitch = steps + width;  // 16 bytes more: neighbouring rows meet different banks
  static constexpr int w_lines = columns ? steps : Shape::outputs;
  static constexpr int w_length = columns ? Shape::outputs : steps;
  static constexpr int w_pitch = w_length + width;
  static constexpr int stage_elements = Shape::tokens * x_pitch + w_lines * w_pitch;
};

// --- Loading -------------------------------------------------------------------------------------------------------

// Lines by Length elements of a matrix whose corner is at (line, first); zeros outside.
template <class Tile, int Lines, int Length, int Pitch, bool Aligned>
__device__ __forceinline__ void load_panel(typename Tile::Element* to, const typename Tile::Element* from,
                                           int64_t stride, int64_t line0, int64_t n_lines, int64_t first,
                                           int64_t length) {
  using Element = typename Tile::Element;
  constexpr int chunks = Length / Tile::width, total = Lines * chunks;
#pragma unroll
  for (int i = 0; i < (total + Tile::n_threads - 1) / Tile::n_threads; ++i) {
    const int chunk = i * Tile::n_threads + int(threadIdx.x);
    if (total % Tile::n_threads != 0 && chunk >= total) break;
    const int line = chunk / chunks, offset = chunk % chunks * Tile::width;
    const int64_t left = length - first - offset;
    const int n = line0 + line < n_lines && left > 0 ? int(left < Tile::width ? left : Tile::width) : 0;
    const Element* source = n > 0 ? from + (line0 + line) * stride + first + offset : from;
    Element* target = to + line * Pitch + offset;
    if constexpr (Aligned) {
      copy_16(target, source, n * int(sizeof(Element)));
    } else {
#pragma unroll
      for (int e = 0; e < Tile::width; ++e) target[e] = e < n ? source[e] : Element(0.0f);
    }
  }
}

// --- Multiplying, on tensor cores ----------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices_4(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

template <bool Transposing>
__device__ __forceinline__ void load_matrices_2(uint32_t (&to)[2], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposing)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void multiply_matrices(float* c, const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_matrices(float* c, const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A warp owns its share of the tile's tokens and outputs; sums lie as the instruction leaves them.
template <class Tile_>
struct TensorCores {
  using Tile = Tile_;
  using Element = typename Tile::Element;
  using Shape = typename Tile::Shape;
  static constexpr bool promotes = true;
  static constexpr int rows = Shape::tokens / Shape::warp_rows, columns = Shape::outputs / Shape::warp_columns;
  static constexpr int n_row_tiles = rows / 16, n_column_tiles = columns / 8;
  static constexpr int n_sums = n_row_tiles * n_column_tiles * 4;
  static constexpr int n_slots = Shape::warp_columns * 4;  // threads that share a token

  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }
  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
  static __device__ __forceinline__ int first_token() { return warp() / Shape::warp_columns * rows; }
  static __device__ __forceinline__ int first_output() { return warp() % Shape::warp_columns * columns; }

  static __device__ __forceinline__ void multiply(const Element* x, const Element* w, float (&sum)[n_sums]) {
    const int matrix = lane() / 8, line = lane() % 8;
#pragma unroll
    for (int k = 0; k < Tile::steps; k += 16) {
      uint32_t a[n_row_tiles][4], b[n_column_tiles][2];
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i)
        load_matrices_4(a[i], x + (first_token() + i * 16 + matrix % 2 * 8 + line) * Tile::x_pitch + k +
                                  matrix / 2 * 8);
#pragma unroll
      for (int j = 0; j < n_column_tiles; ++j) {
        const int output = first_output() + j * 8, half = matrix % 2 * 8;  // lanes 16 to 31 give no addresses
        const Element* from = Tile::columns ? w + (k + half + line) * Tile::w_pitch + output
                                            : w + (output + line) * Tile::w_pitch + k + half;
        load_matrices_2<Tile::columns>(b[j], from);
      }
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < n_column_tiles; ++j)
          multiply_matrices(&sum[(i * n_column_tiles + j) * 4], a[i], b[j], Element());
    }
  }

  // Where sum[k] belongs, and which of a token's threads this is.
  static __device__ __forceinline__ int token_of(int k) {
    return first_token() + k / (n_column_tiles * 4) * 16 + lane() / 4 + k % 4 / 2 * 8;
  }
  static __device__ __forceinline__ int output_of(int k) {
    return first_output() + k / 4 % n_column_tiles * 8 + lane() % 4 * 2 + k % 2;
  }
  static __device__ __forceinline__ int slot() { return warp() % Shape::warp_columns * 4 + lane() % 4; }

  // The sums of one token follow each other: (row tile, half) and then (column tile, one of two).
  static constexpr int n_own_tokens = n_row_tiles * 2;
  static __device__ __forceinline__ constexpr int sum_of(int own, int i) {
    return (own / 2 * n_column_tiles + i / 2) * 4 + own % 2 * 2 + i % 2;
  }
};

// --- Multiplying, element by element -------------------------------------------------------------------------------

// 16 threads along the outputs, the rest along the tokens.
template <class Tile_>
struct MultiplyAdd {
  using Tile = Tile_;
  using Element = typename Tile::Element;
  using Shape = typename Tile::Shape;
  static constexpr bool promotes = false;
  static constexpr int across = 16, down = Tile::n_threads / across;
  static constexpr int n_own_tokens = Shape::tokens / down, n_own_outputs = Shape::outputs / across;
  static constexpr int n_sums = n_own_tokens * n_own_outputs;
  static constexpr int n_slots = across;

  static __device__ __forceinline__ int tx() { return int(threadIdx.x) % across; }
  static __device__ __forceinline__ int ty() { return int(threadIdx.x) / across; }

  static __device__ __forceinline__ void multiply(const Element* x, const Element* w, float (&sum)[n_sums]) {
#pragma unroll 2
    for (int k = 0; k < Tile::steps; k += 4) {
      float a[n_own_tokens][4];
#pragma unroll
      for (int i = 0; i < n_own_tokens; ++i)
        *reinterpret_cast<float4*>(a[i]) = *reinterpret_cast<const float4*>(x + (ty() + i * down) * Tile::x_pitch + k);
#pragma unroll
      for (int j = 0; j < n_own_outputs; ++j) {
        float b[4];
        const int output = tx() + j * across;
        if constexpr (Tile::columns) {
#pragma unroll
          for (int e = 0; e < 4; ++e) b[e] = w[(k + e) * Tile::w_pitch + output];
        } else {
          *reinterpret_cast<float4*>(b) = *reinterpret_cast<const float4*>(w + output * Tile::w_pitch + k);
        }
#pragma unroll
        for (int i = 0; i < n_own_tokens; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i * n_own_outputs + j] = fmaf(a[i][e], b[e], sum[i * n_own_outputs + j]);
      }
    }
  }

  static __device__ __forceinline__ int token_of(int k) { return ty() + k / n_own_outputs * down; }
  static __device__ __forceinline__ int output_of(int k) { return tx() + k % n_own_outputs * across; }
  static __device__ __forceinline__ int slot() { return tx(); }
  static __device__ __forceinline__ constexpr int sum_of(int own, int i) { return own * n_own_outputs + i; }
};

// --- The kernels ---------------------------------------------------------------------------------------------------

template <class Math>
__device__ __forceinline__ void add_bias(float (&y)[Math::n_sums], const float* bias, int64_t first, int64_t d_out) {
#pragma unroll
  for (int k = 0; k < Math::n_sums; ++k) {
    const int64_t output = first + Math::output_of(k);
    if (output < d_out) y[k] += bias[output];
  }
}

template <class Math, bool Aligned>
__global__ void __launch_bounds__(Math::Tile::n_threads, 1)
    routing_kernel(const __grid_constant__ Arguments<typename Math::Element> arg) {
  using Tile = typename Math::Tile;
  using Element = typename Math::Element;
  using Shape = typename Tile::Shape;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float squares[Shape::tokens][Math::n_slots + 1];
  Element* const ring = reinterpret_cast<Element*>(memory);
  const int64_t token_tiles = (arg.n_tokens + Shape::tokens - 1) / Shape::tokens;
  const int64_t token0 = int64_t(blockIdx.x) % token_tiles * Shape::tokens;
  const int64_t tile = int64_t(blockIdx.x) / token_tiles, output0 = tile * Shape::outputs;
  const int64_t n_slices = (arg.d_in + Tile::steps - 1) / Tile::steps;
  const int64_t n_loads = n_slices * arg.n_weights;

  int64_t next = 0, next_slice = 0;  // the load to issue, counted over all weights, and its slice
  int next_weight = 0;
  auto load = [&] {
    if (next < n_loads) {
      Element* x = ring + next % n_stages * Tile::stage_elements;
      Element* w = x + Shape::tokens * Tile::x_pitch;
      const int64_t k = next_slice * Tile::steps;
      load_panel<Tile, Shape::tokens, Tile::steps, Tile::x_pitch, Aligned>(x, arg.x, arg.stride_x, token0,
                                                                           arg.n_tokens, k, arg.d_in);
      const Element* weight = arg.weight[next_weight];
      const int64_t stride = arg.stride[next_weight];
      if constexpr (Tile::columns)
        load_panel<Tile, Tile::w_lines, Tile::w_length, Tile::w_pitch, Aligned>(w, weight, stride, k, arg.d_in, output0,
                                                                                arg.d_out);
      else
        load_panel<Tile, Tile::w_lines, Tile::w_length, Tile::w_pitch, Aligned>(w, weight, stride, output0, arg.d_out,
                                                                                k, arg.d_in);
    }
    copies_commit();  // also when there was nothing: the groups are counted
    ++next;
    if (++next_slice == n_slices) {
      next_slice = 0;
      ++next_weight;
    }
  };

  float base[Math::n_sums];
  for (int s = 0; s < n_stages - 1; ++s) load();
  int64_t done = 0;
  for (int weight = 0; weight < arg.n_weights; ++weight) {
    float sum[Math::n_sums] = {};
    [[maybe_unused]] float total[Math::promotes ? Math::n_sums : 1] = {};
    for (int64_t slice = 0; slice < n_slices; ++slice, ++done) {
      copies_wait<n_stages - 2>();
      __syncthreads();  // the slice has arrived for all threads, and all are done with the stage loaded next
      load();
      const Element* x = ring + done % n_stages * Tile::stage_elements;
      Math::multiply(x, x + Shape::tokens * Tile::x_pitch, sum);
      if constexpr (Math::promotes)
        if ((slice + 1) % (promote_steps / Tile::steps) == 0 || slice + 1 == n_slices) {
#pragma unroll
          for (int k = 0; k < Math::n_sums; ++k) {
            total[k] += sum[k];
            sum[k] = 0.0f;
          }
        }
    }
    if constexpr (Math::promotes) {
#pragma unroll
      for (int k = 0; k < Math::n_sums; ++k) sum[k] = total[k];
    }
    if (arg.bias != nullptr) add_bias<Math>(sum, arg.bias, output0, arg.d_out);
    activate(arg.activation, sum);
    if (weight == 0) {
#pragma unroll
      for (int k = 0; k < Math::n_sums; ++k) base[k] = sum[k];
      continue;
    }
#pragma unroll
    for (int own = 0; own < Math::n_own_tokens; ++own) {
      float square = 0.0f;  // outputs beyond d_out: both sides are σ(0)
#pragma unroll
      for (int i = 0; i < Math::n_sums / Math::n_own_tokens; ++i) {
        const float change = sum[Math::sum_of(own, i)] - base[Math::sum_of(own, i)];
        square = fmaf(change, change, square);
      }
      squares[Math::token_of(Math::sum_of(own, 0))][Math::slot()] = square;
    }
    __syncthreads();
    const int token = int(threadIdx.x);
    if (token < Shape::tokens && token0 + token < arg.n_tokens) {
      float square = 0.0f;
      for (int s = 0; s < Math::n_slots; ++s) square += squares[token][s];
      arg.partial[(tile * arg.n_partial + weight - 1) * arg.n_tokens + token0 + token] = square;
    }
    __syncthreads();  // before the next memory's squares
  }
}

// scores[t, m]: the square root of the sum over the tiles, in their order.
__global__ void finish_kernel(const float* partial, float* scores, int64_t n_tiles, int64_t n_memories,
                              int64_t n_tokens) {
  const int64_t n = n_memories * n_tokens, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double sum = 0.0;
  for (int64_t tile = 0; tile < n_tiles; ++tile) sum += double(partial[tile * n + i]);
  scores[i % n_tokens * n_memories + i / n_tokens] = float(sqrt(sum));
}

// --- The launcher --------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t output_tiles(int64_t n_tokens, int64_t d_out) {
  return ceil_div(d_out, n_tokens <= few_tokens ? Few::outputs : Many::outputs);
}

struct Problem {
  const TensorView& x;
  const TensorView& base;
  const TensorView* memories;
  int64_t n_memories;
  const float* bias;
  const RoutingOptions& options;
  float* partial;
  cudaStream_t stream;
  int64_t d_out() const { return base.shape[options.transposed ? 1 : 0]; }
  bool aligned() const {
    const int64_t element = size_of(x.dtype);
    bool all = aligned_rows(x.data, x.stride[0] * element, x.shape[0]) &&
               aligned_rows(base.data, base.stride[0] * element, base.shape[0]);
    for (int64_t m = 0; m < n_memories; ++m)
      all = all && aligned_rows(memories[m].data, memories[m].stride[0] * element, memories[m].shape[0]);
    return all;
  }
};

template <class Math, bool Aligned>
int launch(const Problem& p) {
  using Element = typename Math::Element;
  using Tile = typename Math::Tile;
  const auto kernel = routing_kernel<Math, Aligned>;
  constexpr size_t bytes = size_t(n_stages) * Tile::stage_elements * sizeof(Element);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (status != cudaSuccess) return int(status);
  const int64_t n_tokens = p.x.shape[0], tiles = output_tiles(n_tokens, p.d_out());
  const int64_t blocks = tiles * ceil_div(n_tokens, Tile::Shape::tokens);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  for (int64_t first = 0; first < p.n_memories; first += max_memories) {
    const int n = int(p.n_memories - first < max_memories ? p.n_memories - first : max_memories);
    Arguments<Element> arg{};
    arg.x = static_cast<const Element*>(p.x.data);
    for (int w = 0; w <= n; ++w) {
      const TensorView& view = w == 0 ? p.base : p.memories[first + w - 1];
      arg.weight[w] = static_cast<const Element*>(view.data);
      arg.stride[w] = view.stride[0];
    }
    arg.bias = p.bias;
    arg.partial = p.partial + first * n_tokens;
    arg.n_tokens = n_tokens;
    arg.d_in = p.x.shape[1];
    arg.d_out = p.d_out();
    arg.stride_x = p.x.stride[0];
    arg.n_partial = p.n_memories;
    arg.n_weights = n + 1;
    arg.activation = p.options.activation;
    kernel<<<unsigned(blocks), Tile::n_threads, bytes, p.stream>>>(arg);
    const cudaError_t launched = cudaGetLastError();
    if (launched != cudaSuccess) return int(launched);
  }
  return 0;
}

template <template <class> class Math, class Tile>
int launch_aligned(const Problem& p) {
  return p.aligned() ? launch<Math<Tile>, true>(p) : launch<Math<Tile>, false>(p);
}

template <template <class> class Math, class Element>
int launch_shaped(const Problem& p) {
  if (p.x.shape[0] <= few_tokens)
    return p.options.transposed ? launch_aligned<Math, Tile<Element, Few, true>>(p)
                                : launch_aligned<Math, Tile<Element, Few, false>>(p);
  return p.options.transposed ? launch_aligned<Math, Tile<Element, Many, true>>(p)
                              : launch_aligned<Math, Tile<Element, Many, false>>(p);
}

int launch_typed(const Problem& p) {
  switch (p.x.dtype) {
    case DType::bf16: return launch_shaped<TensorCores, __nv_bfloat16>(p);
    case DType::f16: return launch_shaped<TensorCores, __half>(p);
    case DType::f32: return launch_shaped<MultiplyAdd, float>(p);
    default: return int(cudaErrorInvalidValue);
  }
}

}  // namespace

int64_t routing_workspace_floats(const TensorView& x, const TensorView& base, int64_t n_memories,
                                 const RoutingOptions& options) {
  return output_tiles(x.shape[0], base.shape[options.transposed ? 1 : 0]) * n_memories * x.shape[0];
}

int routing(const TensorView& x, const TensorView& base, const TensorView* memories, int64_t n_memories,
            const TensorView* bias, const RoutingOptions& options, const TensorView& scores, float* workspace,
            void* stream) {
  const int64_t n_tokens = x.shape[0], n = n_tokens * n_memories;
  if (n == 0) return 0;
  for (int64_t m = 0; m < n_memories; ++m)
    if (memories[m].dtype != x.dtype) return int(cudaErrorInvalidValue);
  if (base.dtype != x.dtype) return int(cudaErrorInvalidValue);
  const DeviceGuard guard(x.device_index);
  if (guard.status() != 0) return guard.status();
  const float* bias_data = bias ? static_cast<const float*>(bias->data) : nullptr;
  const Problem problem{x, base, memories, n_memories, bias_data, options, workspace, static_cast<cudaStream_t>(stream)};
  const int status = launch_typed(problem);
  if (status != 0) return status;
  const int64_t blocks = ceil_div(n, 256);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  finish_kernel<<<unsigned(blocks), 256, 0, problem.stream>>>(
      workspace, static_cast<float*>(scores.data), output_tiles(n_tokens, problem.d_out()), n_memories, n_tokens);
  return int(cudaGetLastError());
}

}  // namespace fastedit::cuda
