// cov += xᵀ diag(mask) x on a GPU.
//
// A block of 256 threads owns one square of the lower triangle of cov and walks over its share of the tokens: every sum
// has one owner and one order, so results are the same bits on every run, without atomics. Panels of tokens by columns
// come through a ring of shared-memory stages by asynchronous copies; masked tokens and columns beyond d arrive as zeros.
//
//   bfloat16, float16   tensor cores (mma.sync m16n8k16, fp32 accumulators), fragments by transposing ldmatrix
//   float32             multiply-adds, 8x8 results a thread
//   float64             tensor cores (mma.sync m8n8k4), which round every sum
//
// 16-bit tensor cores truncate when they accumulate, so their sums are kept short: every `promote_tokens` they are added
// to a second set of registers, and every `flush_tokens` that is added to cov. The others round, and go to cov directly.
// The last flush writes the mirror image too.
//
// Where the squares do not fill the GPU evenly the tokens are split: each share of a square goes to a workspace, and a
// second kernel adds the shares to cov in a fixed order. Squares are numbered in bands of rows, so that those which run
// at the same time read few panels of x.
//
// Work: T d (d + side) multiply-adds. Memory: x about once for every n_multiprocessors squares, from L2 between them; the
// triangle of cov once. On sm_90 mma.sync reaches about two thirds of what wgmma does: there the Triton kernel, which is
// compiled to wgmma, comes first.

#include "../covariance.h"

#include <algorithm>

#include "../device.h"
#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 256;
constexpr int n_stages = 3;
constexpr int promote_tokens = 512;
constexpr int band_rows = 8;
constexpr int64_t max_splits = 32;
constexpr int64_t workspace_bytes = int64_t(256) << 20;

template <class Element>
struct Arguments {
  const Element* x;
  const uint8_t* mask;  // may be null
  int64_t n_tokens, d, stride_x, stride_mask;
  int64_t split_tokens;  // tokens of a block; a multiple of its steps
};

// Row and column of the k-th square of the lower triangle, row by row.
__device__ __forceinline__ void triangle_position(int64_t k, int64_t& row, int64_t& column) {
  row = static_cast<int64_t>((sqrt(8.0 * double(k) + 1.0) - 1.0) * 0.5);
  while (row * (row + 1) / 2 > k) --row;
  while ((row + 1) * (row + 2) / 2 <= k) ++row;
  column = k - row * (row + 1) / 2;
}

// The same triangle of n rows in bands, each column by column.
__device__ __forceinline__ void banded_position(int64_t k, int64_t n, int64_t& row, int64_t& column) {
  triangle_position(k, row, column);
  const int64_t top = row / band_rows * band_rows, height = min(int64_t(band_rows), n - top);
  k -= top * (top + 1) / 2;
  if (k < top * height) {
    row = top + k % height;
    column = k / height;
  } else {  // the triangle at the end of the band
    triangle_position(k - top * height, row, column);
    row += top;
    column += top;
  }
}

// --- Loading: Steps tokens by Side columns of x at (token, column), and at (token, other) unless they coincide -----

template <class Element, bool Aligned>
__device__ __forceinline__ void load_chunk(Element* to, const Arguments<Element>& arg, int64_t token, int64_t column,
                                           bool valid) {
  constexpr int width = 16 / sizeof(Element);
  const int64_t left = arg.d - column;
  const int n = valid && left > 0 ? int(left < width ? left : width) : 0;
  const Element* from = n > 0 ? arg.x + token * arg.stride_x + column : arg.x;
  if constexpr (Aligned) {
    copy_16(to, from, n * int(sizeof(Element)));
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) to[i] = i < n ? from[i] : Element(0.0f);
  }
}

template <class Element, int Side, int Steps, int Pitch, bool Aligned>
__device__ __forceinline__ void load_panels(Element* a, Element* b, const Arguments<Element>& arg, int64_t token,
                                            int64_t end, int64_t column, int64_t other) {
  constexpr int width = 16 / sizeof(Element), chunks = Side / width;
  static_assert(Steps * chunks % n_threads == 0, "threads share the chunks evenly");
#pragma unroll
  for (int i = 0; i < Steps * chunks / n_threads; ++i) {
    const int chunk = i * n_threads + int(threadIdx.x), step = chunk / chunks, offset = chunk % chunks * width;
    const int64_t t = token + step;
    const bool valid = t < end && (arg.mask == nullptr || arg.mask[t * arg.stride_mask] != 0);
    load_chunk<Element, Aligned>(a + step * Pitch + offset, arg, t, column + offset, valid);
    if (other != column)
      load_chunk<Element, Aligned>(b + step * Pitch + offset, arg, t, other + offset, valid);
  }
}

