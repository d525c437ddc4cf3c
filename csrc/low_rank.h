// weight += alpha * left rightᵀ in place: one pass over the weight, fp32 arithmetic, one rounding.
//
// Stochastic rounding is a function of (seed, position), so that every backend can recompute it. With
// i = row * d_in + column in the (d_out, d_in) orientation, whichever way the weight is stored:
//
//     word = Philox4x32-10(counter = (low32(i/4), high32(i/4), 0, 0), key = (low32(seed), high32(seed)))[i % 4]
//
// bfloat16: the low 16 bits of the word are added to the bits of the fp32 result, the low 16 bits of which are
//           then cut off.
// float16:  the same with 13 bits, for |result| >= 2^-14; below, where float16 has a fixed spacing of 2^-24,
//           the magnitude is floor(|result| * 2^24 + low13(word) * 2^-13) * 2^-24.
// float32 and float64 weights have nothing to round; infinities and NaN are stored as they are.
//
// With a residual (float32, the weight's stored shape, unit last stride), for bfloat16 and float16 weights:
//
//     value = (weight + residual) + alpha * product      if options.carry, else weight + alpha * product
//     weight = round(value);  residual = value - weight, or 0 where the stored weight is not finite
//
// in float32, so that the residual is exact for rounding to nearest. It is only read if options.carry.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

struct LowRankOptions {
  double alpha = 1.0;
  bool transposed = false;  // the weight is stored (d_in, d_out)
  bool stochastic = false;
  uint64_t seed = 0;
  bool carry = false;  // add the residual before rounding
};

namespace cpu {

struct LowRankPlan {
  Isa isa;
  int threads;
  int64_t block_rows, block_columns;  // of the stored weight, in a task
  size_t workspace_bytes;
};

LowRankPlan plan_low_rank(const TensorView& weight, const TensorView& left, Isa isa, int threads);

// weight: unit last stride; left (d_out, r), right (d_in, r): unit last stride, float32 (float64 for a float64
// weight). out_norm, if given, receives the Frobenius norm of alpha * left rightᵀ before rounding; residual may be
// null. The workspace is aligned to 64 bytes. Each element's arithmetic is the same for any number of threads.
void low_rank(const LowRankPlan& plan, const TensorView& weight, const TensorView& left, const TensorView& right,
              const LowRankOptions& options, double* out_norm, const TensorView* residual, void* workspace);

}  // namespace cpu

namespace cuda {

// As above, on the given stream of the tensors' device; returns a cudaError_t (0: launched). When out_norm
// (float32 or float64, one element) is given, workspace holds low_rank_workspace_doubles(weight) doubles on the
// same device: the blocks' partial sums, added up in a fixed order.
int64_t low_rank_workspace_doubles(const TensorView& weight);
int low_rank(const TensorView& weight, const TensorView& left, const TensorView& right,
             const LowRankOptions& options, const TensorView* out_norm, const TensorView* residual, double* workspace,
             void* stream);

}  // namespace cuda

}  // namespace fastedit
