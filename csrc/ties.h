// Merging of weight updates by magnitude and sign (TIES). The k-th largest magnitude of an update is found exactly by
// selection on bit patterns: a sample gives a bracket that nearly always holds it, one pass over the tensors counts
// what lies above the bracket and collects what lies inside, and the choice is made among those few. If the bracket misses,
// three passes of histograms find it instead. A last pass trims, elects signs, averages and adds.
#pragma once

#include <cstddef>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

constexpr int max_ties_tensors = 128;

struct TiesOptions {
  bool elect;             // add only entries of the elected sign
  bool normalise;         // divide by the weights of the entries added (where they sum to 0: by 1)
  bool majority;          // a zero sum takes the sign that more sums have; otherwise plus
  bool all_at_threshold;  // keep every entry that equals the smallest one kept, not the first few
  float scale;            // factor of the sum
  float divisor;          // where `normalise` is not set
};

struct TiesInput {
  const void* data;
  float weight;
  int64_t keep;  // entries that survive trimming; the number of all: not trimmed
};

// out, base: (N,) contiguous, of one type that all inputs have.
struct TiesProblem {
  TensorView out, base;
  const TiesInput* inputs;
  int n_inputs;
  TiesOptions options;
};

namespace cpu {

struct TiesPlan {
  Isa isa;
  int threads;
  size_t workspace_bytes;
};

TiesPlan plan_ties(const TiesProblem& problem, Isa isa, int threads);

// Returns the first input whose difference to base is not finite (out is then NaN throughout), or n_inputs. The
// workspace is aligned to 64 bytes. Same bits for any number of threads.
int ties(const TiesPlan& plan, const TiesProblem& problem, void* workspace);

}  // namespace cpu

namespace cuda {

// Scratch memory on the problem's device; 0 and a status if that cannot be asked.
int ties_workspace(const TiesProblem& problem, size_t* bytes);

// As above, on the given stream; status (1,) int32 receives what the CPU returns. Waits for nothing. Returns a
// cudaError_t.
int ties(const TiesProblem& problem, int* status, void* workspace, void* stream);

}  // namespace cuda

}  // namespace fastedit
