// A tensor as the kernels see it: memory, element type, shape and strides. Owns nothing, knows no framework.
#pragma once

#include <cstdint>

namespace fastedit {

enum class DType { f16, bf16, f32, f64, boolean, i8, u8, i32, i64 };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::boolean: return "bool";
    case DType::i8: return "int8";
    case DType::u8: return "uint8";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
  }
  return "?";
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f64:
    case DType::i64: return 8;
    case DType::boolean:
    case DType::i8:
    case DType::u8: return 1;
  }
  return 0;
}

enum class DeviceKind { cpu, cuda };

struct TensorView {
  static constexpr int max_dims = 2;
  void* data = nullptr;
  DType dtype = DType::f32;
  DeviceKind device = DeviceKind::cpu;
  int device_index = 0;
  int n_dims = 0;
  int64_t shape[max_dims] = {1, 1};
  int64_t stride[max_dims] = {0, 0};  // in elements

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < n_dims; ++i) n *= shape[i];
    return n;
  }
};

}  // namespace fastedit
