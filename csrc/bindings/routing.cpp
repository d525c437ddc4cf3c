// fastedit._C.routing_score.
#include <vector>

#include "common.h"

#include "../routing.h"

namespace fastedit {
namespace {

#if defined(FASTEDIT_WITH_CUDA)
void routing_cuda(const TensorView& x, const TensorView& base, const std::vector<TensorView>& memories,
                  const TensorView* bias, const RoutingOptions& options, const TensorView& scores, void* stream) {
  py::gil_scoped_release release;
  const int64_t floats = cuda::routing_workspace_floats(x, base, int64_t(memories.size()), options);
  const DeviceScratch workspace("routing_score", sizeof(float) * size_t(floats), x.device_index, stream);
  check_status("routing_score", cuda::routing(x, base, memories.data(), int64_t(memories.size()), bias, options, scores,
                                              static_cast<float*>(workspace.get()), stream));
}
#else
void routing_cuda(const TensorView&, const TensorView&, const std::vector<TensorView>&, const TensorView*,
                  const RoutingOptions&, const TensorView&, void*) {
  no_cuda_kernels();
}
#endif

Activation activation_of(const std::string& name) {
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  throw py::value_error("activation: identity, relu, silu, gelu or gelu_tanh expected, got " + name);
}

void require_weight(const char* name, const TensorView& weight, const TensorView& x, const TensorView& base) {
  require_dtype(is_half_or_float(weight.dtype), name, weight, "float32, bfloat16 or float16");
  require_unit_stride(name, weight);
  require_shape(name, weight, base.shape[0], base.shape[1]);
  require_same_device(name, weight, x);
}

void routing_score(py::handle x_object, py::handle base_object, const py::sequence& memory_objects,
                   py::handle scores_object, const std::string& activation, bool transposed, py::handle bias_object,
                   const py::object& isa_name, bool use_dlpack) {
  const TensorView x = dlpack::view_of("x", x_object, use_dlpack);
  const TensorView base = dlpack::view_of("base_weight", base_object, use_dlpack);
  const TensorView scores = dlpack::view_of("scores", scores_object, use_dlpack);
  require_dtype(is_half_or_float(x.dtype), "x", x, "float32, bfloat16 or float16");
  require_unit_stride("x", x);
  require_weight("base_weight", base, x, base);
  const int64_t d_out = base.shape[transposed ? 1 : 0], d_in = base.shape[transposed ? 0 : 1];
  require_shape("x", x, x.shape[0], d_in);
  std::vector<TensorView> memories;
  for (const py::handle object : memory_objects) {
    memories.push_back(dlpack::view_of("memories", object, use_dlpack));
    require_weight("memories", memories.back(), x, base);
  }
  require_dtype(scores.dtype == DType::f32, "scores", scores, "float32");
  require_shape("scores", scores, x.shape[0], int64_t(memories.size()));
  require_unit_stride("scores", scores);
  require(scores.shape[0] <= 1 || scores.stride[0] == scores.shape[1], "scores: must be contiguous");
  require_same_device("scores", scores, x);
  TensorView bias;
  const bool has_bias = !bias_object.is_none();
  if (has_bias) {
    bias = dlpack::view_of("bias", bias_object, use_dlpack);
    require_dtype(bias.dtype == DType::f32, "bias", bias, "float32");
    require(bias.n_dims == 1 && bias.shape[0] == d_out && (d_out <= 1 || bias.stride[0] == 1),
            "bias: shape (" + std::to_string(d_out) + ",), contiguous, expected, got " + shape_text(bias));
    require_same_device("bias", bias, x);
  }
  const RoutingOptions options{activation_of(activation), transposed};
  if (x.device == DeviceKind::cuda)
    return routing_cuda(x, base, memories, has_bias ? &bias : nullptr, options, scores,
                        stream_for(x_object, x.device_index, use_dlpack));
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const auto n_memories = int64_t(memories.size());
  const cpu::RoutingPlan plan = cpu::plan_routing(x, base, n_memories, options, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  cpu::routing(plan, x, base, memories.data(), n_memories, has_bias ? &bias : nullptr, options, scores, scratch.get());
}

}  // namespace

void bind_routing(py::module_& m) {
  m.def("routing_score", &routing_score, "scores[t, m] = |act(W0 x_t + b) - act(W_m x_t + b)|, written in place.",
        py::arg("x"), py::arg("base_weight"), py::arg("memories"), py::arg("scores"), py::arg("activation"),
        py::arg("transposed") = false, py::arg("bias").none(true) = py::none(), py::kw_only(),
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
