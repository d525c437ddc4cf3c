// Philox4x32-10 (Salmon et al. 2011), the random words that every backend shares: see fastedit/ops/philox.py.
#pragma once

#include <cstdint>

#include "function.h"

namespace fastedit {

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

struct PhiloxWords {
  uint32_t word[4];
};

// The four words of a counter under a 64-bit key: element i of a tensor has word i % 4 of counter i / 4. `third` and
// `fourth`, the high half of the 128-bit counter, tell tensors under one key apart.
FASTEDIT_FUNCTION PhiloxWords philox(uint64_t counter, uint64_t seed, uint32_t third = 0, uint32_t fourth = 0) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = third, c3 = fourth;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    philox_round(c0, c1, c2, c3, key0, key1);
    key0 += philox_key0_step;
    key1 += philox_key1_step;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastedit
