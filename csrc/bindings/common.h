// What the bindings of all operations share: threads, scratch memory, argument checks, streams.
//
// The operations are called by fastedit.ops, which has checked shapes and values with better words; the checks here are
// those that keep kernels inside memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../device.h"
#include "../dlpack_exchange.h"
#include "../isa.h"
#include "../tensor_view.h"

#if !defined(FASTEDIT_NO_CUDA_REASON)
#define FASTEDIT_NO_CUDA_REASON "no nvcc at build time"
#endif

namespace fastedit {

namespace py = pybind11;

inline int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// --- Scratch memory of the CPU kernels -----------------------------------------------------------------------------

constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t kept_bytes = size_t(64) << 20;  // a thread keeps a buffer up to this size for its next call

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<void, FreeDeleter>;

inline Buffer allocate_buffer(size_t bytes) {
  const size_t alignment = bytes >= huge_page ? huge_page : 4096;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  Buffer buffer(std::aligned_alloc(alignment, bytes));
  if (!buffer) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= huge_page) madvise(buffer.get(), bytes, MADV_HUGEPAGE);  // fewer page faults and misses; may be refused
#endif
  return buffer;
}

// Scratch memory for one call, from the calling thread's kept buffer if that is large enough.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    static thread_local Buffer kept;
    static thread_local size_t kept_size = 0;
    if (bytes > kept_bytes) {
      own_ = allocate_buffer(bytes);
      memory_ = own_.get();
      return;
    }
    if (bytes > kept_size) {
      kept.reset();
      kept_size = 0;
      kept = allocate_buffer(bytes);
      kept_size = bytes;
    }
    memory_ = kept.get();
  }
  void* get() const { return memory_; }

 private:
  Buffer own_;
  void* memory_ = nullptr;
};

// --- Checks --------------------------------------------------------------------------------------------------------

inline std::string shape_text(const TensorView& view) {
  std::string text = "(";
  for (int i = 0; i < view.n_dims; ++i) text += std::to_string(view.shape[i]) + (i + 1 < view.n_dims ? ", " : "");
  return text + (view.n_dims == 1 ? ",)" : ")");
}

inline void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

inline void require_dtype(bool condition, const char* name, const TensorView& view, const char* expected) {
  if (!condition) throw py::type_error(std::string(name) + ": " + expected + " expected, got " + name_of(view.dtype));
}

inline void require_shape(const char* name, const TensorView& view, int64_t rows, int64_t columns) {
  require(view.n_dims == 2 && view.shape[0] == rows && view.shape[1] == columns,
          std::string(name) + ": shape (" + std::to_string(rows) + ", " + std::to_string(columns) + ") expected, got " +
              shape_text(view));
}

// Rows of adjacent elements. A row of one element has no stride to speak of.
inline void require_unit_stride(const char* name, const TensorView& view) {
  require(view.n_dims == 2, std::string(name) + ": 2 dimensions expected, got shape " + shape_text(view));
  require(view.shape[1] <= 1 || view.stride[1] == 1 || view.numel() == 0,
          std::string(name) + ": last dimension must be contiguous, its stride is " + std::to_string(view.stride[1]));
}

inline void require_separate_rows(const char* name, const TensorView& view) {
  require(view.shape[0] <= 1 || view.stride[0] >= view.shape[1] || view.numel() == 0,
          std::string(name) + ": rows overlap in memory");
}

inline void require_same_device(const char* name, const TensorView& view, const TensorView& first) {
  require(view.device == first.device && view.device_index == first.device_index,
          std::string(name) + ": not on the same device as the first tensor");
}

inline bool is_half_or_float(DType dtype) { return dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32; }

inline Isa isa_of(const py::object& name, Isa preferred) {
  if (name.is_none()) return preferred;
  const Isa best = best_isa();
  const auto text = name.cast<std::string>();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (text == name_of(isa)) {
      require(isa <= best, "isa: this CPU has " + std::string(name_of(best)) + ", not " + text);
      return isa;
    }
  throw py::value_error("isa: scalar, avx2, avx512 or avx512_bf16 expected, got " + text);
}

// --- CUDA ----------------------------------------------------------------------------------------------------------

#if defined(FASTEDIT_WITH_CUDA)
inline void check_status(const char* operation, int status) {
  if (status != 0) throw std::runtime_error(std::string(operation) + ": " + cuda::error_text(status));
}

// Stream-ordered scratch memory on a device, given back when the call is over. Created without the GIL held.
class DeviceScratch {
 public:
  DeviceScratch(const char* operation, size_t bytes, int device, void* stream)
      : operation_(operation), device_(device), stream_(stream) {
    if (bytes > 0) check_status(operation, cuda::allocate(&memory_, bytes, device, stream));
  }
  ~DeviceScratch() {
    if (memory_) cuda::release(memory_, device_, stream_);
  }
  DeviceScratch(const DeviceScratch&) = delete;
  DeviceScratch& operator=(const DeviceScratch&) = delete;
  void* get() const { return memory_; }

 private:
  const char* operation_;
  int device_;
  void* stream_;
  void* memory_ = nullptr;
};
#else
[[noreturn]] inline void no_cuda_kernels() {
  throw std::runtime_error("built without CUDA kernels (" FASTEDIT_NO_CUDA_REASON ")");
}
#endif

// Refuses before asking for a stream, which may fail with a less helpful message.
inline void* stream_for(py::handle tensor, int device_index, bool allow_api) {
#if defined(FASTEDIT_WITH_CUDA)
  return dlpack::current_stream(tensor, device_index, allow_api);
#else
  (void)tensor, (void)device_index, (void)allow_api;
  no_cuda_kernels();
#endif
}

}  // namespace fastedit
