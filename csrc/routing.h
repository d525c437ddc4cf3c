// scores[t, m] = ‖σ(W0 x_t + b) − σ(W_m x_t + b)‖ over the outputs: how far a side memory would move a layer's output.
// No output is written. Metric "linear" leaves σ out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

enum class Activation { identity, relu, silu, gelu, gelu_tanh };

struct RoutingOptions {
  Activation activation = Activation::identity;  // identity is the metric "linear": the bias cancels
  bool transposed = false;                       // weights are stored (d_in, d_out)
};

namespace cpu {

// How a call is cut up. Fixed before the call, because the caller allocates the workspace. Nothing here that decides
// the order of additions depends on the number of threads: results are the same bits for any number.
struct RoutingPlan {
  Isa isa;
  int threads;
  int64_t task_rows;    // outputs of a task
  int64_t task_tokens;  // tokens of a task
  size_t workspace_bytes;
};

RoutingPlan plan_routing(const TensorView& x, const TensorView& base, int64_t n_memories, const RoutingOptions& options,
                         Isa isa, int threads);

// x (T, d_in) and the weights, each of them float32, bfloat16 or float16 with unit last stride; bias (d_out,) float32
// contiguous or null; scores (T, n_memories) float32 contiguous. The workspace is aligned to 64 bytes.
void routing(const RoutingPlan& plan, const TensorView& x, const TensorView& base, const TensorView* memories,
             int64_t n_memories, const TensorView* bias, const RoutingOptions& options, const TensorView& scores,
             void* workspace);

}  // namespace cpu

namespace cuda {

// As above on the given stream of the tensors' device, x and all weights of one dtype; returns a cudaError_t
// (0: launched). The workspace holds routing_workspace_floats of float: partial sums, added up in a fixed order.
int64_t routing_workspace_floats(const TensorView& x, const TensorView& base, int64_t n_memories,
                                 const RoutingOptions& options);
int routing(const TensorView& x, const TensorView& base, const TensorView* memories, int64_t n_memories,
            const TensorView* bias, const RoutingOptions& options, const TensorView& scores, float* workspace,
            void* stream);

}  // namespace cuda

}  // namespace fastedit
