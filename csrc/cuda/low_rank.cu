// weight += alpha * left rightᵀ on a GPU, in one pass over the weight.
//
// The stored weight has rows and columns; `by_row` and `by_column` are left and right, or right and left if the weight is
// stored transposed. A block of 256 threads, 16 by 16, owns a tile of 16 Rows by 128 columns; a thread owns Rows rows of 8
// adjacent columns: 16-byte accesses for 16-bit weights, two of them for float. The weights are requested first and arrive
// while the product is accumulated in fp32 from slices of 16 of the rank, staged in shared memory.
//
// Memory: weight read and written once, a residual written and, if it is carried, read once; factors once per row or
// column of tiles (from L2). Work: r multiply-adds an element, without tensor cores, whose inputs would round the factors.
// On an H200 (4.8 TB/s, 67 TFLOP/s) a bfloat16 element takes 0.83 ps of memory and 0.03 ps a rank: bound by memory up to
// a rank of about 28, above that the Triton kernel, which splits the factors for the tensor cores, comes first.

#include "../low_rank.h"

#include "../stochastic.h"
#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 256;
constexpr int side = 16;         // threads along either axis of a tile
constexpr int rank_slice = 16;
constexpr int thread_columns = 8;
constexpr int tile_columns = side * thread_columns;

template <class Real>
constexpr int thread_rows = sizeof(Real) == 8 ? 2 : 4;

template <class Weight, class Real>
struct Arguments {
  Weight* weight;
  const Real* by_row;
  const Real* by_column;
  int64_t n_rows, n_columns, rank, stride, stride_by_row, stride_by_column;
  Real alpha;
  uint64_t seed;
  int64_t row_step, column_step;  // how an element's index in the (d_out, d_in) orientation grows
  double* square_sums;            // one per block, or null
  float* residual;                // for 16-bit weights, or null
  int64_t stride_residual;
  bool carry;
};

// --- Random words ----------------------------------------------------------------------------------------------------

struct Words {
  uint32_t lane[4];
};

__device__ __forceinline__ Words philox(uint64_t index, uint64_t seed) {
  Words w{{uint32_t(index), uint32_t(index >> 32), 0, 0}};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, key0 += philox_key0_step, key1 += philox_key1_step)
    philox_round(w.lane[0], w.lane[1], w.lane[2], w.lane[3], key0, key1);
  return w;
}

// Words by element; neighbours that share a counter compute it once.
class WordSource {
 public:
  __device__ __forceinline__ explicit WordSource(uint64_t seed) : seed_(seed) {}
  __device__ __forceinline__ uint32_t operator()(int64_t element) {
    if (element / 4 != index_) {
      index_ = element / 4;
      words_ = philox(uint64_t(index_), seed_);
    }
    const int lane = int(element % 4);
    return lane == 0 ? words_.lane[0] : lane == 1 ? words_.lane[1] : lane == 2 ? words_.lane[2] : words_.lane[3];
  }

 private:
  uint64_t seed_;
  int64_t index_ = -1;
  Words words_;
};

__device__ __forceinline__ float stochastic(float v, uint32_t word, __nv_bfloat16) { return stochastic_bf16(v, word); }
__device__ __forceinline__ float stochastic(float v, uint32_t word, __half) { return stochastic_f16(v, word); }

// --- Eight adjacent weights ----------------------------------------------------------------------------------------------

template <class Weight>
struct __align__(16) Run {
  static constexpr int n_vectors = thread_columns * int(sizeof(Weight)) / 16;
  Weight value[thread_columns];

  template <bool Aligned>
  __device__ __forceinline__ void load(const Weight* from, int n) {
    if (Aligned && n == thread_columns) {
#pragma unroll
      for (int v = 0; v < n_vectors; ++v) reinterpret_cast<uint4*>(value)[v] = reinterpret_cast<const uint4*>(from)[v];
    } else {
#pragma unroll
      for (int i = 0; i < thread_columns; ++i) value[i] = i < n ? from[i] : Weight(0.0f);
    }
  }

