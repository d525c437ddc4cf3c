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
