// fastedit._C: checks arguments, picks cpu or cuda, allocates scratch memory, releases the GIL, launches.
//
// Called by fastedit.ops, which has checked shapes and values with better words; the checks here are those that keep
// kernels inside memory.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "covariance.h"
#include "device.h"
#include "dlpack_exchange.h"
#include "isa.h"
#include "low_rank.h"
#include "tensor_view.h"

#if !defined(FASTEDIT_VERSION)
#define FASTEDIT_VERSION "unknown"
#endif
#if !defined(FASTEDIT_CUDA_ARCHS)
#define FASTEDIT_CUDA_ARCHS ""
#endif
#if !defined(FASTEDIT_NO_CUDA_REASON)
#define FASTEDIT_NO_CUDA_REASON "no nvcc at build time"
#endif

namespace py = pybind11;

namespace fastedit {
namespace {

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// --- Scratch memory of the CPU kernels -----------------------------------------------------------------------------

constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t kept_bytes = size_t(64) << 20;  // a thread keeps a buffer up to this size for its next call

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

Buffer allocate_buffer(size_t bytes) {
  const size_t alignment = bytes >= huge_page ? huge_page : 4096;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  Buffer buffer(std::aligned_alloc(alignment, bytes));
  if (!buffer) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= huge_page) madvise(buffer.get(), bytes, MADV_HUGEPAGE);  // fewer page faults and misses; may be refused
#endif
  return buffer;
}

// Scratch memory for one call, from the calling thread's kept buffer if that is large enough.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    static thread_local Buffer kept;
    static thread_local size_t kept_size = 0;
    if (bytes > kept_bytes) {
      own_ = allocate_buffer(bytes);
      memory_ = own_.get();
      return;
    }
    if (bytes > kept_size) {
      kept.reset();
      kept_size = 0;
      kept = allocate_buffer(bytes);
      kept_size = bytes;
    }
    memory_ = kept.get();
  }
  void* get() const { return memory_; }

 private:
  Buffer own_;
  void* memory_ = nullptr;
};

// --- Checks --------------------------------------------------------------------------------------------------------

std::string shape_text(const TensorView& view) {
  std::string text = "(";
  for (int i = 0; i < view.n_dims; ++i) text += std::to_string(view.shape[i]) + (i + 1 < view.n_dims ? ", " : "");
  return text + (view.n_dims == 1 ? ",)" : ")");
}

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

void require_dtype(bool condition, const char* name, const TensorView& view, const char* expected) {
  if (!condition) throw py::type_error(std::string(name) + ": " + expected + " expected, got " + name_of(view.dtype));
}

void require_shape(const char* name, const TensorView& view, int64_t rows, int64_t columns) {
  require(view.n_dims == 2 && view.shape[0] == rows && view.shape[1] == columns,
          std::string(name) + ": shape (" + std::to_string(rows) + ", " + std::to_string(columns) + ") expected, got " +
              shape_text(view));
}

// Rows of adjacent elements. A row of one element has no stride to speak of.
void require_unit_stride(const char* name, const TensorView& view) {
  require(view.n_dims == 2, std::string(name) + ": 2 dimensions expected, got shape " + shape_text(view));
  require(view.shape[1] <= 1 || view.stride[1] == 1 || view.numel() == 0,
          std::string(name) + ": last dimension must be contiguous, its stride is " + std::to_string(view.stride[1]));
}

void require_separate_rows(const char* name, const TensorView& view) {
  require(view.shape[0] <= 1 || view.stride[0] >= view.shape[1] || view.numel() == 0,
          std::string(name) + ": rows overlap in memory");
}

void require_same_device(const char* name, const TensorView& view, const TensorView& first) {
  require(view.device == first.device && view.device_index == first.device_index,
          std::string(name) + ": not on the same device as the first tensor");
}

bool is_half_or_float(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32; }

Isa isa_of(const py::object& name, Isa preferred) {
  if (name.is_none()) return preferred;
  const Isa best = best_isa();
  const auto text = name.cast<std::string>();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (text == name_of(isa)) {
      require(isa <= best, "isa: this CPU has " + std::string(name_of(best)) + ", not " + text);
      return isa;
    }
  throw py::value_error("isa: scalar, avx2, avx512 or avx512_bf16 expected, got " + text);
}

// --- CUDA ----------------------------------------------------------------------------------------------------------