  template <bool Aligned>
  __device__ __forceinline__ void store(Weight* to, int n) const {
    if (Aligned && n == thread_columns) {
#pragma unroll
      for (int v = 0; v < n_vectors; ++v) reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(value)[v];
    } else {
#pragma unroll
      for (int i = 0; i < thread_columns; ++i)
        if (i < n) to[i] = value[i];
    }
  }
};

// --- The product of a tile ------------------------------------------------------------------------------------------------

// Where a tile's column lies in shared memory: 16-byte strips of all threads side by side, so that neighbours read
// neighbouring banks.
template <class Real>
__device__ __forceinline__ int column_place(int column) {
  constexpr int width = 16 / sizeof(Real);
  const int thread = column / thread_columns, c = column % thread_columns;
  return c / width * (side * width) + thread * width + c % width;
}

// Transposes a slice of a factor's rows into shared memory: to[k][place(line)] = from[first + line][k0 + k], or zero.
template <int Lines, int Pitch, bool Columns, class Real>
__device__ __forceinline__ void stage_factor(Real* to, const Real* from, int64_t stride, int64_t first, int64_t n_lines,
                                             int64_t k0, int64_t rank) {
#pragma unroll 2  // loads in flight, against registers
  for (int i = 0; i < Lines * rank_slice / n_threads; ++i) {
    const int at = i * n_threads + int(threadIdx.x), line = at / rank_slice, k = at % rank_slice;
    const bool inside = first + line < n_lines && k0 + k < rank;
    const int place = Columns ? column_place<Real>(line) : line;
    to[k * Pitch + place] = inside ? from[(first + line) * stride + k0 + k] : Real(0);
  }
}

template <class Weight, class Real>
__device__ __forceinline__ void multiply(const Arguments<Weight, Real>& arg, int64_t row0, int64_t column0,
                                         Real (&sum)[thread_rows<Real>][thread_columns]) {
  constexpr int rows = thread_rows<Real>, tile_rows = side * rows, width = 16 / sizeof(Real);
  static_assert(rows == width, "a thread reads its rows of a step in one access");
  constexpr int row_pitch = tile_rows + width, column_pitch = tile_columns + width;
  __shared__ __align__(16) Real left[rank_slice * row_pitch];
  __shared__ __align__(16) Real right[rank_slice * column_pitch];
  const int ty = int(threadIdx.x) / side, tx = int(threadIdx.x) % side;
  for (int64_t k0 = 0; k0 < arg.rank; k0 += rank_slice) {
    if (k0 > 0) __syncthreads();  // the previous slice has been used by all
    stage_factor<tile_rows, row_pitch, false>(left, arg.by_row, arg.stride_by_row, row0, arg.n_rows, k0, arg.rank);
    stage_factor<tile_columns, column_pitch, true>(right, arg.by_column, arg.stride_by_column, column0, arg.n_columns,
                                                   k0, arg.rank);
    __syncthreads();
    const int steps = int(min(int64_t(rank_slice), arg.rank - k0));
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      __align__(16) Real a[rows], b[thread_columns];
      *reinterpret_cast<uint4*>(a) = *reinterpret_cast<const uint4*>(left + k * row_pitch + ty * rows);
#pragma unroll
      for (int s = 0; s < thread_columns / width; ++s)
        *reinterpret_cast<uint4*>(b + s * width) =
            *reinterpret_cast<const uint4*>(right + k * column_pitch + s * (side * width) + tx * width);
#pragma unroll
      for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int c = 0; c < thread_columns; ++c) sum[r][c] = fma(a[r], b[c], sum[r][c]);
    }
  }
}

// Sum over the block, in a fixed order; valid in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double values[n_threads];
  values[threadIdx.x] = value;
  for (int half = n_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) values[threadIdx.x] += values[threadIdx.x + half];
  }
  return values[0];
}

// --- Kernels ----------------------------------------------------------------------------------------------------------------

