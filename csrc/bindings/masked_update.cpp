// fastedit._C.masked_sgd, masked_adam and philox_bits.
#include "common.h"

#include <cmath>
#include <string>
#include <type_traits>

#include "../masked_update.h"

namespace fastedit {
namespace {

// The arguments that both steps share, checked.
struct Arguments {
  TensorView param, grad, mask, clamp_to;
  bool has_clamp;
  Mask selected;

  const TensorView* bound() const { return has_clamp ? &clamp_to : nullptr; }
};

bool is_float(DType dtype) { return is_half_or_float(dtype) || dtype == DType::f64; }

template <class Index>
void require_indices(const TensorView& indices, int64_t numel) {
  const auto* index = static_cast<const Index*>(indices.data);
  int64_t before = -1;
  for (int64_t i = 0; i < indices.numel(); before = index[i++])
    require(before < index[i] && index[i] < numel, "mask: indices must be sorted, distinct and below " + std::to_string(numel));
}

// `philox` is empty, or seed, shard, layer and threshold. Of entries from `start` on.
Mask mask_of(const TensorView* view, const py::sequence& philox, int64_t start, int64_t numel) {
  require(start >= 0, "start: must not be negative");
  Mask mask;
  mask.start = start;
  if (view) {
    require(view->n_dims == 1 && (view->numel() <= 1 || view->stride[0] == 1), "mask: must be contiguous, of 1 dimension");
    mask.data = view->data;
    mask.size = view->numel();
    if (view->dtype == DType::u8) {
      mask.kind = Mask::Kind::bits;
      require(mask.size >= (start + numel + 7) / 8, "mask: too few bytes for " + std::to_string(start + numel) + " entries");
    } else {
      mask.kind = Mask::Kind::indices;
      require(start == 0, "start: 0 expected with indices");
      mask.wide = view->dtype == DType::i64;
      require_dtype(mask.wide || view->dtype == DType::i32, "mask", *view, "uint8, int32 or int64");
      if (view->device == DeviceKind::cpu) mask.wide ? require_indices<int64_t>(*view, numel) : require_indices<int32_t>(*view, numel);
    }
  } else if (py::len(philox) > 0) {
    require(py::len(philox) == 4, "philox: seed, shard, layer and threshold expected");
    mask.kind = Mask::Kind::philox;
    mask.seed = uint64_t(philox[0].cast<int64_t>());
    mask.shard = philox[1].cast<uint32_t>();
    mask.layer = philox[2].cast<uint32_t>();
    mask.threshold = philox[3].cast<uint32_t>();
  }
  return mask;
}

Arguments take_arguments(py::handle param, py::handle grad, py::handle mask, const py::sequence& philox, int64_t start,
                         py::handle clamp_to, bool use_dlpack) {
  Arguments a;
  a.param = dlpack::view_of("param", param, use_dlpack);
  a.grad = dlpack::view_of("grad", grad, use_dlpack);
  a.has_clamp = !clamp_to.is_none();
  require_dtype(is_half_or_float(a.param.dtype), "param", a.param, "float32, bfloat16 or float16");
  require(a.param.n_dims == 2, "param: 2 dimensions expected, got shape " + shape_text(a.param));
  const int64_t rows = a.param.shape[0], columns = a.param.shape[1];
  require_shape("grad", a.grad, rows, columns);
  require_dtype(is_float(a.grad.dtype), "grad", a.grad, "float64, float32, bfloat16 or float16");
  require_same_device("grad", a.grad, a.param);
  if (a.has_clamp) {
    a.clamp_to = dlpack::view_of("clamp_to", clamp_to, use_dlpack);
    require_shape("clamp_to", a.clamp_to, rows, columns);
    require_dtype(is_float(a.clamp_to.dtype), "clamp_to", a.clamp_to, "float64, float32, bfloat16 or float16");
    require_same_device("clamp_to", a.clamp_to, a.param);
  }
  if (!mask.is_none()) {
    a.mask = dlpack::view_of("mask", mask, use_dlpack);
    require_same_device("mask", a.mask, a.param);
  }
  a.selected = mask_of(mask.is_none() ? nullptr : &a.mask, philox, start, a.param.numel());
  return a;
}

DecayScope scope_of(const std::string& name) {
  if (name == "all") return DecayScope::all;
  if (name == "masked") return DecayScope::masked;
  require(name == "none", "decay_scope: all, masked or none expected, got " + name);
  return DecayScope::none;
}

void require_served(const Arguments& a, DecayScope scope) {
  require(a.selected.kind != Mask::Kind::indices || (scope != DecayScope::all && !a.has_clamp),
          "mask: indices serve only steps that leave all other entries alone");
}

template <class Step>
void run(const Arguments& a, const Step& step, const AdamState* state, const py::object& isa_name, py::handle param,
         bool use_dlpack) {
  constexpr bool adam = std::is_same_v<Step, AdamStep>;
  if (a.param.device == DeviceKind::cuda) {
    require(a.selected.start == 0, "start: 0 expected on a GPU");
    void* stream = stream_for(param, a.param.device_index, use_dlpack);
#if defined(FASTEDIT_WITH_CUDA)
    int status;
    {
      py::gil_scoped_release release;
      if constexpr (adam)
        status = cuda::masked_adam(a.param, a.grad, a.selected, *state, step, a.bound(), stream);
      else
        status = cuda::masked_sgd(a.param, a.grad, a.selected, step, a.bound(), stream);
    }
    check_status(adam ? "masked_adam" : "masked_sgd", status);
#else
    (void)stream;
#endif
    return;
  }
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  const cpu::MaskedPlan plan = cpu::plan_masked_update(a.param, a.grad, a.bound(), isa, max_threads());
  const Scratch scratch(plan.workspace_bytes);
  if constexpr (adam)
    cpu::masked_adam(plan, a.param, a.grad, a.selected, *state, step, a.bound(), scratch.get());
  else
    cpu::masked_sgd(plan, a.param, a.grad, a.selected, step, a.bound(), scratch.get());
}

void masked_sgd(py::handle param, py::handle grad, py::handle mask, const py::sequence& philox, double lr, double decay,
                const std::string& decay_scope, py::handle clamp_to, double clamp, int64_t start, const py::object& isa,
                bool use_dlpack) {
  const Arguments a = take_arguments(param, grad, mask, philox, start, clamp_to, use_dlpack);
  SgdStep step{float(lr), float(decay), scope_of(decay_scope), float(clamp)};
  if (decay == 0) step.scope = DecayScope::none;
  require_served(a, step.scope);
  run(a, step, nullptr, isa, param, use_dlpack);
}

float* moments_of(const char* name, py::handle object, const Arguments& a, bool use_dlpack) {
  const TensorView view = dlpack::view_of(name, object, use_dlpack);
  require_dtype(view.dtype == DType::f32, name, view, "float32");
  require(view.n_dims == 1 && (view.numel() <= 1 || view.stride[0] == 1), std::string(name) + ": must be contiguous, of 1 dimension");
  const int64_t least = a.selected.kind == Mask::Kind::all ? a.selected.start + a.param.numel() : a.selected.kind == Mask::Kind::indices ? a.selected.size : 0;
  require(view.numel() >= least, std::string(name) + ": too few entries");
  require_same_device(name, view, a.param);
  return static_cast<float*>(view.data);
}

// Counted when the moments were made.
const int64_t* offsets_of(py::handle object, const Arguments& a, int64_t n, bool use_dlpack) {
  if (a.selected.kind == Mask::Kind::all || a.selected.kind == Mask::Kind::indices) return nullptr;
  require(!object.is_none(), "offsets: expected with this mask");
  const TensorView view = dlpack::view_of("offsets", object, use_dlpack);
  require_dtype(view.dtype == DType::i64, "offsets", view, "int64");
  const int64_t blocks = (n + mask_block - 1) / mask_block;
  require(view.n_dims == 1 && view.shape[0] >= blocks && (blocks <= 1 || view.stride[0] == 1),
          "offsets: shape (" + std::to_string(blocks) + ",) expected, got " + shape_text(view));
  require_same_device("offsets", view, a.param);
  return static_cast<const int64_t*>(view.data);
}

void masked_adam(py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq, py::handle offsets,
                 py::handle mask, const py::sequence& philox, const AdamStep& step, py::handle clamp_to, int64_t start,
                 const py::object& n, const py::object& isa, bool use_dlpack) {
  const Arguments a = take_arguments(param, grad, mask, philox, start, clamp_to, use_dlpack);
  require_served(a, step.scope);
  const int64_t end = start + a.param.numel(), total = n.is_none() ? end : n.cast<int64_t>();
  require(end <= total, "n: the matrix ends beyond it");
  const AdamState state{moments_of("exp_avg", exp_avg, a, use_dlpack),
                        moments_of("exp_avg_sq", exp_avg_sq, a, use_dlpack), offsets_of(offsets, a, total, use_dlpack)};
  if (state.offsets && a.param.device == DeviceKind::cpu) {
    for (const auto& [name, moments] : {std::pair{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}) {
      const int64_t count = dlpack::view_of(name, moments, use_dlpack).numel();
      require(cpu::fits(a.selected, state.offsets, total, count, best_isa()),
              std::string(name) + ": as many moments expected as offsets and mask select");
    }
  }
  run(a, step, &state, isa, param, use_dlpack);
}

void philox_bits(py::handle bits_object, int64_t start, const py::sequence& philox, const py::object& isa_name,
                 bool use_dlpack) {
  const TensorView bits = dlpack::view_of("bits", bits_object, use_dlpack);
  require_dtype(bits.dtype == DType::u8, "bits", bits, "uint8");
  require(bits.n_dims == 1 && (bits.numel() <= 1 || bits.stride[0] == 1), "bits: must be contiguous, of 1 dimension");
  require(start >= 0 && start % 8 == 0, "start: a multiple of 8 expected, got " + std::to_string(start));
  const Mask mask = mask_of(nullptr, philox, 0, 0);
  require(mask.kind == Mask::Kind::philox, "philox: seed, shard, layer and threshold expected");
  if (bits.numel() == 0) return;
  if (bits.device == DeviceKind::cuda) {
    void* stream = stream_for(bits_object, bits.device_index, use_dlpack);
#if defined(FASTEDIT_WITH_CUDA)
    check_status("philox_bits", cuda::philox_bits(bits, mask, start, stream));
#else
    (void)stream;
#endif
    return;
  }
  const Isa isa = isa_of(isa_name, best_isa());
  py::gil_scoped_release release;
  cpu::philox_bits(bits, mask, start, isa, max_threads());
}

}  // namespace

void bind_masked_update(py::module_& m) {
  py::class_<AdamStep>(m, "AdamStep", "The numbers of one step of Adam, bias corrections included.")
      .def(py::init([](double lr, double beta1, double beta2, double eps, int64_t step, double weight_decay,
                       bool decoupled, const std::string& decay_scope, double clamp) {
             AdamStep s;
             s.first_rate = float(1 - beta1);
             s.second = float(beta2);
             s.second_rate = float(1 - beta2);
             s.rate = float(lr / (1 - std::pow(beta1, double(step))));
             s.correction = float(1 / std::sqrt(1 - std::pow(beta2, double(step))));
             s.eps = float(eps);
             s.clamp = float(clamp);
             if (weight_decay != 0 && decoupled) {
               s.weight_decay = float(lr * weight_decay);
               s.scope = scope_of(decay_scope);
             } else if (decay_scope != "none") {
               s.gradient_decay = float(weight_decay);
             }
             return s;
           }),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("weight_decay"),
           py::arg("decoupled"), py::arg("decay_scope"), py::arg("clamp"));
  m.def("masked_sgd", &masked_sgd, "param -= lr (mask∘grad + decay param) in place, then clamped.", py::arg("param"),
        py::arg("grad"), py::arg("mask").none(true), py::arg("philox"), py::arg("lr"), py::arg("decay") = 0.0,
        py::arg("decay_scope") = "all", py::arg("clamp_to").none(true) = py::none(), py::arg("clamp") = 0.0,
        py::kw_only(), py::arg("start") = 0, py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
  m.def("masked_adam", &masked_adam, "One step of Adam on the selected entries, in place.", py::arg("param"),
        py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("offsets").none(true),
        py::arg("mask").none(true), py::arg("philox"), py::arg("step"), py::arg("clamp_to").none(true) = py::none(),
        py::kw_only(), py::arg("start") = 0, py::arg("n") = py::none(), py::arg("isa") = py::none(),
        py::arg("use_dlpack") = true);
  m.def("philox_bits", &philox_bits, "Writes the bits of a Philox mask from entry `start` on.", py::arg("bits"),
        py::arg("start"), py::arg("philox"), py::kw_only(), py::arg("isa") = py::none(), py::arg("use_dlpack") = true);
}

}  // namespace fastedit
