// The nearest key, and the greatest inner products, on a GPU: a scan that bounds tiles of keys, then exact values.
//
//   scan    Inner products of 16 or 64 queries with 64 keys on tensor cores (mma.sync m16n8k8, TF32), and the keys'
//           norms. How far off a product can be is known, so for every query and tile of 16 keys two numbers are
//           stored: no key of the tile is better than `upper`, one is at least as good as `lower`.
//   bar     For every query the k-th greatest of some keys' `lower`: what does not reach it is not among the best k.
//   exact   Tiles whose `upper` reaches the bar are computed again in float64, a warp for each key; blocks keep their
//           best k.
//   merge   The best k of a query's blocks.
//
// float32 keys take three products (high and low parts of both), narrower keys are exact in TF32 and take two. A float64
// value is summed in an order that depends on d alone, and candidates are ordered by (value, index): results do not
// depend on tiles, and are the same bits on every run. Nothing waits for the device, and no matrix of queries by keys is
// stored: queries are served in chunks for which the bounds stay small.
//
// Memory: each key once for 64 queries (16 where there are no more), then the few tiles that reach the bar.

#include "../retrieval.h"

#include "common.cuh"

namespace fastedit::cuda {
namespace {

constexpr int n_threads = 128;
constexpr int n_warps = n_threads / 32;
constexpr int n_stages = 4;
constexpr int steps = 32;      // of d in a stage
constexpr int block_keys = 64;
constexpr int tile_keys = 16;  // of a warp, and of a bound
constexpr int few_queries = 16, many_queries = 64;
constexpr int max_k = 64;
constexpr int max_splits = 32;  // blocks of the exact pass for a query: the lanes that merge them
constexpr int64_t chunk_queries = 1024;
constexpr size_t bound_bytes = size_t(64) << 20;
constexpr float infinity = __builtin_huge_valf();
constexpr float vanished = 1e-15f;  // at least the norm of a vector whose squares are too small for float

template <class Key>
struct Arguments {
  const float* queries;
  const Key* keys;
  const float* scale;    // may be null
  const uint8_t* alive;  // may be null
  int64_t n_queries, n_keys, d, stride, stride_scale, stride_alive, n_tiles;
  float gamma, floor;
  float* upper;
  float* lower;  // (n_queries, n_tiles)
};

__device__ __forceinline__ float key_value(int8_t v) { return float(v); }
template <class Key>
__device__ __forceinline__ float key_value(Key v) { return to_float(v); }

// --- Scan ----------------------------------------------------------------------------------------------------------

// Lines by `steps` elements of a matrix whose corner is at (line, first); zeros outside.
template <class Element, int Lines, int Pitch, bool Aligned>
__device__ __forceinline__ void load_panel(Element* to, const Element* from, int64_t stride, int64_t line0,
                                           int64_t n_lines, int64_t first, int64_t length) {
  constexpr int width = 16 / int(sizeof(Element)), chunks = steps / width, total = Lines * chunks;
#pragma unroll
  for (int i = 0; i < (total + n_threads - 1) / n_threads; ++i) {
    const int chunk = i * n_threads + int(threadIdx.x);
    if (total % n_threads != 0 && chunk >= total) break;
    const int line = chunk / chunks, offset = chunk % chunks * width;
    const int64_t left = length - first - offset;
    const int n = line0 + line < n_lines && left > 0 ? int(left < width ? left : width) : 0;
    const Element* source = n > 0 ? from + (line0 + line) * stride + first + offset : from;
    Element* target = to + line * Pitch + offset;
    if constexpr (Aligned) {
      copy_16(target, source, n * int(sizeof(Element)));
    } else {
#pragma unroll
      for (int e = 0; e < width; ++e) target[e] = e < n ? source[e] : Element(0);
    }
  }
}

// What TF32 keeps of a value, and what it leaves.
struct Split {
  uint32_t high, low;
};

__device__ __forceinline__ Split split(float v) {
  const uint32_t high = __float_as_uint(v) & 0xFFFFE000u;
  return {high, __float_as_uint(v - __uint_as_float(high))};
}

__device__ __forceinline__ void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class Key, int Queries>
struct Layout {
  static constexpr int query_pitch = steps + 8;  // read two at a time, in these pitches without bank conflicts
  static constexpr int key_pitch = steps + (sizeof(Key) == 1 ? 16 : 8);
  static constexpr size_t query_bytes = size_t(Queries) * query_pitch * sizeof(float);
  static constexpr size_t stage_bytes = query_bytes + size_t(block_keys) * key_pitch * sizeof(Key);
  static constexpr int row_tiles = Queries / 16, column_tiles = tile_keys / 8;
};

template <class Key>
struct __align__(2 * sizeof(Key)) Pair {
  Key value[2];
};

// A stage: a warp multiplies all queries with its 16 keys. The instruction's k-th and (k+4)-th elements are taken from
// adjacent places, for both operands alike.
template <class Key, int Queries>
__device__ __forceinline__ void multiply(const float* q, const Key* keys,
                                         float (&sum)[Queries / 16][tile_keys / 8][4],
                                         float (&squares)[tile_keys / 8]) {
  using L = Layout<Key, Queries>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, line = lane / 4, pair = lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < steps; k += 8) {
    uint32_t high[L::column_tiles][2], low[L::column_tiles][2];
#pragma unroll
    for (int j = 0; j < L::column_tiles; ++j) {
      const Key* place = keys + (warp * tile_keys + j * 8 + line) * L::key_pitch + k + pair;
      const auto from = *reinterpret_cast<const Pair<Key>*>(place);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float v = key_value(from.value[e]);
        squares[j] = fmaf(v, v, squares[j]);
        const Split s = split(v);
        high[j][e] = s.high;
        low[j][e] = s.low;  // zero, and not used, unless keys are float32
      }
    }
#pragma unroll
    for (int i = 0; i < L::row_tiles; ++i) {
      uint32_t a_high[4], a_low[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v = *reinterpret_cast<const float2*>(q + (i * 16 + half * 8 + line) * L::query_pitch + k + pair);
        const Split first = split(v.x), second = split(v.y);
        a_high[half] = first.high;
        a_high[half + 2] = second.high;
        a_low[half] = first.low;
        a_low[half + 2] = second.low;
      }
#pragma unroll
      for (int j = 0; j < L::column_tiles; ++j) {
        multiply_matrices(sum[i][j], a_low, high[j]);
        if constexpr (sizeof(Key) == 4) multiply_matrices(sum[i][j], a_high, low[j]);
        multiply_matrices(sum[i][j], a_high, high[j]);
      }
    }
  }
}