// --- Multiplying, on tensor cores ------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                  __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Eight warps, two by four; each owns Side/2 rows by Side/4 columns of the square.
template <class Element_, int Side_>
struct TensorCores {
  using Element = Element_;
  using Sum = float;
  static constexpr bool promotes = true;
  static constexpr int side = Side_, steps = 32, flush_tokens = 8192;
  static constexpr int pitch = Side_ + 8;  // 16 bytes more than a power of two: ldmatrix meets no bank twice
  static constexpr int rows = Side_ / 2, columns = Side_ / 4;
  static constexpr int n_row_tiles = rows / 16, n_column_tiles = columns / 8;
  static constexpr int n_sums = n_row_tiles * n_column_tiles * 4;

  static __device__ __forceinline__ int first_row() { return int(threadIdx.x) / 32 / 4 * rows; }
  static __device__ __forceinline__ int first_column() { return int(threadIdx.x) / 32 % 4 * columns; }

  // Shared memory holds tokens as rows; transposing on the way makes (row, token) and (token, column) fragments of it.
  static __device__ __forceinline__ void multiply(const Element* a, const Element* b, float (&sum)[n_sums]) {
    const int lane = int(threadIdx.x) % 32, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < steps; k += 16) {
      uint32_t left[n_row_tiles][4], right[n_column_tiles / 2][4];
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i)
        load_matrices(left[i], a + (k + matrix / 2 * 8 + line) * pitch + first_row() + i * 16 + matrix % 2 * 8);
#pragma unroll
      for (int j = 0; j < n_column_tiles / 2; ++j)
        load_matrices(right[j], b + (k + matrix % 2 * 8 + line) * pitch + first_column() + j * 16 + matrix / 2 * 8);
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < n_column_tiles; ++j) {
          float(&c)[4] = *reinterpret_cast<float(*)[4]>(&sum[(i * n_column_tiles + j) * 4]);
          multiply_matrices(c, left[i], &right[j / 2][j % 2 * 2], Element());
        }
    }
  }

  // Place of sum[k] in the square.
  static __device__ __forceinline__ int row_of(int k) {
    return first_row() + k / (n_column_tiles * 4) * 16 + int(threadIdx.x) % 32 / 4 + k % 4 / 2 * 8;
  }
  static __device__ __forceinline__ int column_of(int k) {
    return first_column() + k / 4 % n_column_tiles * 8 + int(threadIdx.x) % 4 * 2 + k % 2;
  }
};

// --- Multiplying, element by element -----------------------------------------------------------------------------------

// 16 by 16 threads; each owns per x per results, in strips of 16 bytes so that neighbours read neighbouring banks.
template <class Element_, int Side_>
struct MultiplyAdd {
  using Element = Element_;
  using Sum = Element_;
  static constexpr bool promotes = false;
  static constexpr int side = Side_, steps = 16, pitch = Side_, flush_tokens = 2048;
  static constexpr int width = 16 / sizeof(Element), per = Side_ / 16, strips = per / width;
  static constexpr int n_sums = per * per;

  static __device__ __forceinline__ int place(int thread, int i) { return i / width * 16 * width + thread * width + i % width; }

  static __device__ __forceinline__ void multiply(const Element* a, const Element* b, Sum (&sum)[n_sums]) {
    const int ty = int(threadIdx.x) / 16, tx = int(threadIdx.x) % 16;
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      __align__(16) Element left[per], right[per];
#pragma unroll
      for (int s = 0; s < strips; ++s) {
        *reinterpret_cast<uint4*>(&left[s * width]) =
            *reinterpret_cast<const uint4*>(a + k * pitch + place(ty, s * width));
        *reinterpret_cast<uint4*>(&right[s * width]) =
            *reinterpret_cast<const uint4*>(b + k * pitch + place(tx, s * width));
      }
#pragma unroll
      for (int i = 0; i < per; ++i)
#pragma unroll
        for (int j = 0; j < per; ++j) sum[i * per + j] = fma(left[i], right[j], sum[i * per + j]);
    }
  }

  static __device__ __forceinline__ int row_of(int k) { return place(int(threadIdx.x) / 16, k / per); }
  static __device__ __forceinline__ int column_of(int k) { return place(int(threadIdx.x) % 16, k % per); }
};

// --- Multiplying, float64 on tensor cores ------------------------------------------------------------------------------

