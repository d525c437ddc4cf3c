// fastedit._C.ties_merge.
#include <pybind11/stl.h>

#include <vector>

#include "common.h"

#include "../ties.h"

namespace fastedit {
namespace {

#if defined(FASTEDIT_WITH_CUDA)
void ties_cuda(const TiesProblem& problem, int* status, void* stream) {
  py::gil_scoped_release release;
  size_t bytes = 0;
  check_status("ties_merge", cuda::ties_workspace(problem, &bytes));
  const DeviceScratch workspace("ties_merge", bytes, problem.base.device_index, stream);
  check_status("ties_merge", cuda::ties(problem, status, workspace.get(), stream));
}
#else
void ties_cuda(const TiesProblem&, int*, void*) { no_cuda_kernels(); }
#endif

void require_entries(const char* name, const TensorView& view, const TensorView& base) {
  require_dtype(view.dtype == base.dtype, name, view, name_of(base.dtype));
  require(view.n_dims == 1 && view.shape[0] == base.shape[0] && (view.shape[0] <= 1 || view.stride[0] == 1),
          std::string(name) + ": shape (" + std::to_string(base.shape[0]) + ",), contiguous, expected, got " +
              shape_text(view));
  require_same_device(name, view, base);
}

void ties_merge(py::handle out_object, py::handle base_object, const py::sequence& tensors,
                const std::vector<double>& weights, const std::vector<int64_t>& keep, py::handle status_object,
                bool elect, bool normalise, bool majority, bool all_at_threshold, double scale, double divisor,
                const py::object& isa_name, bool use_dlpack) {
  const TensorView base = dlpack::view_of("base", base_object, use_dlpack);
  require_dtype(is_half_or_float(base.dtype), "base", base, "float32, bfloat16 or float16");
  require_entries("base", base, base);
  const TensorView out = dlpack::view_of("out", out_object, use_dlpack);
  require_entries("out", out, base);
  require(!tensors.empty() && tensors.size() <= size_t(max_ties_tensors),
          "tensors: 1 to " + std::to_string(max_ties_tensors) + " expected, got " + std::to_string(tensors.size()));
  require(weights.size() == tensors.size() && keep.size() == tensors.size(),
          "weights and keep: one number for each tensor expected");
  std::vector<TiesInput> inputs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView view = dlpack::view_of("tensors", tensors[i], use_dlpack);
    require_entries("tensors", view, base);
    require(keep[i] >= 0, "keep: numbers of entries expected, got " + std::to_string(keep[i]));
    inputs.push_back({view.data, float(weights[i]), keep[i]});
  }
  const TensorView status = dlpack::view_of("status", status_object, use_dlpack);
  require_dtype(status.dtype == DType::i32, "status", status, "int32");
  require(status.numel() == 1, "status: one element expected, got shape " + shape_text(status));
  require_same_device("status", status, base);
  const TiesProblem problem{out, base, inputs.data(), int(inputs.size()),
                            {elect, normalise, majority, all_at_threshold, float(scale), float(divisor)}};
  if (base.device == DeviceKind::cuda)
    return ties_cuda(problem, static_cast<int*>(status.data),
                     stream_for(base_object, base.device_index, use_dlpack));
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::TiesPlan plan = cpu::plan_ties(problem, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  *static_cast<int32_t*>(status.data) = cpu::ties(plan, problem, scratch.get());
}

}  // namespace

void bind_ties(py::module_& m) {
  m.def("ties_merge", &ties_merge,
        "out = base + the merged differences; status receives the first tensor that is not finite, or their number.",
        py::arg("out"), py::arg("base"), py::arg("tensors"), py::arg("weights"), py::arg("keep"), py::arg("status"),
        py::kw_only(), py::arg("elect") = true, py::arg("normalise") = true, py::arg("majority") = false,
        py::arg("all_at_threshold") = false, py::arg("scale") = 1.0, py::arg("divisor") = 1.0,
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
