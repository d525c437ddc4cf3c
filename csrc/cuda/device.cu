// Devices, errors and scratch memory: what the bindings need of CUDA besides the kernels.
#include "../device.h"

#include "common.cuh"

namespace fastedit::cuda {

Availability availability() {
  // Without a driver, counting devices fails with "driver version is insufficient", which misleads: look first.
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return {false, "no NVIDIA driver on this machine"};
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // the error is reported here; leave none behind
    return {false, error_text(int(status))};
  }
  return count > 0 ? Availability{true, ""} : Availability{false, "no CUDA device"};
}

std::string error_text(int status) {
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver on this machine";
  }
  if (error == cudaErrorNoKernelImageForDevice)
    return "this GPU's architecture is not among those built (set FASTEDIT_CUDA_ARCHS and install again)";
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

int allocate(void** out, size_t bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return int(cudaMallocAsync(out, bytes, static_cast<cudaStream_t>(stream)));
}

int release(void* memory, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return int(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastedit::cuda
