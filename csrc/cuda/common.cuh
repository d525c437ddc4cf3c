// What the CUDA kernels share: devices, asynchronous copies, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastedit::cuda {

// Launches go to the current device: makes the tensors' device current, and restores the caller's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return int(status_); }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

inline bool aligned_rows(const void* data, int64_t stride_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride_bytes % 16 == 0);
}

// 16 bytes from global to shared memory, the last 16 - n of them zero; n = 0 reads nothing. Asynchronous on sm_80 and
// later: complete after copies_commit, copies_wait and a barrier.
__device__ __forceinline__ void copy_16(void* shared, const void* global, int n) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(n) : "memory");
#else
  unsigned char bytes[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) bytes[i] = i < n ? static_cast<const unsigned char*>(global)[i] : 0;
  *static_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(bytes);
#endif
}

__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most Pending of the committed groups are on their way.
template <int Pending>
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ double to_float(double v) { return v; }

// Rounded to nearest even.
template <class T, class Real>
__device__ __forceinline__ T from_float(Real v);
template <>
__device__ __forceinline__ float from_float<float, float>(float v) { return v; }
template <>
__device__ __forceinline__ double from_float<double, double>(double v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16, float>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half from_float<__half, float>(float v) { return __float2half_rn(v); }

}  // namespace fastedit::cuda