#if defined(FASTEDIT_WITH_CUDA)

void check_status(const char* operation, int status) {
  if (status != 0) throw std::runtime_error(std::string(operation) + ": " + cuda::error_text(status));
}

void covariance_cuda(const TensorView& cov, const TensorView& x, const TensorView* mask, void* stream) {
  int status;
  {
    py::gil_scoped_release release;
    status = cuda::covariance(cov, x, mask, stream);
  }
  check_status("covariance", status);
}

void low_rank_cuda(const TensorView& weight, const TensorView& left, const TensorView& right,
                   const LowRankOptions& options, const TensorView* out_norm, void* stream) {
  int status = 0;
  {
    py::gil_scoped_release release;
    void* workspace = nullptr;
    if (out_norm) {
      const size_t bytes = sizeof(double) * size_t(cuda::low_rank_workspace_doubles(weight));
      status = cuda::allocate(&workspace, bytes, weight.device_index, stream);
    }
    if (status == 0)
      status = cuda::low_rank(weight, left, right, options, out_norm, static_cast<double*>(workspace), stream);
    if (workspace) {
      const int released = cuda::release(workspace, weight.device_index, stream);
      if (status == 0) status = released;
    }
  }
  check_status("low_rank_update", status);
}

#else

[[noreturn]] void no_cuda_kernels() {
  throw std::runtime_error("built without CUDA kernels (" FASTEDIT_NO_CUDA_REASON ")");
}

void covariance_cuda(const TensorView&, const TensorView&, const TensorView*, void*) { no_cuda_kernels(); }
void low_rank_cuda(const TensorView&, const TensorView&, const TensorView&, const LowRankOptions&, const TensorView*,
                   void*) {
  no_cuda_kernels();
}

#endif  // FASTEDIT_WITH_CUDA

// Refuses before asking for a stream, which may fail with a less helpful message.
void* stream_for(py::handle tensor, int device_index, bool allow_api) {
#if defined(FASTEDIT_WITH_CUDA)
  return dlpack::current_stream(tensor, device_index, allow_api);
#else
  (void)tensor, (void)device_index, (void)allow_api;
  no_cuda_kernels();
#endif
}

// --- Operations ----------------------------------------------------------------------------------------------------