// Eight warps, two by four, as above. A lane holds one element of an 8x4 and of a 4x8 fragment, and two of the result.
template <class Element_, int Side_>
struct DoubleTensorCores {
  using Element = Element_;
  using Sum = Element_;
  static constexpr bool promotes = false;
  static constexpr int side = Side_, steps = 16, flush_tokens = 2048;
  static constexpr int pitch = Side_ + 4;  // half a warp, four tokens by four columns, meets every pair of banks once
  static constexpr int rows = Side_ / 2, columns = Side_ / 4;
  static constexpr int n_row_tiles = rows / 8, n_column_tiles = columns / 8;
  static constexpr int n_sums = n_row_tiles * n_column_tiles * 2;

  static __device__ __forceinline__ int first_row() { return int(threadIdx.x) / 32 / 4 * rows; }
  static __device__ __forceinline__ int first_column() { return int(threadIdx.x) / 32 % 4 * columns; }

  static __device__ __forceinline__ void multiply(const Element* a, const Element* b, Sum (&sum)[n_sums]) {
    const int lane = int(threadIdx.x) % 32, line = lane / 4, token = lane % 4;
#pragma unroll
    for (int k = 0; k < steps; k += 4) {
      Element left[n_row_tiles], right[n_column_tiles];
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i) left[i] = a[(k + token) * pitch + first_row() + i * 8 + line];
#pragma unroll
      for (int j = 0; j < n_column_tiles; ++j) right[j] = b[(k + token) * pitch + first_column() + j * 8 + line];
#pragma unroll
      for (int i = 0; i < n_row_tiles; ++i)
#pragma unroll
        for (int j = 0; j < n_column_tiles; ++j) {
          double* c = &sum[(i * n_column_tiles + j) * 2];
          asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};\n"
                       : "+d"(c[0]), "+d"(c[1])
                       : "d"(left[i]), "d"(right[j]));
        }
    }
  }

  static __device__ __forceinline__ int row_of(int k) {
    return first_row() + k / (n_column_tiles * 2) * 8 + int(threadIdx.x) % 32 / 4;
  }
  static __device__ __forceinline__ int column_of(int k) {
    return first_column() + k / 2 % n_column_tiles * 8 + int(threadIdx.x) % 4 * 2 + k % 2;
  }
};

// --- The kernel ----------------------------------------------------------------------------------------------------------

// cov += sum below and on the diagonal; with `mirrored`, the result is written above it as well.
template <class Math, class Cov>
__device__ __forceinline__ void flush(typename Math::Sum (&sum)[Math::n_sums], Cov* cov, int64_t d, int64_t row0,
                                      int64_t column0, bool mirrored) {
#pragma unroll
  for (int k = 0; k < Math::n_sums; ++k) {
    const int64_t row = row0 + Math::row_of(k), column = column0 + Math::column_of(k);
    if (row < d && column <= row) {
      const Cov result = cov[row * d + column] + Cov(sum[k]);
      cov[row * d + column] = result;
      if (mirrored && column < row) cov[column * d + row] = result;
    }
    sum[k] = 0;
  }
}

// The same into a block's own square of the workspace, which the first flush fills.
template <class Math>
__device__ __forceinline__ void flush_partial(typename Math::Sum (&sum)[Math::n_sums], typename Math::Sum* square,
                                              bool first) {
#pragma unroll
  for (int k = 0; k < Math::n_sums; ++k) {
    typename Math::Sum& to = square[Math::row_of(k) * Math::side + Math::column_of(k)];
    to = first ? sum[k] : to + sum[k];
    sum[k] = 0;
  }
}

template <class Math>
constexpr size_t stage_elements() {
  return size_t(2) * Math::steps * Math::pitch;
}

template <class Math>
constexpr size_t shared_bytes() {
  return n_stages * stage_elements<Math>() * sizeof(typename Math::Element);
}

