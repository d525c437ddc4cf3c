// Functions compiled for the CPU and for CUDA from one source.
#pragma once

#if defined(__CUDACC__)
#define FASTEDIT_FUNCTION __host__ __device__ __forceinline__
#else
#define FASTEDIT_FUNCTION inline __attribute__((always_inline))
#endif
