// An optimiser's step on the entries of a matrix that a mask selects, in one pass and without a stored mask.
//
// Entries are counted row by row of the logical (rows, columns) matrix, whichever way it lies in memory. A mask is a
// function of that index j:
//
//     philox:  word = Philox4x32-10(counter = (low32(j/4), high32(j/4), shard, layer), key = (low32, high32)(seed))[j % 4],
//              selected if word < threshold
//     bits:    bit j % 8 of byte j / 8
//     indices: selected if j is one of them; sorted, each once
//
// SGD, with M the mask and the decay on all entries, on the selected ones, or on none:
//
//     W -= lr (M∘G + decay W)
//
// Adam keeps its two moments for selected entries only, packed in the order of j, so that the k-th selected entry owns
// place k. `offsets` holds the number of selected entries before every mask_block entries (philox and bits).
//
// Then every entry is clamped to clamp_to ± clamp, if that is given. Arithmetic is fp32, rounded once to the parameter's
// type. What stands in the gradient at entries not selected is never used; a NaN in the parameter or in clamp_to gives
// NaN.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "tensor_view.h"

namespace fastedit {

constexpr int64_t mask_block = 4096;

struct Mask {
  enum class Kind { all, philox, bits, indices };
  Kind kind = Kind::all;
  uint64_t seed = 0;
  uint32_t shard = 0, layer = 0, threshold = 0;
  const void* data = nullptr;  // bits or indices
  int64_t size = 0;            // how many bytes of bits, or indices
  bool wide = false;           // indices are 64 bits each
  int64_t start = 0;           // what the first entry of the matrix counts as (CPU, not with indices)
};

enum class DecayScope { all, masked, none };

// Of entries not selected, only `decay` with scope `all` and a clamp change anything.
struct SgdStep {
  float lr = 0;
  float decay = 0;
  DecayScope scope = DecayScope::none;  // none whenever decay is 0
  float clamp = 0;
};

// m += first_rate (g - m);  v = second g² + (1 - second) v;  w -= rate m / (sqrt(v) / correction + eps)
struct AdamStep {
  float first_rate = 0;    // 1 - beta1
  float second = 0;        // beta2
  float second_rate = 0;   // 1 - beta2
  float rate = 0;          // lr / (1 - beta1^step)
  float correction = 1;    // 1 / sqrt(1 - beta2^step)
  float eps = 0;
  float gradient_decay = 0;             // added to the gradient, times w
  float weight_decay = 0;               // lr times the decoupled decay
  DecayScope scope = DecayScope::none;  // of weight_decay; none whenever that is 0
  float clamp = 0;
};

struct AdamState {
  float* first;            // m, v: packed
  float* second;
  const int64_t* offsets;  // null for masks of kind all and indices
};

namespace cpu {

struct MaskedPlan {
  Isa isa;
  int threads;
  int64_t rows, columns;  // of a chunk that is worked on in cache
  int64_t task_rows, task_columns;
  size_t thread_bytes, workspace_bytes;
};

MaskedPlan plan_masked_update(const TensorView& param, const TensorView& grad, const TensorView* clamp_to, Isa isa,
                              int threads);

// param: fp32, bf16 or fp16, any strides; grad and clamp_to: any floating type and strides. Indices serve steps that
// leave other entries alone. The workspace is aligned to 64 bytes.
void masked_sgd(const MaskedPlan& plan, const TensorView& param, const TensorView& grad, const Mask& mask,
                const SgdStep& step, const TensorView* clamp_to, void* workspace);
void masked_adam(const MaskedPlan& plan, const TensorView& param, const TensorView& grad, const Mask& mask,
                 const AdamState& state, const AdamStep& step, const TensorView* clamp_to, void* workspace);

// Whether `count` moments are as many as the mask selects of n entries in all, so far as `offsets` tells.
bool fits(const Mask& mask, const int64_t* offsets, int64_t n, int64_t count, Isa isa);

// bits (bytes,): those of the entries from `start`, a multiple of 8, on.
void philox_bits(const TensorView& bits, const Mask& mask, int64_t start, Isa isa, int threads);

}  // namespace cpu

namespace cuda {

// As above, on the given stream of the tensors' device; returns a cudaError_t (0: launched).
int masked_sgd(const TensorView& param, const TensorView& grad, const Mask& mask, const SgdStep& step,
               const TensorView* clamp_to, void* stream);
int masked_adam(const TensorView& param, const TensorView& grad, const Mask& mask, const AdamState& state,
                const AdamStep& step, const TensorView* clamp_to, void* stream);
int philox_bits(const TensorView& bits, const Mask& mask, int64_t start, void* stream);

}  // namespace cuda

}  // namespace fastedit