// With Partial, sums go to partials[split][square], and add_partials_kernel follows; otherwise there is one split.
template <class Math, class Cov, bool Aligned, bool Partial>
__global__ void __launch_bounds__(n_threads, 1)
    covariance_kernel(Arguments<typename Math::Element> arg, Cov* cov, typename Math::Sum* partials) {
  using Element = typename Math::Element;
  extern __shared__ __align__(16) unsigned char memory[];
  Element* const ring = reinterpret_cast<Element*>(memory);
  int64_t i, j;
  banded_position(blockIdx.x, (arg.d + Math::side - 1) / Math::side, i, j);
  const int64_t row = i * Math::side, column = j * Math::side;
  const int64_t first = int64_t(blockIdx.y) * arg.split_tokens, end = min(first + arg.split_tokens, arg.n_tokens);
  const int64_t n_slices = (end - first + Math::steps - 1) / Math::steps;
  constexpr int panel = Math::steps * Math::pitch;

  auto load = [&](int64_t slice) {
    if (slice < n_slices) {
      Element* stage = ring + slice % n_stages * (2 * panel);
      load_panels<Element, Math::side, Math::steps, Math::pitch, Aligned>(stage, stage + panel, arg,
                                                                          first + slice * Math::steps, end, row, column);
    }
    copies_commit();  // also when there was nothing: the groups are counted
  };

  typename Math::Sum sum[Math::n_sums] = {};
  [[maybe_unused]] typename Math::Sum total[Math::promotes ? Math::n_sums : 1] = {};
  constexpr int promote_slices = promote_tokens / Math::steps, flush_slices = Math::flush_tokens / Math::steps;
  auto flush_sums = [&](typename Math::Sum(&sums)[Math::n_sums], int64_t slice, bool last) {
    if constexpr (Partial) {
      const int64_t square = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
      flush_partial<Math>(sums, partials + square * (Math::side * Math::side), slice < flush_slices);
    } else {
      flush<Math>(sums, cov, arg.d, row, column, last);
    }
  };

  for (int s = 0; s < n_stages - 1; ++s) load(s);
  for (int64_t slice = 0; slice < n_slices; ++slice) {
    copies_wait<n_stages - 2>();
    __syncthreads();  // the slice has arrived for all threads, and all are done with the stage loaded next
    load(slice + n_stages - 1);
    const Element* stage = ring + slice % n_stages * (2 * panel);
    Math::multiply(stage, i == j ? stage : stage + panel, sum);
    const bool last = slice + 1 == n_slices, full = (slice + 1) % flush_slices == 0;
    if constexpr (Math::promotes) {
      if (last || (slice + 1) % promote_slices == 0) {
#pragma unroll
        for (int k = 0; k < Math::n_sums; ++k) {
          total[k] += sum[k];
          sum[k] = 0;
        }
        if (last || full) flush_sums(total, slice, last);
      }
    } else if (last || full) {
      flush_sums(sum, slice, last);
    }
  }
}

// Adds the shares of a square, first to last, to cov and its mirror image: 32 by 32 elements a block of 32 by 8 threads,
// turned in shared memory so that both are written along rows.
template <class Sum, class Cov>
__global__ void __launch_bounds__(n_threads) add_partials_kernel(const Sum* partials, int n_splits, int side, Cov* cov,
                                                                 int64_t d) {
  __shared__ Cov turned[32][33];
  int64_t i, j;
  banded_position(blockIdx.x, (d + side - 1) / side, i, j);
  const int strips = side / 32, tx = int(threadIdx.x) % 32, ty = int(threadIdx.x) / 32;
  const int top = int(blockIdx.y) / strips * 32, left = int(blockIdx.y) % strips * 32;
  const int64_t row0 = i * side + top, column0 = j * side + left;
  if (row0 + 31 < column0) return;  // above the diagonal, the whole block
  const int64_t square = int64_t(side) * side;
  for (int line = ty; line < 32; line += n_threads / 32) {
    const int64_t row = row0 + line, column = column0 + tx;
    Cov result = 0;
    if (row < d && column <= row) {
      const Sum* from = partials + blockIdx.x * square + (top + line) * int64_t(side) + left + tx;
      Cov sum = 0;
      for (int split = 0; split < n_splits; ++split) sum += Cov(from[split * (int64_t(gridDim.x) * square)]);
      result = cov[row * d + column] + sum;
      cov[row * d + column] = result;
    }
    turned[line][tx] = result;
  }
  __syncthreads();
  for (int line = ty; line < 32; line += n_threads / 32) {
    const int64_t row = row0 + tx, column = column0 + line;
    if (row < d && column < row) cov[column * d + row] = turned[tx][line];
  }
}

// --- The launcher ----------------------------------------------------------------------------------------------------------

int64_t n_squares(int64_t d, int64_t side) {
  const int64_t n = (d + side - 1) / side;
  return n * (n + 1) / 2;
}

// How many shares of the tokens fill n_slots blocks evenly. Writing and reading back a share of a square takes about as
// long as multiplying 512 tokens.
int64_t plan_splits(int64_t n_tokens, int64_t squares, int64_t n_slots, int64_t most) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t rounds = (squares * splits + n_slots - 1) / n_slots;
    const int64_t cost = rounds * ((n_tokens + splits - 1) / splits + (splits > 1 ? 512 : 0));
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

