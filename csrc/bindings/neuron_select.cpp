// fastedit._C.neuron_select, neuron_scores and gather_square.
#include "common.h"

#include "../neuron_select.h"

namespace fastedit {
namespace {

#if defined(FASTEDIT_WITH_CUDA)
// The status of a launch made without the GIL.
template <class Launch>
void launched(const char* operation, const Launch& launch) {
  int status;
  {
    py::gil_scoped_release release;
    status = launch();
  }
  check_status(operation, status);
}
#else
template <class Launch>
void launched(const char*, const Launch&) {
  no_cuda_kernels();
}
namespace cuda {
int neuron_select(const TensorView&, double, SelectRule, const TensorView&, const TensorView&, const TensorView&,
                  void*) { no_cuda_kernels(); }
int neuron_scores(const TensorView&, const TensorView&, void*) { no_cuda_kernels(); }
int gather_square(const TensorView&, const TensorView&, const TensorView&, void*) { no_cuda_kernels(); }
}  // namespace cuda
#endif

constexpr int64_t max_columns = int64_t(1) << 30;  // indices are 32 bits, and loops step beyond the last

void require_contiguous(const char* name, const TensorView& view) {
  int64_t expected = 1;
  for (int i = view.n_dims - 1; i >= 0; --i) {
    require(view.shape[i] <= 1 || view.stride[i] == expected || view.numel() == 0,
            std::string(name) + ": must be contiguous");
    expected *= view.shape[i];
  }
}

void require_length(const char* name, const TensorView& view, int64_t n) {
  require(view.n_dims == 1 && view.shape[0] == n,
          std::string(name) + ": shape (" + std::to_string(n) + ",) expected, got " + shape_text(view));
}

void require_floating(const char* name, const TensorView& view) {
  require_dtype(is_half_or_float(view.dtype) || view.dtype == DType::f64, name, view,
                "float64, float32, bfloat16 or float16");
}

void neuron_select(py::handle scores_object, double mass, bool prefix, py::handle mask_object,
                   py::handle indices_object, py::handle counts_object, const py::object& isa_name, bool use_dlpack) {
  const TensorView scores = dlpack::view_of("scores", scores_object, use_dlpack);
  const TensorView mask = dlpack::view_of("mask", mask_object, use_dlpack);
  const TensorView indices = dlpack::view_of("indices", indices_object, use_dlpack);
  const TensorView counts = dlpack::view_of("counts", counts_object, use_dlpack);
  require_floating("scores", scores);
  require(scores.n_dims == 2, "scores: 2 dimensions expected, got shape " + shape_text(scores));
  require(scores.shape[1] <= max_columns, "scores: at most 2^30 columns expected, got shape " + shape_text(scores));
  require(mass > 0.0, "mass: a positive number expected, got " + std::to_string(mass));
  require_dtype(mask.dtype == DType::boolean, "mask", mask, "bool");
  require_dtype(indices.dtype == DType::i32, "indices", indices, "int32");
  require_dtype(counts.dtype == DType::i32, "counts", counts, "int32");
  require_shape("mask", mask, scores.shape[0], scores.shape[1]);
  require_shape("indices", indices, scores.shape[0], scores.shape[1]);
  require_length("counts", counts, scores.shape[0]);
  for (const auto& [name, view] : {std::pair{"mask", &mask}, {"indices", &indices}, {"counts", &counts}}) {
    require_contiguous(name, *view);
    require_same_device(name, *view, scores);
  }
  const SelectRule rule = prefix ? SelectRule::prefix : SelectRule::at_least;
  if (scores.device == DeviceKind::cuda) {
    require_unit_stride("scores", scores);
    void* stream = stream_for(scores_object, scores.device_index, use_dlpack);
    return launched("neuron_select",
                    [&] { return cuda::neuron_select(scores, mass, rule, mask, indices, counts, stream); });
  }
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::NeuronSelectPlan plan = cpu::plan_neuron_select(scores, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  cpu::neuron_select(plan, scores, mass, rule, mask, indices, counts, scratch.get());
}

void neuron_scores(py::handle keys_object, py::handle out_object, const py::object& isa_name, bool use_dlpack) {
  const TensorView keys = dlpack::view_of("keys", keys_object, use_dlpack);
  const TensorView out = dlpack::view_of("out", out_object, use_dlpack);
  require_floating("keys", keys);
  require(keys.n_dims == 2, "keys: 2 dimensions expected, got shape " + shape_text(keys));
  require_dtype(out.dtype == DType::f64, "out", out, "float64");
  require_length("out", out, keys.shape[0]);
  require_contiguous("out", out);
  require_same_device("out", out, keys);
  if (keys.device == DeviceKind::cuda) {
    void* stream = stream_for(keys_object, keys.device_index, use_dlpack);
    return launched("neuron_scores", [&] { return cuda::neuron_scores(keys, out, stream); });
  }
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  cpu::neuron_scores(keys, out, isa, max_threads());
}

void gather_square(py::handle matrix_object, py::handle indices_object, py::handle out_object,
                   const py::object& isa_name, bool use_dlpack) {
  const TensorView matrix = dlpack::view_of("matrix", matrix_object, use_dlpack);
  const TensorView indices = dlpack::view_of("indices", indices_object, use_dlpack);
  const TensorView out = dlpack::view_of("out", out_object, use_dlpack);
  require_floating("matrix", matrix);
  require_shape("matrix", matrix, matrix.shape[0], matrix.shape[0]);
  require(matrix.shape[0] <= max_columns, "matrix: at most 2^30 columns expected, got shape " + shape_text(matrix));
  require_dtype(indices.dtype == DType::i32 || indices.dtype == DType::i64, "indices", indices, "int32 or int64");
  require_length("indices", indices, indices.shape[0]);
  require_dtype(out.dtype == matrix.dtype, "out", out, name_of(matrix.dtype));
  require_shape("out", out, indices.shape[0], indices.shape[0]);
  require_contiguous("out", out);
  require_same_device("indices", indices, matrix);
  require_same_device("out", out, matrix);
  if (matrix.device == DeviceKind::cuda) {
    void* stream = stream_for(matrix_object, matrix.device_index, use_dlpack);
    return launched("gather_square", [&] { return cuda::gather_square(matrix, indices, out, stream); });
  }
  const Isa isa = isa_of(isa_name, best_isa());
  bool inside;
  {
    py::gil_scoped_release release;
    const Scratch scratch(cpu::gather_square_workspace(matrix, indices));
    inside = cpu::gather_square(matrix, indices, out, isa, max_threads(), scratch.get());
  }
  if (!inside)
    throw py::index_error("gather_square: every index must be in [0, " + std::to_string(matrix.shape[0]) + ")");
}

}  // namespace

void bind_neuron_select(py::module_& m) {
  m.def("neuron_select", &neuron_select,
        "Fills mask, indices and counts with the fewest columns of each row of scores that hold a share of its sum.",
        py::arg("scores"), py::arg("mass"), py::arg("prefix"), py::arg("mask"), py::arg("indices"), py::arg("counts"),
        py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("neuron_scores", &neuron_scores, "out = sums of |keys| over the last dimension, in float64.", py::arg("keys"),
        py::arg("out"), py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("gather_square", &gather_square, "out = matrix[indices][:, indices].", py::arg("matrix"), py::arg("indices"),
        py::arg("out"), py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