struct Bounds {
  float upper, lower;
};

// Of one pair, from its product and the two norms. What is not finite could be anything.
template <bool Nearest>
__device__ __forceinline__ Bounds bounds_of(float product, float norm_q, float norm_k, float gamma, float floor) {
  float value = product, slack = gamma * ((norm_q + vanished) * (norm_k + vanished)) + floor;
  if constexpr (Nearest) {
    const float reach = norm_q + norm_k;
    value = 2.0f * product - norm_k * norm_k - norm_q * norm_q;
    slack = gamma * (reach * reach) + floor;
  }
  const float upper = value + slack, lower = value - slack;
  return {fabsf(upper) < infinity ? upper : infinity, fabsf(lower) < infinity ? lower : -infinity};
}

template <class Key, int Queries, bool Nearest, bool Aligned>
__global__ void __launch_bounds__(n_threads) scan_kernel(const __grid_constant__ Arguments<Key> arg) {
  using L = Layout<Key, Queries>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float query_norm[Queries];
  const int64_t query_blocks = (arg.n_queries + Queries - 1) / Queries;
  const int64_t query0 = int64_t(blockIdx.x) % query_blocks * Queries;
  const int64_t key0 = int64_t(blockIdx.x) / query_blocks * block_keys;
  const int64_t n_slices = (arg.d + steps - 1) / steps;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

  auto load = [&](int64_t slice) {
    if (slice < n_slices) {
      unsigned char* stage = memory + slice % n_stages * L::stage_bytes;
      load_panel<float, Queries, L::query_pitch, Aligned>(reinterpret_cast<float*>(stage), arg.queries, arg.d, query0,
                                                          arg.n_queries, slice * steps, arg.d);
      load_panel<Key, block_keys, L::key_pitch, Aligned>(reinterpret_cast<Key*>(stage + L::query_bytes), arg.keys,
                                                         arg.stride, key0, arg.n_keys, slice * steps, arg.d);
    }
    copies_commit();  // also when there was nothing: the groups are counted
  };

  float sum[L::row_tiles][L::column_tiles][4] = {};
  float squares[L::column_tiles] = {}, query_squares = 0.0f;
  for (int s = 0; s < n_stages - 1; ++s) load(s);
  for (int64_t slice = 0; slice < n_slices; ++slice) {
    copies_wait<n_stages - 2>();
    __syncthreads();  // the slice has arrived for all threads, and all are done with the stage loaded next
    load(slice + n_stages - 1);
    const unsigned char* stage = memory + slice % n_stages * L::stage_bytes;
    const float* q = reinterpret_cast<const float*>(stage);
    multiply<Key, Queries>(q, reinterpret_cast<const Key*>(stage + L::query_bytes), sum, squares);
    if (int(threadIdx.x) < Queries) {
      const float* mine = q + int(threadIdx.x) * L::query_pitch;
#pragma unroll 8
      for (int k = 0; k < steps; ++k) query_squares = fmaf(mine[k], mine[k], query_squares);
    }
  }
  if (int(threadIdx.x) < Queries) query_norm[threadIdx.x] = sqrtf(query_squares);
  __syncthreads();

#pragma unroll
  for (int j = 0; j < L::column_tiles; ++j) {  // a key's elements lie with the four lanes of its line
    squares[j] += __shfl_xor_sync(0xFFFFFFFFu, squares[j], 1);
    squares[j] += __shfl_xor_sync(0xFFFFFFFFu, squares[j], 2);
  }
  float norm[L::column_tiles][2], scale[L::column_tiles][2];
  bool counts[L::column_tiles][2];
#pragma unroll
  for (int j = 0; j < L::column_tiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = lane % 4 * 2 + e;
      const int64_t key = key0 + warp * tile_keys + j * 8 + column;
      const float square = __shfl_sync(0xFFFFFFFFu, squares[j], column * 4);
      counts[j][e] = key < arg.n_keys && (arg.alive == nullptr || arg.alive[key * arg.stride_alive] != 0);
      scale[j][e] = counts[j][e] && arg.scale != nullptr ? arg.scale[key * arg.stride_scale] : 1.0f;
      norm[j][e] = sqrtf(square) * fabsf(scale[j][e]);
    }

  const int64_t tile = key0 / tile_keys + warp;
#pragma unroll
  for (int i = 0; i < L::row_tiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = i * 16 + half * 8 + lane / 4;
      Bounds best{-infinity, -infinity};
#pragma unroll
      for (int j = 0; j < L::column_tiles; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (counts[j][e]) {
            const Bounds b = bounds_of<Nearest>(sum[i][j][half * 2 + e] * scale[j][e], query_norm[row], norm[j][e],
                                                arg.gamma, arg.floor);
            best = {fmaxf(best.upper, b.upper), fmaxf(best.lower, b.lower)};
          }
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        best.upper = fmaxf(best.upper, __shfl_xor_sync(0xFFFFFFFFu, best.upper, lanes));
        best.lower = fmaxf(best.lower, __shfl_xor_sync(0xFFFFFFFFu, best.lower, lanes));
      }
      if (lane % 4 == 0 && query0 + row < arg.n_queries && tile < arg.n_tiles) {
        arg.upper[(query0 + row) * arg.n_tiles + tile] = best.upper;
        arg.lower[(query0 + row) * arg.n_tiles + tile] = best.lower;
      }
    }
}

