// The CPU kernels against plain loops, without Python: for processors on which the test suite cannot run, under an
// emulator for instance. Prints one line for each check; the exit status is the number of failures.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "covariance.h"
#include "low_rank.h"
#include "masked_update.h"
#include "neuron_select.h"
#include "philox.h"
#include "retrieval.h"
#include "ties.h"

using namespace fastedit;

namespace {

int failures = 0;

void report(const char* name, double error, double tolerance) {
  const bool good = error <= tolerance;  // false for NaN
  std::printf("%s %s: error %.3g, tolerance %.3g\n", good ? "ok  " : "FAIL", name, error, tolerance);
  failures += !good;
}

std::vector<float> normal(size_t n, unsigned seed) {
  std::mt19937 words(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> out(n);
  for (float& value : out) value = distribution(words);
  return out;
}

uint16_t bf16_of(float value) {  // truncated: any bfloat16 serves as input
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

float float_of(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

TensorView matrix(void* data, DType dtype, int64_t rows, int64_t columns) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  view.n_dims = 2;
  view.shape[0] = rows, view.shape[1] = columns;
  view.stride[0] = columns, view.stride[1] = 1;
  return view;
}

TensorView row(void* data, DType dtype, int64_t n) {
  TensorView view = matrix(data, dtype, n, 1);
  view.n_dims = 1;
  view.stride[0] = 1;
  return view;
}

struct Workspace {
  explicit Workspace(size_t bytes) : memory(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096)) {}
  ~Workspace() { std::free(memory); }
  void* memory;
};

void covariance() {
  const int64_t tokens = 75, d = 41;
  const std::vector<float> values = normal(size_t(tokens * d), 1);
  std::vector<uint16_t> x;
  for (float value : values) x.push_back(bf16_of(value));
  std::vector<float> cov(size_t(d * d), 0.5f);
  const TensorView out = matrix(cov.data(), DType::f32, d, d), in = matrix(x.data(), DType::bf16, tokens, d);
  const cpu::CovariancePlan plan = cpu::plan_covariance(out, in, cpu::covariance_isa(in.dtype), 2);
  const Workspace workspace(plan.workspace_bytes);
  cpu::covariance(plan, out, in, nullptr, workspace.memory);
  double error = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      double sum = 0.5;
      for (int64_t t = 0; t < tokens; ++t) sum += double(float_of(x[t * d + i])) * double(float_of(x[t * d + j]));
      error = std::max(error, std::abs(sum - double(cov[i * d + j])));
    }
  report("covariance, bfloat16", error, 1e-4);
}

void low_rank() {
  const int64_t d_out = 37, d_in = 53, rank = 5;
  std::vector<float> w = normal(size_t(d_out * d_in), 2), left = normal(size_t(d_out * rank), 3),
                     right = normal(size_t(d_in * rank), 4);
  const std::vector<float> start = w;
  LowRankOptions options;
  options.alpha = 0.25;
  const TensorView weight = matrix(w.data(), DType::f32, d_out, d_in);
  const TensorView l = matrix(left.data(), DType::f32, d_out, rank), r = matrix(right.data(), DType::f32, d_in, rank);
  const cpu::LowRankPlan plan = cpu::plan_low_rank(weight, l, best_isa(), 2);
  const Workspace workspace(plan.workspace_bytes);
  double norm = 0, error = 0, squares = 0;
  cpu::low_rank(plan, weight, l, r, options, &norm, nullptr, workspace.memory);
  for (int64_t i = 0; i < d_out; ++i)
    for (int64_t j = 0; j < d_in; ++j) {
      double delta = 0;
      for (int64_t k = 0; k < rank; ++k) delta += 0.25 * double(left[i * rank + k]) * double(right[j * rank + k]);
      squares += delta * delta;
      error = std::max(error, std::abs(double(start[i * d_in + j]) + delta - double(w[i * d_in + j])));
    }
  report("low_rank, float32", error, 1e-5);
  report("low_rank, norm", std::abs(norm - std::sqrt(squares)), 1e-4);
}

void neuron_select() {
  const int64_t d = 517;
  const double mass = 0.6;
  std::vector<float> scores = normal(size_t(d), 5);
  for (float& score : scores) score = std::abs(score);
  std::vector<uint8_t> mask(static_cast<size_t>(d), 7);
  std::vector<int32_t> indices(static_cast<size_t>(d), 7), count(1, 7);
  const TensorView in = matrix(scores.data(), DType::f32, 1, d), m = matrix(mask.data(), DType::boolean, 1, d);
  const TensorView i = matrix(indices.data(), DType::i32, 1, d), c = row(count.data(), DType::i32, 1);
  const cpu::NeuronSelectPlan plan = cpu::plan_neuron_select(in, best_isa(), 1);
  const Workspace workspace(plan.workspace_bytes);
  cpu::neuron_select(plan, in, mass, SelectRule::at_least, m, i, c, workspace.memory);
  double total = 0, held = 0, smallest = 1e30, largest_out = 0;
  for (int64_t k = 0; k < d; ++k) {
    total += double(scores[size_t(k)]);
    if (mask[size_t(k)]) {
      held += double(scores[size_t(k)]);
      smallest = std::min(smallest, double(scores[size_t(k)]));
    } else {
      largest_out = std::max(largest_out, double(scores[size_t(k)]));
    }
  }
  const bool right = held >= mass * total && held - smallest < mass * total && smallest >= largest_out;
  report("neuron_select, the smallest set", right ? 0 : 1, 0);
}

void masked_sgd() {
  const int64_t rows = 19, columns = 33;
  std::vector<float> w = normal(size_t(rows * columns), 6), g = normal(size_t(rows * columns), 7);
  const std::vector<float> start = w;
  const TensorView param = matrix(w.data(), DType::f32, rows, columns);
  const TensorView gradient = matrix(g.data(), DType::f32, rows, columns);
  Mask mask;
  mask.kind = Mask::Kind::philox;
  mask.seed = 11, mask.shard = 2, mask.layer = 3, mask.threshold = 1u << 30;
  SgdStep step;
  step.lr = 0.5f;
  const cpu::MaskedPlan plan = cpu::plan_masked_update(param, gradient, nullptr, best_isa(), 2);
  const Workspace workspace(plan.workspace_bytes);
  cpu::masked_sgd(plan, param, gradient, mask, step, nullptr, workspace.memory);
  double error = 0;
  int64_t selected = 0;
  for (int64_t k = 0; k < rows * columns; ++k) {
    const PhiloxWords words = philox(uint64_t(k) / 4, mask.seed, mask.shard, mask.layer);
    const bool chosen = words.word[k % 4] < mask.threshold;
    selected += chosen;
    const double expected = double(start[size_t(k)]) - (chosen ? 0.5 * double(g[size_t(k)]) : 0.0);
    error = std::max(error, std::abs(expected - double(w[size_t(k)])));
  }
  report("masked_sgd, one entry in four", error, 1e-6);
  report("masked_sgd, density", std::abs(double(selected) / double(rows * columns) - 0.25), 0.1);
}

void nearest() {
  const int64_t n = 203, d = 37, batch = 3;
  std::vector<float> k = normal(size_t(n * d), 8), q = normal(size_t(batch * d), 9);
  cpu::SearchArguments in;
  in.queries = matrix(q.data(), DType::f32, batch, d);
  in.keys = matrix(k.data(), DType::f32, n, d);
  in.nearest = true;
  const cpu::SearchPlan plan = cpu::plan_search(in, best_isa(), 2);
  const Workspace workspace(plan.workspace_bytes);
  std::vector<double> values(size_t(batch), -INFINITY);
  std::vector<int64_t> found(size_t(batch), -1);
  cpu::search(plan, in, values.data(), found.data(), workspace.memory);
  int wrong = 0;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t best = -1;
    double least = INFINITY;
    for (int64_t i = 0; i < n; ++i) {
      double distance = 0;
      for (int64_t j = 0; j < d; ++j) {
        const double difference = double(q[size_t(b * d + j)]) - double(k[size_t(i * d + j)]);
        distance += difference * difference;
      }
      if (distance < least) least = distance, best = i;
    }
    wrong += found[size_t(b)] != best;
  }
  report("nearest key", wrong, 0);
}