template <class Weight, class Real, bool Aligned, bool Stochastic, bool Residual>
__global__ void __launch_bounds__(n_threads) low_rank_kernel(Arguments<Weight, Real> arg) {
  constexpr int rows = thread_rows<Real>;
  const int64_t tiles_across = (arg.n_columns + tile_columns - 1) / tile_columns;
  const int64_t row0 = int64_t(blockIdx.x) / tiles_across * (side * rows);
  const int64_t column0 = int64_t(blockIdx.x) % tiles_across * tile_columns;
  const int64_t row = row0 + int(threadIdx.x) / side * rows;
  const int64_t column = column0 + int(threadIdx.x) % side * thread_columns;
  const int64_t left = arg.n_columns - column;
  const int n = left > 0 ? int(min(left, int64_t(thread_columns))) : 0;

  Run<Weight> run[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r)
    if (row + r < arg.n_rows && n > 0) run[r].template load<Aligned>(arg.weight + (row + r) * arg.stride + column, n);

  Real sum[rows][thread_columns] = {};
  multiply(arg, row0, column0, sum);

  double squares = 0.0;
  [[maybe_unused]] WordSource words(arg.seed);
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (row + r >= arg.n_rows || n == 0) continue;
    [[maybe_unused]] Run<float> lost;
    [[maybe_unused]] float* const residual = arg.residual + (row + r) * arg.stride_residual + column;
    if constexpr (Residual)
      if (arg.carry) lost.template load<Aligned>(residual, n);
#pragma unroll
    for (int c = 0; c < thread_columns; ++c) {
      const Real delta = arg.alpha * sum[r][c];
      if (arg.square_sums && c < n) squares += double(delta) * double(delta);
      Real value = Real(to_float(run[r].value[c]));
      if constexpr (Residual)
        if (arg.carry) value += lost.value[c];
      value += delta;
      [[maybe_unused]] const Real before = value;
      if constexpr (Stochastic) {
        const int64_t element = (row + r) * arg.row_step + (column + c) * arg.column_step;
        value = stochastic(value, words(element), Weight());
      }
      run[r].value[c] = from_float<Weight, Real>(value);
      if constexpr (Residual) {
        const float stored = to_float(run[r].value[c]);
        lost.value[c] = isfinite(stored) ? before - stored : 0.0f;
      }
    }
    run[r].template store<Aligned>(arg.weight + (row + r) * arg.stride + column, n);
    if constexpr (Residual) lost.template store<Aligned>(residual, n);
  }
  if (arg.square_sums) {
    const double sum_of_block = block_sum(squares);
    if (threadIdx.x == 0) arg.square_sums[blockIdx.x] = sum_of_block;
  }
}

// One block: the root of the sum of the blocks' sums, in a fixed order.
template <class Out>
__global__ void __launch_bounds__(n_threads) norm_kernel(const double* square_sums, int64_t n, Out* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += n_threads) sum += square_sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = Out(sqrt(sum));
}

// --- Launchers --------------------------------------------------------------------------------------------------------------

int64_t n_tiles(const TensorView& weight) {
  const int64_t rows = side * (weight.dtype == DType::f64 ? thread_rows<double> : thread_rows<float>);
  return ((weight.shape[0] + rows - 1) / rows) * ((weight.shape[1] + tile_columns - 1) / tile_columns);
}

