// cov += xᵀ diag(mask) x, kept exactly symmetric. One triangle is computed, then mirrored.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

namespace cpu {

// How a call is cut up. Fixed before the call, because the caller allocates the workspace. Nothing here that
// decides the order of additions depends on the number of threads: results are the same bits for any number.
struct CovariancePlan {
  Isa isa;
  int threads;
  int64_t tile;           // side of the square of cov that a task owns
  int64_t chunk_tokens;   // tokens packed at a time, then added to cov
  size_t workspace_bytes;
};

// The instruction set that is fastest for tokens of this type, of those that the machine has.
Isa covariance_isa(DType x);

CovariancePlan plan_covariance(const TensorView& cov, const TensorView& x, Isa isa, int threads);

// cov (d, d) float32/float64 contiguous; x (T, d), unit last stride, float64 only with a float64 cov;
// mask (T,) bool or null. The workspace is aligned to 64 bytes.
void covariance(const CovariancePlan& plan, const TensorView& cov, const TensorView& x, const TensorView* mask,
                void* workspace);

// One cov of a call for several layers.
struct CovarianceLayer {
  TensorView cov, x, mask;
  bool has_mask;
  Isa isa;
};

// Several layers, of any widths. Layers too narrow to keep a team of threads busy are shared out, one to a thread.
// `allocate` returns a workspace of so many bytes, aligned to 64.
void covariance_layers(const std::vector<CovarianceLayer>& layers, int threads,
                       const std::function<void*(size_t bytes)>& allocate);

}  // namespace cpu

namespace cuda {

// As above, on the given stream of the tensors' device; returns a cudaError_t (0: launched). Takes
// stream-ordered scratch memory of its own where the squares of cov do not fill the GPU.
int covariance(const TensorView& cov, const TensorView& x, const TensorView* mask, void* stream);

}  // namespace cuda

}  // namespace fastedit
