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
  cpu::low_rank(plan, weight, l, r, options, &norm, workspace.memory);
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

}  // namespace

int main() {
  std::printf("instruction set: %s\n", name_of(best_isa()));
  covariance();
  low_rank();
  return failures;
}