// --- Bar -----------------------------------------------------------------------------------------------------------

// A block for each query. The threads' greatest `lower` belong to different keys: the k-th greatest of them is a bar.
__global__ void __launch_bounds__(256) bar_kernel(const float* lower, float* bar, int64_t n_tiles, int k) {
  __shared__ float values[256];
  const int thread = int(threadIdx.x);
  const float* mine = lower + int64_t(blockIdx.x) * n_tiles;
  float value = -infinity;
  for (int64_t tile = thread; tile < n_tiles; tile += 256) value = fmaxf(value, mine[tile]);
  values[thread] = value;
  __syncthreads();
  int rank = 0;
  for (int other = 0; other < 256; ++other)
    rank += values[other] > value || (values[other] == value && other < thread);
  if (rank == k - 1) bar[blockIdx.x] = value;
}

// --- Exact ---------------------------------------------------------------------------------------------------------

struct Candidate {
  double value;
  int64_t order;  // the index, or minus the index where the highest wins: the smaller is the better
};

constexpr int64_t no_order = INT64_MAX;

__device__ __forceinline__ bool better(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.order < b.order);
}

struct Exact {
  const float* upper;  // (n_queries, n_tiles)
  const float* bar;
  Candidate* found;  // (n_queries, splits, k), each split's best first
  int splits, k;
  bool highest;
};

