// fastedit._C.nearest_key and max_inner_product.
#include "common.h"

#include "../retrieval.h"

namespace fastedit {
namespace {

// A tensor that may be None, of one dimension and a given length.
struct OptionalVector {
  OptionalVector(const char* name, py::handle object, DType dtype, const char* expected, int64_t length,
                 const TensorView& first, bool use_dlpack)
      : given(!object.is_none()) {
    if (!given) return;
    view = dlpack::view_of(name, object, use_dlpack);
    require_dtype(view.dtype == dtype, name, view, expected);
    require(view.n_dims == 1 && view.shape[0] == length,
            std::string(name) + ": shape (" + std::to_string(length) + ",) expected, got " + shape_text(view));
    require_same_device(name, view, first);
  }
  const TensorView* get() const { return given ? &view : nullptr; }

  bool given;
  TensorView view;
};

struct Inputs {
  Inputs(py::handle queries_object, py::handle keys_object, py::handle alive_object, py::handle scale_object,
         bool use_dlpack)
      : queries(dlpack::view_of("queries", queries_object, use_dlpack)),
        keys(dlpack::view_of("keys", keys_object, use_dlpack)),
        alive("alive", alive_object, DType::boolean, "bool", keys.shape[0], queries, use_dlpack),
        scale("scale", scale_object, DType::f32, "float32", keys.shape[0], queries, use_dlpack) {
    require_dtype(queries.dtype == DType::f32, "queries", queries, "float32");
    require_dtype(is_half_or_float(keys.dtype) || keys.dtype == DType::i8, "keys", keys,
                  "float32, bfloat16, float16 or int8");
    require(!scale.given || keys.dtype == DType::i8, "scale: belongs to int8 keys");
    require_unit_stride("queries", queries);
    require(queries.shape[0] <= 1 || queries.stride[0] == queries.shape[1], "queries: must be contiguous");
    require_unit_stride("keys", keys);
    require_shape("keys", keys, keys.shape[0], queries.shape[1]);
    require_same_device("keys", keys, queries);
  }

  TensorView queries, keys;
  OptionalVector alive, scale;
};

TensorView output(const char* name, py::handle object, DType dtype, const char* expected, const TensorView& queries,
                  bool use_dlpack) {
  const TensorView view = dlpack::view_of(name, object, use_dlpack);
  require_dtype(view.dtype == dtype, name, view, expected);
  require(view.n_dims >= 1 && view.shape[0] == queries.shape[0],
          std::string(name) + ": one row for each query expected, got " + shape_text(view));
  bool contiguous = true;
  int64_t step = 1;
  for (int i = view.n_dims - 1; i >= 0; --i) {
    contiguous = contiguous && (view.shape[i] <= 1 || view.stride[i] == step);
    step *= view.shape[i];
  }
  require(contiguous, std::string(name) + ": must be contiguous");
  require_same_device(name, view, queries);
  return view;
}

#if defined(FASTEDIT_WITH_CUDA)
template <class Launch>
void launch_cuda(const char* operation, const Inputs& in, int64_t k, void* stream, Launch launch) {
  int status;
  {
    py::gil_scoped_release release;
    const DeviceScratch scratch(operation, cuda::retrieval_workspace(in.queries, in.keys, k), in.queries.device_index,
                                stream);
    status = launch(scratch.get());
  }
  check_status(operation, status);
}
#endif

void nearest_key(py::handle queries_object, py::handle keys_object, py::handle index_object,
                 py::handle distance_object, py::handle radius_object, py::handle alive_object,
                 py::handle scale_object, const py::object& isa_name, bool use_dlpack) {
  const Inputs in(queries_object, keys_object, alive_object, scale_object, use_dlpack);
  const OptionalVector radius("radius", radius_object, DType::f32, "float32", in.keys.shape[0], in.queries, use_dlpack);
  const TensorView index = output("index", index_object, DType::i64, "int64", in.queries, use_dlpack);
  const TensorView distance = output("distance", distance_object, DType::f32, "float32", in.queries, use_dlpack);
  require(index.n_dims == 1 && distance.n_dims == 1, "index, distance: 1 dimension expected");
  if (in.queries.device == DeviceKind::cuda) {
    void* stream = stream_for(queries_object, in.queries.device_index, use_dlpack);
#if defined(FASTEDIT_WITH_CUDA)
    launch_cuda("nearest_key", in, 1, stream, [&](void* workspace) {
      return cuda::nearest_key(in.queries, in.keys, radius.get(), in.alive.get(), in.scale.get(), index, distance,
                               workspace, stream);
    });
#endif
    (void)stream;
    return;
  }
  (void)isa_name;
}

void max_inner_product(py::handle queries_object, py::handle keys_object, py::handle indices_object,
                       py::handle scores_object, py::handle threshold_object, py::handle alive_object,
                       py::handle scale_object, bool highest, const py::object& isa_name, bool use_dlpack) {
  const Inputs in(queries_object, keys_object, alive_object, scale_object, use_dlpack);
  const OptionalVector threshold("threshold", threshold_object, DType::f32, "float32", in.queries.shape[0], in.queries,
                                 use_dlpack);
  const TensorView indices = output("indices", indices_object, DType::i64, "int64", in.queries, use_dlpack);
  const TensorView scores = output("scores", scores_object, DType::f32, "float32", in.queries, use_dlpack);
  require(indices.n_dims == 2 && scores.n_dims == 2 && indices.shape[1] == scores.shape[1] && indices.shape[1] >= 1,
          "indices, scores: shape (B, k) expected, got " + shape_text(indices) + " and " + shape_text(scores));
  if (in.queries.device == DeviceKind::cuda) {
    void* stream = stream_for(queries_object, in.queries.device_index, use_dlpack);
#if defined(FASTEDIT_WITH_CUDA)
    launch_cuda("max_inner_product", in, indices.shape[1], stream, [&](void* workspace) {
      return cuda::max_inner_product(in.queries, in.keys, threshold.get(), in.alive.get(), in.scale.get(), highest,
                                     indices, scores, workspace, stream);
    });
#endif
    (void)stream;
    return;
  }
  (void)isa_name;
}

}  // namespace

void bind_retrieval(py::module_& m) {
  m.def("nearest_key", &nearest_key, "The nearest key of every query, where it covers the query.",
        py::arg("queries"), py::arg("keys"), py::arg("index"), py::arg("distance"), py::kw_only(),
        py::arg("radius").none(true) = py::none(), py::arg("alive").none(true) = py::none(),
        py::arg("scale").none(true) = py::none(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("max_inner_product", &max_inner_product, "The keys of greatest inner product with every query.",
        py::arg("queries"), py::arg("keys"), py::arg("indices"), py::arg("scores"), py::kw_only(),
        py::arg("threshold").none(true) = py::none(), py::arg("alive").none(true) = py::none(),
        py::arg("scale").none(true) = py::none(), py::arg("highest") = false, py::arg("isa") = py::none(),
        py::arg("use_dlpack") = true);
}

}  // namespace fastedit
