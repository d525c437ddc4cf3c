// Views of Python tensors without their framework's ABI.
//
// Fast: the type's DLPack C exchange table (torch 2.10 and later), which fills a non-owning DLTensor in some 50 ns and
// knows the current stream. Otherwise: the tensor's Python attributes, about 2 us. Both refuse what kernels must never
// see: data that do not exist (fake and meta tensors), devices and element types that no kernel handles.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "tensor_view.h"

namespace fastedit::dlpack {

namespace py = pybind11;

// The stable part of dlpack.h 1.2 (DLPackExchangeAPI), in its layout.
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  void *prev, *allocate, *to_managed, *from_managed;
  int (*view)(void* object, DLTensor* out);
  int (*current_stream)(int device_type, int32_t device_id, void** out);
};
constexpr int device_cpu = 1, device_cuda = 2;

// The table of the object's type, or null. Remembers the last type seen: torch.Tensor, nearly always.
inline const ExchangeApi* api_of(PyObject* object) {
  static PyTypeObject* type = nullptr;
  static const ExchangeApi* api = nullptr;
  if (Py_TYPE(object) == type) return api;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!found || found->major != 1 || !found->view) {
    PyErr_Clear();
    return nullptr;
  }
  Py_INCREF(Py_TYPE(object));  // keeps the address from being used by another type
  type = Py_TYPE(object);
  return api = found;
}

[[noreturn]] inline void bad_type(const char* name, const std::string& what) {
  throw py::type_error(std::string(name) + ": " + what);
}

inline void check_dims(const char* name, int64_t ndim) {
  if (ndim > TensorView::max_dims)
    throw py::value_error(std::string(name) + ": at most 2 dimensions expected, got " + std::to_string(ndim));
}

inline void check_data(const char* name, const TensorView& view) {
  if (view.data == nullptr && view.numel() > 0)
    throw py::value_error(std::string(name) + ": has no data (a fake tensor?)");
}

inline DType dtype_of(const char* name, DLDataType type) {
  if (type.lanes == 1) {
    if (type.code == 2 && type.bits == 16) return DType::f16;
    if (type.code == 2 && type.bits == 32) return DType::f32;
    if (type.code == 2 && type.bits == 64) return DType::f64;
    if (type.code == 4 && type.bits == 16) return DType::bf16;
    if (type.code == 6 && type.bits == 8) return DType::boolean;
    if (type.code == 0 && type.bits == 8) return DType::i8;
    if (type.code == 1 && type.bits == 8) return DType::u8;
    if (type.code == 0 && type.bits == 32) return DType::i32;
    if (type.code == 0 && type.bits == 64) return DType::i64;
  }
  bad_type(name, "float16, bfloat16, float32, float64, bool, (u)int8, int32 or int64 expected, got DLPack type code " +
                     std::to_string(type.code) + " with " + std::to_string(type.bits) + " bits");
}

inline TensorView view_by_api(const char* name, const ExchangeApi* api, PyObject* object) {
  DLTensor t;
  if (api->view(object, &t) != 0) throw py::error_already_set();
  check_dims(name, t.ndim);
  TensorView view;
  if (t.device.type != device_cpu && t.device.type != device_cuda)
    bad_type(name, "a CPU or CUDA tensor expected, got DLPack device " + std::to_string(t.device.type));
  view.device = t.device.type == device_cpu ? DeviceKind::cpu : DeviceKind::cuda;
  view.device_index = t.device.id;
  view.dtype = dtype_of(name, t.dtype);
  view.n_dims = t.ndim;
  int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides ? t.strides[i] : contiguous;
    contiguous *= t.shape[i];
  }
  view.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  check_data(name, view);
  return view;
}

inline DType dtype_by_name(const char* name, const std::string& text) {
  if (text == "torch.float16") return DType::f16;
  if (text == "torch.bfloat16") return DType::bf16;
  if (text == "torch.float32") return DType::f32;
  if (text == "torch.float64") return DType::f64;
  if (text == "torch.bool") return DType::boolean;
  if (text == "torch.int8") return DType::i8;
  if (text == "torch.uint8") return DType::u8;
  if (text == "torch.int32") return DType::i32;
  if (text == "torch.int64") return DType::i64;
  bad_type(name, "float16, bfloat16, float32, float64, bool, (u)int8, int32 or int64 expected, got " + text);
}

inline TensorView view_by_attributes(const char* name, py::handle object) {
  if (!py::hasattr(object, "data_ptr") || !py::hasattr(object, "stride"))
    bad_type(name, "a tensor expected, got " + py::str(py::type::of(object)).cast<std::string>());
  const py::object device = object.attr("device");
  const auto kind = device.attr("type").cast<std::string>();
  if (kind != "cpu" && kind != "cuda") bad_type(name, "a CPU or CUDA tensor expected, got one on " + kind);
  TensorView view;
  view.device = kind == "cpu" ? DeviceKind::cpu : DeviceKind::cuda;
  view.device_index = kind == "cpu" || device.attr("index").is_none() ? 0 : device.attr("index").cast<int>();
  view.dtype = dtype_by_name(name, py::str(object.attr("dtype")).cast<std::string>());
  const py::tuple shape = object.attr("shape"), stride = object.attr("stride")();
  check_dims(name, int64_t(shape.size()));
  view.n_dims = int(shape.size());
  for (int i = 0; i < view.n_dims; ++i) {
    view.shape[i] = shape[i].cast<int64_t>();
    view.stride[i] = stride[i].cast<int64_t>();
  }
  view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
  check_data(name, view);
  return view;
}

// The view of a tensor; `name` is what errors call it. Raises TypeError or ValueError.
inline TensorView view_of(const char* name, py::handle object, bool allow_api = true) {
  const ExchangeApi* api = allow_api ? api_of(object.ptr()) : nullptr;
  if (!api) return view_by_attributes(name, object);
  // Asked of a meta tensor, the table answers with a C++ backtrace: look first.
  if (py::hasattr(object, "is_meta") && object.attr("is_meta").cast<bool>())
    bad_type(name, "a CPU or CUDA tensor expected, got one on meta");
  return view_by_api(name, api, object.ptr());
}

// The stream that torch would launch on now.
inline void* current_stream(py::handle object, int device_index, bool allow_api = true) {
  const ExchangeApi* api = allow_api ? api_of(object.ptr()) : nullptr;
  if (api && api->current_stream) {
    void* stream = nullptr;
    if (api->current_stream(device_cuda, device_index, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  const py::object cuda = py::module_::import("torch").attr("cuda");
  return reinterpret_cast<void*>(cuda.attr("current_stream")(device_index).attr("cuda_stream").cast<uintptr_t>());
}

}  // namespace fastedit::dlpack
