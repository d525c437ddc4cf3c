// The fewest neurons that hold a share of the activation mass; their scores; the square of a matrix that they index.
#pragma once

#include <cstddef>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

enum class SelectRule { at_least, prefix };

// Masses are compared as integers, so that the selected set does not depend on any order of addition: a score counts
// as the whole number of grid steps in it, where 2^grid_bits steps reach the power of two above the row's largest
// score. Sums of n of them stay below 2^63.
inline int grid_bits(int64_t n) {
  int bits = 63;
  for (; n > 0; n >>= 1) --bits;
  return bits;
}

namespace cpu {

struct NeuronSelectPlan {
  Isa isa;
  int threads;
  size_t workspace_bytes;
};

NeuronSelectPlan plan_neuron_select(const TensorView& scores, Isa isa, int threads);

// scores (B, d), any strides; mask (B, d) bool, indices (B, d) int32 and counts (B,) int32 contiguous. The workspace
// is aligned to 64 bytes.
void neuron_select(const NeuronSelectPlan& plan, const TensorView& scores, double mass, SelectRule rule,
                   const TensorView& mask, const TensorView& indices, const TensorView& counts, void* workspace);

// out (d,) float64 contiguous = sums of |keys (d, n)| over n in order, in float64; any strides.
void neuron_scores(const TensorView& keys, const TensorView& out, Isa isa, int threads);

size_t gather_square_workspace(const TensorView& matrix, const TensorView& indices);

// out (s, s) contiguous = matrix (d, d)[indices (s,)][:, indices]; int32 or int64 indices, any strides. False, and
// nothing written, if an index is outside [0, d).
bool gather_square(const TensorView& matrix, const TensorView& indices, const TensorView& out, Isa isa, int threads,
                   void* workspace);

}  // namespace cpu

namespace cuda {

// As above, on the given stream of the tensors' device; each returns a cudaError_t (0: launched). Rows of scores have
// unit stride. An index outside [0, d) makes its row and column of the square NaN.
int neuron_select(const TensorView& scores, double mass, SelectRule rule, const TensorView& mask,
                  const TensorView& indices, const TensorView& counts, void* stream);
int neuron_scores(const TensorView& keys, const TensorView& out, void* stream);
int gather_square(const TensorView& matrix, const TensorView& indices, const TensorView& out, void* stream);

}  // namespace cuda

}  // namespace fastedit
