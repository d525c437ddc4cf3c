// The CPU instruction sets that kernels are written for, worst first: a machine with one has those before it.
#pragma once

#include <cstdint>

namespace fastedit {

// Below this many multiply-adds a team of threads costs more to start than it saves.
constexpr int64_t small_work = int64_t(1) << 18;

enum class Isa { scalar, avx2, avx512, avx512_bf16 };

inline const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "?";
}

// What this machine can run. The operating system's part (saved registers) is included in the builtin's answer.
inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::scalar;
}

}  // namespace fastedit
