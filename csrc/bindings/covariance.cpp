// fastedit._C.covariance.
#include "common.h"

#include <optional>
#include <vector>

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

cpu::CovarianceLayer layer_of(py::handle cov_object, py::handle x_object, py::handle mask_object,
                              const py::object& isa_name, bool use_dlpack) {
  cpu::CovarianceLayer layer{};
  const TensorView cov = layer.cov = dlpack::view_of("cov", cov_object, use_dlpack);
  const TensorView x = layer.x = dlpack::view_of("x", x_object, use_dlpack);
  require_dtype(cov.dtype == DType::f32 || cov.dtype == DType::f64, "cov", cov, "float32 or float64");
  require_dtype(is_half_or_float(x.dtype) || (x.dtype == DType::f64 && cov.dtype == DType::f64), "x", x,
                x.dtype == DType::f64 ? "with a float32 cov, float32, bfloat16 or float16"
                                      : "float64, float32, bfloat16 or float16");
  require_unit_stride("x", x);
  require_shape("cov", cov, x.shape[1], x.shape[1]);
  require_unit_stride("cov", cov);
  require(cov.shape[0] <= 1 || cov.stride[0] == cov.shape[1], "cov: must be contiguous");
  require_same_device("x", x, cov);
  layer.has_mask = !mask_object.is_none();
  if (layer.has_mask) {
    const TensorView mask = layer.mask = dlpack::view_of("mask", mask_object, use_dlpack);
    require_dtype(mask.dtype == DType::boolean, "mask", mask, "bool");
    require(mask.n_dims == 1 && mask.shape[0] == x.shape[0],
            "mask: shape (" + std::to_string(x.shape[0]) + ",) expected, got " + shape_text(mask));
    require_same_device("mask", mask, cov);
  }
  layer.isa = isa_of(isa_name, cpu::covariance_isa(x.dtype));
  return layer;
}

void covariance(py::handle cov_object, py::handle x_object, py::handle mask_object, const py::object& isa_name,
                bool use_dlpack) {
  const cpu::CovarianceLayer layer = layer_of(cov_object, x_object, mask_object, isa_name, use_dlpack);
  const TensorView* mask = layer.has_mask ? &layer.mask : nullptr;
  if (layer.cov.device == DeviceKind::cuda)
    return covariance_cuda(layer.cov, layer.x, mask, stream_for(cov_object, layer.cov.device_index, use_dlpack));
  py::gil_scoped_release release;
  const cpu::CovariancePlan plan = cpu::plan_covariance(layer.cov, layer.x, layer.isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  cpu::covariance(plan, layer.cov, layer.x, mask, scratch.get());
}

void covariance_layers(const py::list& covs, const py::list& xs, const py::list& masks, const py::object& isa_name,
                       bool use_dlpack) {
  require(covs.size() == xs.size() && covs.size() == masks.size(), "cov, x, mask: lists of one length expected");
  std::vector<cpu::CovarianceLayer> layers;
  for (size_t i = 0; i < covs.size(); ++i) {
    layers.push_back(layer_of(covs[i], xs[i], masks[i], isa_name, use_dlpack));
    require(layers.back().cov.device == DeviceKind::cpu, "cov: several layers in a call are for the CPU");
  }
  py::gil_scoped_release release;
  std::optional<Scratch> scratch;
  cpu::covariance_layers(layers, max_threads(), [&](size_t bytes) { return scratch.emplace(bytes).get(); });
}

}  // namespace

void bind_covariance(py::module_& m) {
  m.def("covariance", &covariance, "cov += xᵀ diag(mask) x in place, cov staying exactly symmetric.",
        py::arg("cov"), py::arg("x"), py::arg("mask").none(true) = py::none(), py::kw_only(),
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("covariance_layers", &covariance_layers, "covariance for lists of tensors on the CPU, one item for each layer.",
        py::arg("cov"), py::arg("x"), py::arg("mask"), py::kw_only(), py::arg("isa") = py::none(),
        py::arg("use_dlpack") = true);
}

}  // namespace fastedit