// The value of a key, the same in all lanes: minus the squared distance, or the inner product; -infinity: not found.
template <class Key, bool Nearest>
__device__ __forceinline__ double exact_value(const Arguments<Key>& arg, const float* query, int64_t key) {
  const double scale = arg.scale != nullptr ? double(arg.scale[key * arg.stride_scale]) : 1.0;
  const Key* row = arg.keys + key * arg.stride;
  double sum = 0.0;
  for (int64_t i = int(threadIdx.x) % 32; i < arg.d; i += 32) {
    const double k = double(key_value(row[i])) * scale, q = double(query[i]);
    sum = Nearest ? fma(k - q, q - k, sum) : fma(k, q, sum);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
  return sum == sum ? sum : -double(infinity);
}

// Puts a candidate in its place in the list of the best k; one thread.
__device__ __forceinline__ void insert(Candidate* best, int k, const Candidate& candidate) {
  if (!better(candidate, best[k - 1])) return;
  int place = k - 1;
  for (; place > 0 && better(candidate, best[place - 1]); --place) best[place] = best[place - 1];
  best[place] = candidate;
}

// A block for a query and a range of its tiles.
template <class Key, bool Nearest>
__global__ void __launch_bounds__(n_threads) exact_kernel(const __grid_constant__ Arguments<Key> arg,
                                                          const __grid_constant__ Exact exact) {
  __shared__ Candidate best[max_k];
  __shared__ Candidate tile_best[tile_keys];
  __shared__ uint32_t reached[n_warps];
  const int64_t query = blockIdx.x / exact.splits, part = blockIdx.x % exact.splits;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t first = arg.n_tiles * part / exact.splits, end = arg.n_tiles * (part + 1) / exact.splits;
  const float* upper = exact.upper + query * arg.n_tiles;
  const float bar = exact.bar[query];
  for (int i = thread; i < exact.k; i += n_threads) best[i] = {-double(infinity), no_order};
  for (int64_t tile0 = first; tile0 < end; tile0 += n_threads) {
    const int64_t mine = tile0 + thread;
    const float limit = mine < end ? upper[mine] : -infinity;
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, limit >= bar && limit > -infinity);
    if (lane == 0) reached[warp] = votes;
    __syncthreads();
    for (int w = 0; w < n_warps; ++w)
      for (uint32_t left = reached[w]; left != 0; left &= left - 1) {
        const int64_t key0 = (tile0 + w * 32 + __ffs(int(left)) - 1) * tile_keys;
        for (int i = warp; i < tile_keys; i += n_warps) {
          const int64_t key = key0 + i;
          Candidate candidate{-double(infinity), no_order};
          if (key < arg.n_keys && (arg.alive == nullptr || arg.alive[key * arg.stride_alive] != 0)) {
            candidate.value = exact_value<Key, Nearest>(arg, arg.queries + query * arg.d, key);
            if (candidate.value > -double(infinity)) candidate.order = exact.highest ? -key : key;
          }
          if (lane == 0) tile_best[i] = candidate;
        }
        __syncthreads();
        if (thread == 0)
          for (int i = 0; i < tile_keys; ++i) insert(best, exact.k, tile_best[i]);
        __syncthreads();  // before the next tile's candidates
      }
    __syncthreads();  // before the next votes
  }
  for (int i = thread; i < exact.k; i += n_threads) exact.found[int64_t(blockIdx.x) * exact.k + i] = best[i];
}