void covariance(py::handle cov_object, py::handle x_object, py::handle mask_object, const py::object& isa_name,
                bool use_dlpack) {
  const TensorView cov = dlpack::view_of("cov", cov_object, use_dlpack);
  const TensorView x = dlpack::view_of("x", x_object, use_dlpack);
  require_dtype(cov.dtype == DType::f32 || cov.dtype == DType::f64, "cov", cov, "float32 or float64");
  require_dtype(is_half_or_float(x.dtype) || (x.dtype == DType::f64 && cov.dtype == DType::f64), "x", x,
                x.dtype == DType::f64 ? "with a float32 cov, float32, bfloat16 or float16"
                                      : "float64, float32, bfloat16 or float16");
  require_unit_stride("x", x);
  require_shape("cov", cov, x.shape[1], x.shape[1]);
  require_unit_stride("cov", cov);
  require(cov.shape[0] <= 1 || cov.stride[0] == cov.shape[1], "cov: must be contiguous");
  require_same_device("x", x, cov);
  TensorView mask;
  const bool has_mask = !mask_object.is_none();
  if (has_mask) {
    mask = dlpack::view_of("mask", mask_object, use_dlpack);
    require_dtype(mask.dtype == DType::boolean, "mask", mask, "bool");
    require(mask.n_dims == 1 && mask.shape[0] == x.shape[0],
            "mask: shape (" + std::to_string(x.shape[0]) + ",) expected, got " + shape_text(mask));
    require_same_device("mask", mask, cov);
  }
  if (cov.device == DeviceKind::cuda)
    return covariance_cuda(cov, x, has_mask ? &mask : nullptr,
                           stream_for(cov_object, cov.device_index, use_dlpack));
  const Isa isa = isa_of(isa_name, cpu::covariance_isa(x.dtype));
  py::gil_scoped_release release;
  const cpu::CovariancePlan plan = cpu::plan_covariance(cov, x, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  cpu::covariance(plan, cov, x, has_mask ? &mask : nullptr, scratch.get());
}

void write_scalar(const TensorView& out, double value) {
  if (out.dtype == DType::f64)
    *static_cast<double*>(out.data) = value;
  else
    *static_cast<float*>(out.data) = float(value);
}

void low_rank_update(py::handle weight_object, py::handle left_object, py::handle right_object, double alpha,
                     bool transposed, bool stochastic, uint64_t seed, py::handle norm_object,
                     const py::object& isa_name, bool use_dlpack) {
  const TensorView weight = dlpack::view_of("weight", weight_object, use_dlpack);
  const TensorView left = dlpack::view_of("left", left_object, use_dlpack);
  const TensorView right = dlpack::view_of("right", right_object, use_dlpack);
  require_dtype(weight.dtype != DType::boolean, "weight", weight, "float64, float32, bfloat16 or float16");
  const bool f64 = weight.dtype == DType::f64;
  const char* factor = f64 ? "with a float64 weight, float64" : "float32";
  require_dtype(left.dtype == (f64 ? DType::f64 : DType::f32), "left", left, factor);
  require_dtype(right.dtype == (f64 ? DType::f64 : DType::f32), "right", right, factor);
  for (const auto& [name, view] : {std::pair{"weight", &weight}, {"left", &left}, {"right", &right}}) {
    require_unit_stride(name, *view);
    require_same_device(name, *view, weight);
  }
  require_separate_rows("weight", weight);
  const int64_t d_out = weight.shape[transposed ? 1 : 0], d_in = weight.shape[transposed ? 0 : 1];
  require_shape("left", left, d_out, left.shape[1]);
  require_shape("right", right, d_in, left.shape[1]);
  TensorView out_norm;
  const bool has_norm = !norm_object.is_none();
  if (has_norm) {
    out_norm = dlpack::view_of("out_norm", norm_object, use_dlpack);
    require_dtype(out_norm.dtype == DType::f32 || out_norm.dtype == DType::f64, "out_norm", out_norm,
                  "float32 or float64");
    require(out_norm.numel() == 1, "out_norm: one element expected, got shape " + shape_text(out_norm));
    require_same_device("out_norm", out_norm, weight);
  }
  const LowRankOptions options{alpha, transposed, stochastic, seed};
  if (weight.device == DeviceKind::cuda)
    return low_rank_cuda(weight, left, right, options, has_norm ? &out_norm : nullptr,
                         stream_for(weight_object, weight.device_index, use_dlpack));
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::LowRankPlan plan = cpu::plan_low_rank(weight, left, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  double norm = 0.0;
  cpu::low_rank(plan, weight, left, right, options, has_norm ? &norm : nullptr, scratch.get());
  if (has_norm) write_scalar(out_norm, norm);
}

py::dict info() {
  py::dict out;
  py::list archs;
  const std::string text = FASTEDIT_CUDA_ARCHS;
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(';', start), text.size());
    archs.append(text.substr(start, end - start));
    start = end + 1;
  }
#if defined(FASTEDIT_WITH_CUDA)
  const cuda::Availability cuda = cuda::availability();
  out["cuda_built"] = true;
  out["cuda_available"] = cuda.available;
  out["cuda_reason"] = cuda.reason;
#else
  out["cuda_built"] = false;
  out["cuda_available"] = false;
  out["cuda_reason"] = "built without CUDA kernels (" FASTEDIT_NO_CUDA_REASON ")";
#endif
  out["version"] = FASTEDIT_VERSION;
  out["cuda_archs"] = archs;
  out["cpu_isa"] = name_of(best_isa());
  out["openmp_max_threads"] = max_threads();
  return out;
}

}  // namespace
}  // namespace fastedit

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastedit. Called through fastedit.ops, which documents and checks the arguments.";
  m.def("covariance", &fastedit::covariance, "cov += xᵀ diag(mask) x in place, cov staying exactly symmetric.",
        py::arg("cov"), py::arg("x"), py::arg("mask").none(true) = py::none(), py::kw_only(),
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("low_rank_update", &fastedit::low_rank_update, "weight += alpha * left rightᵀ in place, rounded once.",
        py::arg("weight"), py::arg("left"), py::arg("right"), py::arg("alpha") = 1.0, py::arg("transposed") = false,
        py::arg("stochastic") = false, py::arg("seed") = 0, py::arg("out_norm").none(true) = py::none(),
        py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("info", &fastedit::info, "What was built, what this machine has, and why CUDA is not available if it is not.");
}
