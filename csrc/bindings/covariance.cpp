// fastedit._C.covariance.
#include "common.h"

#include "../covariance.h"

namespace fastedit {
namespace {

#if defined(FASTEDIT_WITH_CUDA)
void covariance_cuda(const TensorView& cov, const TensorView& x, const TensorView* mask, void* stream) {
  int status;
  {
    py::gil_scoped_release release;
    status = cuda::covariance(cov, x, mask, stream);
  }
  check_status("covariance", status);
}
#else
void covariance_cuda(const TensorView&, const TensorView&, const TensorView*, void*) { no_cuda_kernels(); }
#endif

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

}  // namespace

void bind_covariance(py::module_& m) {
  m.def("covariance", &covariance, "cov += xᵀ diag(mask) x in place, cov staying exactly symmetric.",
        py::arg("cov"), py::arg("x"), py::arg("mask").none(true) = py::none(), py::kw_only(),
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
