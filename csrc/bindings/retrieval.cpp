// fastedit._C.nearest_key and max_inner_product; search_keys and encode_keys, of which a KeyIndex is made.
#include "common.h"

#include <cmath>
#include <limits>
#include <vector>

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
    require(queries.shape[0] <= 1 || queries.shape[1] == 0 || queries.stride[0] == queries.shape[1],
            "queries: must be contiguous");
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

// The best k of a call on the CPU, before thresholds.
struct Found {
  Found(const Inputs& in, bool nearest, bool highest, int64_t k_, Isa isa)
      : k(k_), values(size_t(in.queries.shape[0] * k), -std::numeric_limits<double>::infinity()),
        indices(values.size(), -1) {
    cpu::SearchArguments arguments;
    arguments.queries = in.queries;
    arguments.keys = in.keys;
    arguments.alive = in.alive.get();
    arguments.scale = in.scale.get();
    arguments.nearest = nearest;
    arguments.highest = highest;
    arguments.k = k;
    const cpu::SearchPlan plan = cpu::plan_search(arguments, isa, max_threads());
    const Scratch scratch(plan.workspace_bytes);
    cpu::search(plan, arguments, values.data(), indices.data(), scratch.get());
  }

  int64_t k;
  std::vector<double> values;
  std::vector<int64_t> indices;
};

float element(const TensorView& vector, int64_t i) {
  return static_cast<const float*>(vector.data)[i * vector.stride[0]];
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
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const Found found(in, true, false, 1, isa);
  for (int64_t b = 0; b < in.queries.shape[0]; ++b) {
    const float d = float(std::sqrt(-found.values[size_t(b)]));
    const int64_t j = found.indices[size_t(b)];
    const bool covers = d < std::numeric_limits<float>::infinity() && (!radius.given || d <= element(radius.view, j));
    static_cast<float*>(distance.data)[b] = d;
    static_cast<int64_t*>(index.data)[b] = covers ? j : -1;
  }
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
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const int64_t k = indices.shape[1];
  const Found found(in, false, highest, k, isa);
  constexpr float none = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < in.queries.shape[0] * k; ++i) {
    const float score = float(found.values[size_t(i)]);
    const bool beats = score > none && (!threshold.given || score > element(threshold.view, i / k));
    static_cast<float*>(scores.data)[i] = beats ? score : none;
    static_cast<int64_t*>(indices.data)[i] = beats ? found.indices[size_t(i)] : -1;
  }
}

// Codes as tensors: data (blocks, 64 * steps) uint8; step, error, norm and rest (N,) float32. All contiguous.
struct CodeTensors {
  CodeTensors(const py::tuple& tensors, int64_t n, int64_t d, const TensorView& first, bool use_dlpack)
      : data(dlpack::view_of("codes", tensors[0], use_dlpack)),
        step("step", tensors[1], DType::f32, "float32", n, first, use_dlpack),
        error("error", tensors[2], DType::f32, "float32", n, first, use_dlpack),
        norm("norm", tensors[3], DType::f32, "float32", n, first, use_dlpack),
        rest("rest", tensors[4], DType::f32, "float32", n, first, use_dlpack) {
    require_dtype(data.dtype == DType::u8, "codes", data, "uint8");
    const int64_t blocks = (n + cpu::block_keys - 1) / cpu::block_keys, row = 64 * cpu::code_steps(d);
    require(d <= 65536, "codes: at most 65536 dimensions expected, got " + std::to_string(d));
    require(data.n_dims == 2 && data.shape[0] >= blocks && data.shape[1] == row &&
                (data.stride[0] == row || data.shape[0] <= 1) && (data.stride[1] == 1 || row <= 1),
            "codes: contiguous blocks (" + std::to_string(blocks) + ", " + std::to_string(row) + ") expected, got " +
                shape_text(data));
    require_same_device("codes", data, first);
    for (const OptionalVector* v : {&step, &error, &norm, &rest})
      require(!v->given || n <= 1 || v->view.stride[0] == 1, "step, error, norm, rest: must be contiguous");
    require(step.given && error.given && norm.given, "step, error, norm: must be given");
  }
  cpu::Codes get() const {
    return {static_cast<const uint8_t*>(data.data), floats(step), floats(error), floats(norm), floats(rest)};
  }
  static float* floats(const OptionalVector& v) { return v.given ? static_cast<float*>(v.view.data) : nullptr; }

  TensorView data;
  OptionalVector step, error, norm, rest;
};