// --- Merge ---------------------------------------------------------------------------------------------------------

struct Output {
  const float* limit;  // radius of the keys, or threshold of the queries; may be null
  int64_t stride_limit;
  int64_t* index;
  float* value;
};

template <bool Nearest>
__device__ __forceinline__ void write(const Output& out, const Candidate& found, int64_t query, int64_t place) {
  const int64_t index = found.order == no_order ? -1 : found.order < 0 ? -found.order : found.order;
  if constexpr (Nearest) {
    const float distance = index < 0 ? infinity : float(sqrt(-found.value));
    const bool inside = out.limit == nullptr || (index >= 0 && distance <= out.limit[index * out.stride_limit]);
    const bool covers = distance < infinity && inside;
    out.index[place] = covers ? index : -1;
    out.value[place] = distance;
  } else {
    const float score = index < 0 ? -infinity : float(found.value);
    const bool beats = score > (out.limit == nullptr ? -infinity : out.limit[query * out.stride_limit]);
    out.index[place] = beats ? index : -1;
    out.value[place] = beats ? score : -infinity;
  }
}

// A warp for each query: a lane holds the head of one split's list.
template <bool Nearest>
__global__ void __launch_bounds__(32) merge_kernel(const Candidate* found, int splits, int k, Output out) {
  const int64_t query = blockIdx.x;
  const int lane = int(threadIdx.x);
  const Candidate* mine = found + (query * splits + lane) * k;
  int next = 0;
  for (int i = 0; i < k; ++i) {
    Candidate head{-double(infinity), no_order};
    if (lane < splits && next < k) head = mine[next];
    Candidate best = head;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const Candidate other{__shfl_xor_sync(0xFFFFFFFFu, best.value, lanes),
                            __shfl_xor_sync(0xFFFFFFFFu, static_cast<long long>(best.order), lanes)};
      if (better(other, best)) best = other;
    }
    if (head.order == best.order && best.order != no_order) ++next;
    if (lane == 0) write<Nearest>(out, best, query, query * k + i);
  }
}

// Without keys nothing is found.
template <bool Nearest>
__global__ void nothing_kernel(Output out, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) write<Nearest>(out, {-double(infinity), no_order}, 0, i);
}

// --- The launchers -------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queries of a chunk: a multiple of a block's, few enough for their bounds to stay small.
int64_t queries_at_once(int64_t n_queries, int64_t n_tiles) {
  const int64_t fitting = int64_t(bound_bytes / (2 * sizeof(float))) / (n_tiles > 0 ? n_tiles : 1);
  int64_t chunk = few_queries;
  if (fitting >= many_queries) chunk = fitting < chunk_queries ? fitting / many_queries * many_queries : chunk_queries;
  return n_queries < chunk ? n_queries : chunk;
}

// Where the parts of the workspace begin, in bytes; each on 256.
struct Workspace {
  size_t upper, lower, bar, found, total;
};

