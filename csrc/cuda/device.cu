// Devices, errors and scratch memory: what the bindings need of CUDA besides the kernels.
#include "../device.h"

#include <mutex>

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

namespace {

constexpr int max_devices = 64;
constexpr uint64_t kept_bytes = uint64_t(256) << 20;  // a workspace at its largest: mapping it takes longer than most kernels

// Our own pool of a device, made at its first use: the default one gives all memory back at every synchronization.
cudaError_t pool_of(int device, cudaMemPool_t* out) {
  static std::mutex mutex;
  static cudaMemPool_t pools[max_devices] = {};
  if (device < 0 || device >= max_devices) return cudaDeviceGetDefaultMemPool(out, device);
  const std::lock_guard<std::mutex> lock(mutex);
  if (pools[device] == nullptr) {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaMemPool_t pool = nullptr;
    cudaError_t status = cudaMemPoolCreate(&pool, &properties);
    uint64_t threshold = kept_bytes;
    if (status == cudaSuccess) status = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold);
    if (status != cudaSuccess) return status;
    pools[device] = pool;
  }
  *out = pools[device];
  return cudaSuccess;
}

}  // namespace

int allocate(void** out, size_t bytes, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  cudaMemPool_t pool;
  const cudaError_t status = pool_of(device, &pool);
  if (status != cudaSuccess) return int(status);
  return int(cudaMallocFromPoolAsync(out, bytes, pool, static_cast<cudaStream_t>(stream)));
}

int release(void* memory, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != 0) return guard.status();
  return int(cudaFreeAsync(memory, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastedit::cuda
