// Stochastic rounding as low_rank.h defines it, written once for the CPU and for CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTEDIT_FUNCTION __host__ __device__ __forceinline__
#else
#define FASTEDIT_FUNCTION inline __attribute__((always_inline))
#endif

namespace fastedit {

FASTEDIT_FUNCTION float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FASTEDIT_FUNCTION uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

constexpr uint32_t philox_key0_step = 0x9E3779B9u, philox_key1_step = 0xBB67AE85u;

// One of the ten rounds of Philox4x32 (Salmon et al. 2011); the key grows by its step after each.
FASTEDIT_FUNCTION void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0,
                                    uint32_t key1) {
  const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
  c0 = uint32_t(b >> 32) ^ c1 ^ key0;
  c2 = uint32_t(a >> 32) ^ c3 ^ key1;
  c1 = uint32_t(b);
  c3 = uint32_t(a);
}

// A value next to the given one that the storage type holds exactly.
FASTEDIT_FUNCTION float stochastic_bf16(float value, uint32_t word) {
  const uint32_t u = bits_of(value);
  return (u & 0x7F800000u) == 0x7F800000u ? value : float_from_bits((u + (word & 0xFFFFu)) & 0xFFFF0000u);
}

FASTEDIT_FUNCTION float stochastic_f16(float value, uint32_t word) {
  const uint32_t u = bits_of(value), sign = u & 0x80000000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude >= 0x7F800000u) return value;
  if (magnitude >= 0x38800000u) return float_from_bits((u + (word & 0x1FFFu)) & 0xFFFFE000u);
  const float units = float_from_bits(magnitude) * 16777216.0f, whole = float(int(units));
  const bool up = (units - whole) * 8192.0f >= float(8192 - int(word & 0x1FFFu));  // exact on both sides
  return float_from_bits(sign | bits_of((whole + (up ? 1.0f : 0.0f)) * 5.9604644775390625e-8f));
}

}  // namespace fastedit