Workspace workspace_of(int64_t n_queries, int64_t n_keys, int64_t k) {
  const int64_t n_tiles = ceil_div(n_keys, tile_keys), n = queries_at_once(n_queries, n_tiles);
  auto padded = [](int64_t bytes) { return size_t(ceil_div(bytes, 256) * 256); };
  Workspace w{};
  w.lower = w.upper + padded(n * n_tiles * int64_t(sizeof(float)));
  w.bar = w.lower + padded(n * n_tiles * int64_t(sizeof(float)));
  w.found = w.bar + padded(n * int64_t(sizeof(float)));
  w.total = w.found + padded(n * max_splits * k * int64_t(sizeof(Candidate)));
  return w;
}

template <class Key, int Queries, bool Nearest, bool Aligned>
int launch_scan(const Arguments<Key>& arg, cudaStream_t stream) {
  const auto kernel = scan_kernel<Key, Queries, Nearest, Aligned>;
  constexpr size_t bytes = n_stages * Layout<Key, Queries>::stage_bytes;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (status != cudaSuccess) return int(status);
  const int64_t blocks = ceil_div(arg.n_queries, Queries) * ceil_div(arg.n_keys, block_keys);
  if (blocks > INT32_MAX) return int(cudaErrorInvalidConfiguration);
  kernel<<<unsigned(blocks), n_threads, bytes, stream>>>(arg);
  return int(cudaGetLastError());
}

template <class Key, bool Nearest>
int launch_sized(const Arguments<Key>& arg, bool aligned, cudaStream_t stream) {
  if (arg.n_queries <= few_queries)
    return aligned ? launch_scan<Key, few_queries, Nearest, true>(arg, stream)
                   : launch_scan<Key, few_queries, Nearest, false>(arg, stream);
  return aligned ? launch_scan<Key, many_queries, Nearest, true>(arg, stream)
                 : launch_scan<Key, many_queries, Nearest, false>(arg, stream);
}

struct Search {
  const TensorView& queries;
  const TensorView& keys;
  const TensorView* alive;
  const TensorView* scale;
  bool highest;
  int64_t k;
  Output out;
  unsigned char* workspace;
  cudaStream_t stream;
};

template <class Key, bool Nearest>
int launch_chunk(const Search& s, Arguments<Key> arg, const Workspace& w, int64_t first, bool aligned) {
  int status = launch_sized<Key, Nearest>(arg, aligned, s.stream);
  if (status != 0) return status;
  float* bar = reinterpret_cast<float*>(s.workspace + w.bar);
  bar_kernel<<<unsigned(arg.n_queries), 256, 0, s.stream>>>(arg.lower, bar, arg.n_tiles, int(s.k));
  const int64_t wanted = ceil_div(1024, arg.n_queries), most = ceil_div(arg.n_tiles, n_threads);
  Exact exact{arg.upper, bar, reinterpret_cast<Candidate*>(s.workspace + w.found), 1, int(s.k), s.highest};
  exact.splits = int(wanted < most ? wanted : most);
  if (exact.splits > max_splits) exact.splits = max_splits;
  exact_kernel<Key, Nearest><<<unsigned(arg.n_queries * exact.splits), n_threads, 0, s.stream>>>(arg, exact);
  Output out = s.out;
  out.index += first * s.k;
  out.value += first * s.k;
  if (!Nearest && out.limit != nullptr) out.limit += first * out.stride_limit;
  merge_kernel<Nearest><<<unsigned(arg.n_queries), 32, 0, s.stream>>>(exact.found, exact.splits, int(s.k), out);
  return int(cudaGetLastError());
}

