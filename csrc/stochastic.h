// Stochastic rounding as low_rank.h defines it.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

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