template <class Math, class Cov, bool Aligned, bool Partial>
int launch_kernel(const Arguments<typename Math::Element>& arg, Cov* cov, typename Math::Sum* partials, dim3 grid,
                  cudaStream_t stream) {
  const auto kernel = covariance_kernel<Math, Cov, Aligned, Partial>;
  constexpr size_t bytes = shared_bytes<Math>();
  if (bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    if (status != cudaSuccess) return int(status);
  }
  kernel<<<grid, n_threads, bytes, stream>>>(arg, cov, partials);
  return int(cudaGetLastError());
}

template <class Math, class Cov, bool Aligned>
int launch(Arguments<typename Math::Element> arg, Cov* cov, int device, int n_multiprocessors, cudaStream_t stream) {
  using Sum = typename Math::Sum;
  const int64_t squares = n_squares(arg.d, Math::side);
  if (squares > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  const int64_t square_bytes = int64_t(Math::side) * Math::side * int64_t(sizeof(Sum));
  const int64_t most = std::clamp<int64_t>(workspace_bytes / (squares * square_bytes), 1, max_splits);
  int64_t splits = plan_splits(arg.n_tokens, squares, n_multiprocessors, most);
  arg.split_tokens = ((arg.n_tokens + splits - 1) / splits + Math::steps - 1) / Math::steps * Math::steps;
  splits = (arg.n_tokens + arg.split_tokens - 1) / arg.split_tokens;
  if (splits == 1)
    return launch_kernel<Math, Cov, Aligned, false>(arg, cov, nullptr, dim3(unsigned(squares)), stream);

  void* partials = nullptr;
  int status = allocate(&partials, size_t(splits * squares * square_bytes), device, stream);
  if (status != 0) return status;
  status = launch_kernel<Math, Cov, Aligned, true>(arg, cov, static_cast<Sum*>(partials),
                                                   dim3(unsigned(squares), unsigned(splits)), stream);
  if (status == 0) {
    const dim3 grid(unsigned(squares), unsigned(Math::side / 32 * (Math::side / 32)));
    add_partials_kernel<Sum, Cov><<<grid, n_threads, 0, stream>>>(static_cast<const Sum*>(partials), int(splits),
                                                                  Math::side, cov, arg.d);
    status = int(cudaGetLastError());
  }
  const int released = release(partials, device, stream);
  return status != 0 ? status : released;
}

// Large squares read x less often; small ones waste less of a small d.
template <template <class, int> class Math, class Element, int Large, int Small, class Cov>
int launch_sized(const TensorView& cov, const TensorView& x, const TensorView* mask, cudaStream_t stream) {
  const Arguments<Element> arg{static_cast<const Element*>(x.data),
                               mask ? static_cast<const uint8_t*>(mask->data) : nullptr,
                               x.shape[0],
                               x.shape[1],
                               x.stride[0],
                               mask ? mask->stride[0] : 0,
                               0};
  Cov* out = static_cast<Cov*>(cov.data);
  const int device = cov.device_index;
  int n_multiprocessors = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return int(status);
  if (!aligned_rows(x.data, x.stride[0] * int64_t(sizeof(Element)), x.shape[0]))
    return launch<Math<Element, Small>, Cov, false>(arg, out, device, n_multiprocessors, stream);
  if (arg.d >= 2 * Large) return launch<Math<Element, Large>, Cov, true>(arg, out, device, n_multiprocessors, stream);
  return launch<Math<Element, Small>, Cov, true>(arg, out, device, n_multiprocessors, stream);
}

template <class Cov>
int launch_typed(const TensorView& cov, const TensorView& x, const TensorView* mask, cudaStream_t stream) {
  switch (x.dtype) {
    case DType::bf16: return launch_sized<TensorCores, __nv_bfloat16, 128, 64, Cov>(cov, x, mask, stream);
    case DType::f16: return launch_sized<TensorCores, __half, 128, 64, Cov>(cov, x, mask, stream);
    case DType::f32: return launch_sized<MultiplyAdd, float, 128, 64, Cov>(cov, x, mask, stream);
    default: break;
  }
  if constexpr (sizeof(Cov) == 8)
    if (x.dtype == DType::f64) return launch_sized<DoubleTensorCores, double, 64, 32, Cov>(cov, x, mask, stream);
  return int(cudaErrorInvalidValue);
}

}  // namespace

int covariance(const TensorView& cov, const TensorView& x, const TensorView* mask, void* stream) {
  if (x.shape[0] == 0 || x.shape[1] == 0) return 0;
  const DeviceGuard guard(cov.device_index);
  if (guard.status() != 0) return guard.status();
  if (cov.dtype == DType::f64) return launch_typed<double>(cov, x, mask, static_cast<cudaStream_t>(stream));
  return launch_typed<float>(cov, x, mask, static_cast<cudaStream_t>(stream));
}

}  // namespace fastedit::cuda