template <class Key, bool Nearest>
int search_typed(const Search& s) {
  Arguments<Key> arg{};
  arg.keys = static_cast<const Key*>(s.keys.data);
  arg.scale = s.scale ? static_cast<const float*>(s.scale->data) : nullptr;
  arg.alive = s.alive ? static_cast<const uint8_t*>(s.alive->data) : nullptr;
  arg.n_keys = s.keys.shape[0];
  arg.d = s.keys.shape[1];
  arg.stride = s.keys.stride[0];
  arg.stride_scale = s.scale ? s.scale->stride[0] : 0;
  arg.stride_alive = s.alive ? s.alive->stride[0] : 0;
  arg.n_tiles = ceil_div(arg.n_keys, tile_keys);
  // Sums of d TF32 products, truncated when they are added: half of this is left for the other roundings.
  arg.gamma = float(arg.d + 32) * 2.384185791015625e-7f;          // 2^-22
  arg.floor = float(arg.d > 0 ? arg.d : 1) * 7.52316385e-37f;     // 2^-120: products too small for float
  const Workspace w = workspace_of(s.queries.shape[0], arg.n_keys, s.k);
  arg.upper = reinterpret_cast<float*>(s.workspace + w.upper);
  arg.lower = reinterpret_cast<float*>(s.workspace + w.lower);
  const bool aligned = aligned_rows(s.queries.data, arg.d * int64_t(sizeof(float)), s.queries.shape[0]) &&
                       aligned_rows(s.keys.data, arg.stride * int64_t(sizeof(Key)), arg.n_keys);
  const int64_t chunk = queries_at_once(s.queries.shape[0], arg.n_tiles);
  for (int64_t first = 0; first < s.queries.shape[0]; first += chunk) {
    const int64_t left = s.queries.shape[0] - first;
    arg.queries = static_cast<const float*>(s.queries.data) + first * arg.d;
    arg.n_queries = left < chunk ? left : chunk;
    const int status = launch_chunk<Key, Nearest>(s, arg, w, first, aligned);
    if (status != 0) return status;
  }
  return 0;
}

template <bool Nearest>
int search(const Search& s) {
  if (s.queries.shape[0] == 0) return 0;
  const DeviceGuard guard(s.queries.device_index);
  if (guard.status() != 0) return guard.status();
  if (s.keys.shape[0] == 0) {
    const int64_t n = s.queries.shape[0] * s.k;
    nothing_kernel<Nearest><<<unsigned(ceil_div(n, 256)), 256, 0, s.stream>>>(s.out, n);
    return int(cudaGetLastError());
  }
  switch (s.keys.dtype) {
    case DType::f32: return search_typed<float, Nearest>(s);
    case DType::bf16: return search_typed<__nv_bfloat16, Nearest>(s);
    case DType::f16: return search_typed<__half, Nearest>(s);
    case DType::i8: return search_typed<int8_t, Nearest>(s);
    default: return int(cudaErrorInvalidValue);
  }
}

Output output_of(const TensorView* limit, const TensorView& index, const TensorView& value) {
  return {limit ? static_cast<const float*>(limit->data) : nullptr, limit ? limit->stride[0] : 0,
          static_cast<int64_t*>(index.data), static_cast<float*>(value.data)};
}

}  // namespace

size_t retrieval_workspace(const TensorView& queries, const TensorView& keys, int64_t k) {
  return workspace_of(queries.shape[0], keys.shape[0], k).total;
}

int nearest_key(const TensorView& queries, const TensorView& keys, const TensorView* radius, const TensorView* alive,
                const TensorView* scale, const TensorView& index, const TensorView& distance, void* workspace,
                void* stream) {
  return search<true>({queries, keys, alive, scale, false, 1, output_of(radius, index, distance),
                       static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream)});
}

int max_inner_product(const TensorView& queries, const TensorView& keys, const TensorView* threshold,
                      const TensorView* alive, const TensorView* scale, bool highest, const TensorView& indices,
                      const TensorView& scores, void* workspace, void* stream) {
  if (indices.shape[1] > max_k) return int(cudaErrorInvalidValue);
  return search<false>({queries, keys, alive, scale, highest, indices.shape[1], output_of(threshold, indices, scores),
                        static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream)});
}

}  // namespace fastedit::cuda