template <class Weight, class Real, bool Residual>
int launch(const TensorView& weight, const TensorView& left, const TensorView& right, const LowRankOptions& options,
           double* square_sums, const TensorView* residual, cudaStream_t stream) {
  const TensorView& by_row = options.transposed ? right : left;
  const TensorView& by_column = options.transposed ? left : right;
  const Arguments<Weight, Real> arg{static_cast<Weight*>(weight.data),
                                    static_cast<const Real*>(by_row.data),
                                    static_cast<const Real*>(by_column.data),
                                    weight.shape[0],
                                    weight.shape[1],
                                    left.shape[1],
                                    weight.stride[0],
                                    by_row.stride[0],
                                    by_column.stride[0],
                                    Real(options.alpha),
                                    options.seed,
                                    options.transposed ? 1 : weight.shape[1],
                                    options.transposed ? weight.shape[0] : 1,
                                    square_sums,
                                    residual ? static_cast<float*>(residual->data) : nullptr,
                                    residual ? residual->stride[0] : 0,
                                    options.carry};
  const int64_t blocks = n_tiles(weight);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const bool aligned = aligned_rows(weight.data, weight.stride[0] * int64_t(sizeof(Weight)), weight.shape[0]) &&
                       (!residual || aligned_rows(residual->data, residual->stride[0] * int64_t(sizeof(float)),
                                                  residual->shape[0]));
  constexpr bool rounds = sizeof(Weight) == 2;
  const unsigned grid = unsigned(blocks);
  if (rounds && options.stochastic) {
    if (aligned)
      low_rank_kernel<Weight, Real, true, rounds, Residual><<<grid, n_threads, 0, stream>>>(arg);
    else
      low_rank_kernel<Weight, Real, false, rounds, Residual><<<grid, n_threads, 0, stream>>>(arg);
  } else if (aligned) {
    low_rank_kernel<Weight, Real, true, false, Residual><<<grid, n_threads, 0, stream>>>(arg);
  } else {
    low_rank_kernel<Weight, Real, false, false, Residual><<<grid, n_threads, 0, stream>>>(arg);
  }
  return int(cudaGetLastError());
}

template <class Weight>
int launch_rounding(const TensorView& weight, const TensorView& left, const TensorView& right,
                    const LowRankOptions& options, double* square_sums, const TensorView* residual,
                    cudaStream_t stream) {
  if (residual) return launch<Weight, float, true>(weight, left, right, options, square_sums, residual, stream);
  return launch<Weight, float, false>(weight, left, right, options, square_sums, nullptr, stream);
}

int launch_typed(const TensorView& weight, const TensorView& left, const TensorView& right,
                 const LowRankOptions& options, double* square_sums, const TensorView* residual, cudaStream_t stream) {
  switch (weight.dtype) {
    case DType::f64: return launch<double, double, false>(weight, left, right, options, square_sums, nullptr, stream);
    case DType::f32: return launch<float, float, false>(weight, left, right, options, square_sums, nullptr, stream);
    case DType::bf16:
      return launch_rounding<__nv_bfloat16>(weight, left, right, options, square_sums, residual, stream);
    case DType::f16: return launch_rounding<__half>(weight, left, right, options, square_sums, residual, stream);
    default: return int(cudaErrorInvalidValue);
  }
}

int write_norm(const double* square_sums, int64_t n, const TensorView& out, cudaStream_t stream) {
  if (out.dtype == DType::f64)
    norm_kernel<<<1, n_threads, 0, stream>>>(square_sums, n, static_cast<double*>(out.data));
  else
    norm_kernel<<<1, n_threads, 0, stream>>>(square_sums, n, static_cast<float*>(out.data));
  return int(cudaGetLastError());
}

}  // namespace

int64_t low_rank_workspace_doubles(const TensorView& weight) { return n_tiles(weight) + 1; }

int low_rank(const TensorView& weight, const TensorView& left, const TensorView& right, const LowRankOptions& options,
             const TensorView* out_norm, const TensorView* residual, double* workspace, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const DeviceGuard guard(weight.device_index);
  if (guard.status() != 0) return guard.status();
  const bool nothing = weight.numel() == 0 || (left.shape[1] == 0 && !residual);
  const int64_t n = nothing ? 0 : n_tiles(weight);
  double* square_sums = out_norm ? workspace : nullptr;
  if (n > 0) {
    const int status = launch_typed(weight, left, right, options, square_sums, residual, stream);
    if (status != 0) return status;
  }
  return out_norm ? write_norm(square_sums, n, *out_norm, stream) : 0;
}

}  // namespace fastedit::cuda
