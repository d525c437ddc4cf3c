// fastedit._C.low_rank_update.
#include "common.h"

#include "../low_rank.h"

namespace fastedit {
namespace {

#if defined(FASTEDIT_WITH_CUDA)
void low_rank_cuda(const TensorView& weight, const TensorView& left, const TensorView& right,
                   const LowRankOptions& options, const TensorView* out_norm, const TensorView* residual,
                   void* stream) {
  py::gil_scoped_release release;
  const size_t bytes = out_norm ? sizeof(double) * size_t(cuda::low_rank_workspace_doubles(weight)) : 0;
  const DeviceScratch workspace("low_rank_update", bytes, weight.device_index, stream);
  check_status("low_rank_update", cuda::low_rank(weight, left, right, options, out_norm, residual,
                                                 static_cast<double*>(workspace.get()), stream));
}
#else
void low_rank_cuda(const TensorView&, const TensorView&, const TensorView&, const LowRankOptions&, const TensorView*,
                   const TensorView*, void*) {
  no_cuda_kernels();
}
#endif

void write_scalar(const TensorView& out, double value) {
  if (out.dtype == DType::f64)
    *static_cast<double*>(out.data) = value;
  else
    *static_cast<float*>(out.data) = float(value);
}

void low_rank_update(py::handle weight_object, py::handle left_object, py::handle right_object, double alpha,
                     bool transposed, bool stochastic, uint64_t seed, py::handle norm_object,
                     py::handle residual_object, bool carry, const py::object& isa_name, bool use_dlpack) {
  const TensorView weight = dlpack::view_of("weight", weight_object, use_dlpack);
  const TensorView left = dlpack::view_of("left", left_object, use_dlpack);
  const TensorView right = dlpack::view_of("right", right_object, use_dlpack);
  require_dtype(is_half_or_float(weight.dtype) || weight.dtype == DType::f64, "weight", weight, "float64, float32, bfloat16 or float16");
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
  TensorView residual;
  const bool has_residual = !residual_object.is_none();
  if (has_residual) {
    residual = dlpack::view_of("residual", residual_object, use_dlpack);
    require_dtype(weight.dtype == DType::bf16 || weight.dtype == DType::f16, "weight", weight,
                  "with a residual, bfloat16 or float16");
    require_dtype(residual.dtype == DType::f32, "residual", residual, "float32");
    require_unit_stride("residual", residual);
    require_shape("residual", residual, weight.shape[0], weight.shape[1]);
    require_separate_rows("residual", residual);
    require_same_device("residual", residual, weight);
  }
  require(has_residual || !carry, "carry: needs a residual");
  const LowRankOptions options{alpha, transposed, stochastic, seed, carry};
  if (weight.device == DeviceKind::cuda)
    return low_rank_cuda(weight, left, right, options, has_norm ? &out_norm : nullptr,
                         has_residual ? &residual : nullptr,
                         stream_for(weight_object, weight.device_index, use_dlpack));
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::LowRankPlan plan = cpu::plan_low_rank(weight, left, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  double norm = 0.0;
  cpu::low_rank(plan, weight, left, right, options, has_norm ? &norm : nullptr,
                has_residual ? &residual : nullptr, scratch.get());
  if (has_norm) write_scalar(out_norm, norm);
}

}  // namespace

void bind_low_rank(py::module_& m) {
  m.def("low_rank_update", &low_rank_update, "weight += alpha * left rightᵀ in place, rounded once.",
        py::arg("weight"), py::arg("left"), py::arg("right"), py::arg("alpha") = 1.0, py::arg("transposed") = false,
        py::arg("stochastic") = false, py::arg("seed") = 0, py::arg("out_norm").none(true) = py::none(),
        py::arg("residual").none(true) = py::none(), py::arg("carry") = false, py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