void require_cpu(const char* name, const TensorView& view) {
  require(view.device == DeviceKind::cpu, std::string(name) + ": a CPU tensor expected");
}

void search_keys(py::handle queries_object, py::handle keys_object, py::handle values_object,
                 py::handle indices_object, bool nearest, bool highest, int64_t offset, py::handle alive_object,
                 py::handle scale_object, const py::object& codes_objects, py::handle scan_queries_object,
                 py::handle rest_object, const py::object& isa_name, bool use_dlpack) {
  const Inputs in(queries_object, keys_object, alive_object, scale_object, use_dlpack);
  require_cpu("queries", in.queries);
  const TensorView values = output("values", values_object, DType::f64, "float64", in.queries, use_dlpack);
  const TensorView indices = output("indices", indices_object, DType::i64, "int64", in.queries, use_dlpack);
  require(values.n_dims == 2 && indices.n_dims == 2 && values.shape[1] == indices.shape[1] && values.shape[1] >= 1,
          "values, indices: shape (B, k) expected, got " + shape_text(values) + " and " + shape_text(indices));
  cpu::SearchArguments arguments;
  arguments.queries = in.queries;
  arguments.keys = in.keys;
  arguments.alive = in.alive.get();
  arguments.scale = in.scale.get();
  arguments.nearest = nearest;
  arguments.highest = highest;
  arguments.k = values.shape[1];
  arguments.offset = offset;
  TensorView scan_queries;
  const OptionalVector rest("rest", rest_object, DType::f32, "float32", in.queries.shape[0], in.queries, use_dlpack);
  if (!scan_queries_object.is_none()) {
    scan_queries = dlpack::view_of("scan_queries", scan_queries_object, use_dlpack);
    require_dtype(scan_queries.dtype == DType::f32, "scan_queries", scan_queries, "float32");
    require_unit_stride("scan_queries", scan_queries);
    require_shape("scan_queries", scan_queries, in.queries.shape[0], scan_queries.shape[1]);
    require(scan_queries.shape[0] <= 1 || scan_queries.stride[0] == scan_queries.shape[1],
            "scan_queries: must be contiguous");
    require_cpu("scan_queries", scan_queries);
    require(rest.given && !codes_objects.is_none(), "scan_queries: needs rest and codes");
    arguments.scan_queries = &scan_queries;
    arguments.rest = rest.get();
  }
  cpu::Codes codes;
  if (!codes_objects.is_none()) {
    const int64_t d = arguments.scan_queries ? scan_queries.shape[1] : in.keys.shape[1];
    const CodeTensors tensors(codes_objects.cast<py::tuple>(), in.keys.shape[0], d, in.queries, use_dlpack);
    require(tensors.rest.given == rest.given, "rest: of keys and queries go together");
    codes = tensors.get();
    arguments.codes = &codes;
  }
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::SearchPlan plan = cpu::plan_search(arguments, isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  cpu::search(plan, arguments, static_cast<double*>(values.data), static_cast<int64_t*>(indices.data), scratch.get());
}

void encode_keys(py::handle x_object, const py::tuple& codes_objects, int64_t first, const py::object& isa_name,
                 bool use_dlpack) {
  const TensorView x = dlpack::view_of("x", x_object, use_dlpack);
  require_dtype(x.dtype == DType::f32, "x", x, "float32");
  require_unit_stride("x", x);
  require_cpu("x", x);
  require(first >= 0, "first: must not be negative");
  const CodeTensors codes(codes_objects, first + x.shape[0], x.shape[1], x, use_dlpack);
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  cpu::encode(x, first, isa, max_threads(), static_cast<uint8_t*>(codes.data.data), codes.floats(codes.step),
              codes.floats(codes.error), codes.floats(codes.norm));
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
  m.def("search_keys", &search_keys,
        "Improve the best k values (scores, or minus squared distances) and indices of every query by these keys.",
        py::arg("queries"), py::arg("keys"), py::arg("values"), py::arg("indices"), py::kw_only(), py::arg("nearest"),
        py::arg("highest") = false, py::arg("offset") = 0, py::arg("alive").none(true) = py::none(),
        py::arg("scale").none(true) = py::none(), py::arg("codes") = py::none(),
        py::arg("scan_queries").none(true) = py::none(), py::arg("rest").none(true) = py::none(),
        py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("encode_keys", &encode_keys, "Codes of float32 rows: (data, step, error, norm, None) is written.",
        py::arg("x"), py::arg("codes"), py::arg("first") = 0, py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
