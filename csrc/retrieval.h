// The nearest key within its own radius, and the greatest inner products above a threshold: exact, streaming.
//
// What all have in common: queries (B, d) float32 contiguous; keys (N, d) float32, bfloat16, float16 or int8, unit last
// stride; scale (N,) float32 or null: row j of int8 keys stands for scale[j] * keys[j]; alive (N,) bool or null. The
// winner is decided in float64, by values summed in the same order for every key (copies of a key tie exactly, wherever
// they stand). Vectors of one dimension are read with their strides; outputs are contiguous.
#pragma once

#include <cstddef>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

namespace cpu {

// Keys again in a byte an element, for a scan that reads a quarter of float32 and multiplies four times as fast.
// Blocks of 16 keys: for every 4 dimensions 64 bytes, 4 of each key; a byte is 128 + the rounded quotient by the key's
// step. The scan bounds every inner product from above, and whatever could win is compared exactly, from the keys.
constexpr int64_t block_keys = 16;

struct Codes {
  const uint8_t* data;
  const float* step;   // (N,)
  const float* error;  // (N,) at least the norm of the difference between scanned vector and codes
  const float* norm;   // (N,) the norm of the key, rounded up
  const float* rest;   // (N,) at least the norm of what the scanned vector leaves of the key; null: it is the key
};

inline int64_t code_steps(int64_t d) { return (d + 3) / 4; }
inline int64_t code_bytes(int64_t n, int64_t d) { return (n + block_keys - 1) / block_keys * block_keys * 4 * code_steps(d); }

struct SearchArguments {
  TensorView queries, keys;
  const TensorView* alive = nullptr;
  const TensorView* scale = nullptr;
  bool nearest = false;  // minus the squared distance is what is maximised; otherwise the inner product
  bool highest = false;  // which of two equal values comes first
  int64_t k = 1;
  int64_t offset = 0;            // index of the first key
  const Codes* codes = nullptr;  // null: the keys themselves are scanned
  // With codes of other vectors than the keys: those of the queries (B, m), and at least the norm of what they leave.
  const TensorView* scan_queries = nullptr;
  const TensorView* rest = nullptr;
};

struct SearchPlan {
  Isa isa;
  int threads;
  int64_t tile;    // keys bounded at a time, before the best of them are compared exactly
  int64_t width;   // queries that a product with codes serves at a time; 0: float32 rows, one after the other
  size_t workspace_bytes;
};

SearchPlan plan_search(const SearchArguments& in, Isa isa, int threads);

// values (B, k) float64 descending (scores, or minus squared distances; -infinity: none) and indices (B, k) int64 hold the
// best of what was searched before, and then also of these keys.
void search(const SearchPlan& plan, const SearchArguments& in, double* values, int64_t* indices, void* workspace);

// Codes of x (n, d) float32, unit last stride, as keys `first` to `first` + n - 1 of those arrays.
void encode(const TensorView& x, int64_t first, Isa isa, int threads, uint8_t* data, float* step, float* error,
            float* norm);

}  // namespace cpu

namespace cuda {

// Bytes of scratch memory that either search below needs.
size_t retrieval_workspace(const TensorView& queries, const TensorView& keys, int64_t k);

// index (B,) int64, distance (B,) float32; radius (N,) float32 or null. Of equal distances the lowest index wins.
// distance is the float32 of the nearest alive key's distance, infinity if there is none; index is -1 unless the
// distance is finite and (radius given) distance <= radius[index], compared in float32.
// On the given stream of the tensors' device; returns a cudaError_t (0: launched).
int nearest_key(const TensorView& queries, const TensorView& keys, const TensorView* radius, const TensorView* alive,
                const TensorView* scale, const TensorView& index, const TensorView& distance, void* workspace,
                void* stream);

// indices (B, k) int64 and scores (B, k) float32 by descending score, -1 and -infinity where fewer are found; threshold
// (B,) float32 or null. A key is found if its score, rounded to float32, is greater than the threshold and than
// -infinity. Of equal scores the lowest index comes first, or the highest if `highest`.
int max_inner_product(const TensorView& queries, const TensorView& keys, const TensorView* threshold,
                      const TensorView* alive, const TensorView* scale, bool highest, const TensorView& indices,
                      const TensorView& scores, void* workspace, void* stream);

}  // namespace cuda

}  // namespace fastedit
