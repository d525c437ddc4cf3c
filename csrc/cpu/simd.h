// Conversions between storage types and float, for each instruction set, and nothing else.
//
// The loops are plain code forced inline: compiled inside a function with a target attribute they use that
// target's instructions. Only float16 needs intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#include "../stochastic.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTEDIT_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FASTEDIT_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FASTEDIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#define FASTEDIT_AVX512_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")))
#endif

namespace fastedit::cpu {

FASTEDIT_INLINE float from_bf16(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

// To nearest even; NaN stays NaN. In integers, because the hardware's conversion flushes subnormals.
FASTEDIT_INLINE uint16_t to_bf16(float value) {
  const uint32_t u = bits_of(value);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTEDIT_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude >= 0x400u) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: magnitude * 2^-24 is exact in float.
  return float_from_bits(sign | bits_of(float(magnitude) * 5.9604644775390625e-8f));
}

// To nearest even.
FASTEDIT_INLINE uint16_t to_f16(float value) {
  const uint32_t u = bits_of(value), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and more: infinity
  if (magnitude >= 0x38800000u)                                   // 2^-14 and more: normal
    return uint16_t(sign | ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13));
  // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
  return uint16_t(sign | (bits_of(float_from_bits(magnitude) + 0.5f) - 0x3F000000u));
}

// Element types, with their conversions one at a time. Row conversions of float16 are below.
struct F64 {
  using Storage = double;
};
struct F32 {
  using Storage = float;
  static FASTEDIT_INLINE float load(float value) { return value; }
  static FASTEDIT_INLINE float store(float value) { return value; }
};
struct BF16 {
  using Storage = uint16_t;
  static FASTEDIT_INLINE float load(uint16_t value) { return from_bf16(value); }
  static FASTEDIT_INLINE uint16_t store(float value) { return to_bf16(value); }
};
struct F16 {
  using Storage = uint16_t;
  static FASTEDIT_INLINE float load(uint16_t value) { return from_f16(value); }
  static FASTEDIT_INLINE uint16_t store(float value) { return to_f16(value); }
};

}  // namespace fastedit::cpu