void ties() {
  // Two updates of equal weight, half of each kept: the mean of the kept ones that have the elected sign.
  std::vector<float> base = {1, 1, 1, 1}, first = {5, 0, 1.5f, 1}, second = {3, 2, 1, 0.75f}, out(4, -7.0f);
  const TiesInput inputs[] = {{first.data(), 0.5f, 2}, {second.data(), 0.5f, 2}};
  TiesProblem problem;
  problem.out = row(out.data(), DType::f32, 4), problem.base = row(base.data(), DType::f32, 4);
  problem.inputs = inputs, problem.n_inputs = 2;
  problem.options = {true, true, false, false, 1.0f, 1.0f};
  const cpu::TiesPlan plan = cpu::plan_ties(problem, best_isa(), 2);
  const Workspace workspace(plan.workspace_bytes);
  const int status = cpu::ties(plan, problem, workspace.memory);
  const float expected[] = {4, 2, 1, 1};  // of the first 4 and -1 are kept, of the second 2 and 1
  double error = status != problem.n_inputs;
  for (int i = 0; i < 4; ++i) error = std::max(error, std::abs(double(out[size_t(i)]) - double(expected[i])));
  report("ties", error, 0);
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", name_of(best_isa()));
  covariance();
  low_rank();
  neuron_select();
  masked_sgd();
  nearest();
  ties();
  return failures;
}
