// The bits of a mask, 64 entries a word, for a run of entries: regenerated or fetched, never kept.
#pragma once

#include <algorithm>
#include <cstring>

#include "../masked_update.h"
#include "simd.h"

namespace fastedit::cpu {

// What will be needed when the bits are there: asked for meanwhile, since random words take about as long to compute
// as the entries they decide about take to arrive.
struct Upcoming {
  static constexpr int most = 3;
  const char* data[most];
  int64_t bytes_per_word[most];  // that belong to 64 entries
  int n = 0;

  void add(const void* first, int64_t bytes) {
    data[n] = static_cast<const char*>(first);
    bytes_per_word[n++] = bytes;
  }
  FASTEDIT_INLINE void prefetch(int64_t word) const {
    for (int k = 0; k < n; ++k)
      for (int64_t line = 0; line < bytes_per_word[k]; line += 64)
        __builtin_prefetch(data[k] + word * bytes_per_word[k] + line);
  }
};

// Words of Philox bits from a counter on: bit 4 c + w of the result is word w of counter `first + c` < threshold.
using PhiloxBits = void (*)(const Mask& mask, uint64_t first, int64_t n_words, const Upcoming& upcoming, uint64_t* out);

inline void philox_bits_scalar(const Mask& mask, uint64_t first, int64_t n_words, const Upcoming& upcoming,
                               uint64_t* out) {
  for (int64_t i = 0; i < n_words; ++i) {
    upcoming.prefetch(i);
    uint64_t bits = 0;
    for (int c = 0; c < 16; ++c) {
      const PhiloxWords words = philox(first++, mask.seed, mask.shard, mask.layer);
      for (int w = 0; w < 4; ++w) bits |= uint64_t(words.word[w] < mask.threshold) << (4 * c + w);
    }
    out[i] = bits;
  }
}

#if defined(__x86_64__)

// Words live in the low halves of 64-bit lanes, where the multiplication takes its operands and leaves both halves of
// the product: nothing is moved within a register before the last round. High halves hold remains that nobody reads.
// In the first round the second product is the same for all counters. The lanes' counters are ordered so that joining
// the four words of each yields runs of elements.

FASTEDIT_AVX2 inline void philox_bits_avx2(const Mask& mask, uint64_t first, int64_t n_words, const Upcoming& upcoming,
                                           uint64_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
  const __m256i flip = _mm256_set1_epi32(INT32_MIN);  // comparisons are signed
  const __m256i limit = _mm256_xor_si256(_mm256_set1_epi32(int(mask.threshold)), flip);
  const uint64_t uniform = uint64_t(0xCD9E8D57) * mask.shard;
  const uint32_t key0 = uint32_t(mask.seed), key1 = uint32_t(mask.seed >> 32);
  for (int64_t i = 0; i < n_words; ++i) {
    upcoming.prefetch(i);
    uint64_t bits = 0;
    for (int quarter = 0; quarter < 4; ++quarter, first += 4) {
      const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), order);
      const __m256i a = _mm256_mul_epu32(counter, m0);
      __m256i c0 = _mm256_xor_si256(_mm256_srli_epi64(counter, 32), _mm256_set1_epi64x((uniform >> 32) ^ key0));
      __m256i c1 = _mm256_set1_epi64x(int64_t(uniform));
      __m256i c2 = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_set1_epi64x(mask.layer ^ key1));
      __m256i c3 = a;
      uint32_t k0 = key0, k1 = key1;
      for (int round = 1; round < 10; ++round) {
        k0 += philox_key0_step;
        k1 += philox_key1_step;
        const __m256i p = _mm256_mul_epu32(c0, m0), q = _mm256_mul_epu32(c2, m1);
        c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), c1), _mm256_set1_epi64x(k0));
        c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), c3), _mm256_set1_epi64x(k1));
        c1 = q;
        c3 = p;
      }
      const __m256i c01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
      const __m256i c23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
      const __m256i low = _mm256_xor_si256(_mm256_unpacklo_epi64(c01, c23), flip);
      const __m256i high = _mm256_xor_si256(_mm256_unpackhi_epi64(c01, c23), flip);
      const int low_bits = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, low)));
      const int high_bits = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, high)));
      bits |= uint64_t(low_bits | high_bits << 8) << (16 * quarter);
    }
    out[i] = bits;
  }
}

// The words of 8 counters compared: 32 bits in the order of elements.
FASTEDIT_AVX512 FASTEDIT_INLINE uint32_t selected_avx512(__m512i c0, __m512i c1, __m512i c2, __m512i c3, __m512i limit) {
  const __m512i c01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, _MM_PERM_CCAA);
  const __m512i c23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, _MM_PERM_CCAA);
  const uint32_t low = _mm512_cmplt_epu32_mask(_mm512_unpacklo_epi64(c01, c23), limit);
  const uint32_t high = _mm512_cmplt_epu32_mask(_mm512_unpackhi_epi64(c01, c23), limit);
  return low | high << 16;
}

FASTEDIT_AVX512 inline void philox_bits_avx512(const Mask& mask, uint64_t first, int64_t n_words, const Upcoming& upcoming,
                                               uint64_t* out) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), eight = _mm512_set1_epi64(8);
  const __m512i limit = _mm512_set1_epi32(int(mask.threshold));
  const uint64_t uniform = uint64_t(0xCD9E8D57) * mask.shard;
  uint64_t keys[10][2];  // whole lanes, so that a broadcast is part of the instruction that uses it
  for (uint32_t round = 0; round < 10; ++round) {
    keys[round][0] = uint32_t(mask.seed) + round * philox_key0_step;
    keys[round][1] = uint32_t(mask.seed >> 32) + round * philox_key1_step;
  }
  const __m512i first_c0 = _mm512_set1_epi64(int64_t((uniform >> 32) ^ keys[0][0]));
  const __m512i first_c1 = _mm512_set1_epi64(int64_t(uniform));
  const __m512i first_c2 = _mm512_set1_epi64(int64_t(mask.layer ^ keys[0][1]));
  constexpr int exclusive_or = 0x96;  // of three
  __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), order);
  for (int64_t i = 0; i < n_words; ++i) {
    upcoming.prefetch(i);
    __m512i c0[2], c1[2], c2[2], c3[2];  // two independent chains
    for (int h = 0; h < 2; ++h, counter = _mm512_add_epi64(counter, eight)) {
      c3[h] = _mm512_mul_epu32(counter, m0);
      c0[h] = _mm512_xor_si512(_mm512_srli_epi64(counter, 32), first_c0);
      c1[h] = first_c1;
      c2[h] = _mm512_xor_si512(_mm512_srli_epi64(c3[h], 32), first_c2);
    }
    for (int round = 1; round < 10; ++round) {
      const __m512i k0 = _mm512_set1_epi64(int64_t(keys[round][0])), k1 = _mm512_set1_epi64(int64_t(keys[round][1]));
      for (int h = 0; h < 2; ++h) {
        const __m512i p = _mm512_mul_epu32(c0[h], m0), q = _mm512_mul_epu32(c2[h], m1);
        c0[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), c1[h], k0, exclusive_or);
        c2[h] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), c3[h], k1, exclusive_or);
        c1[h] = q;
        c3[h] = p;
      }
    }
    const uint32_t low = selected_avx512(c0[0], c1[0], c2[0], c3[0], limit);
    out[i] = low | uint64_t(selected_avx512(c0[1], c1[1], c2[1], c3[1], limit)) << 32;
  }
}

#endif  // __x86_64__

inline PhiloxBits philox_bits_of(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return philox_bits_avx512;
  if (isa == Isa::avx2) return philox_bits_avx2;
#endif
  (void)isa;
  return philox_bits_scalar;
}

constexpr int64_t word_bits = 64;
constexpr int64_t words_for(int64_t n) { return (n + word_bits - 1) / word_bits; }

// Moves the bits of `n_words + 1` words down by `shift` < 64 places.
inline void shift_down(uint64_t* words, int64_t n_words, int shift) {
  if (shift == 0) return;
  for (int64_t i = 0; i < n_words; ++i) words[i] = words[i] >> shift | words[i + 1] << (64 - shift);
}

// The bits of entries start to start + n - 1; those beyond are 0. `out` has room for words_for(n) + 1 words.
inline void mask_bits(const Mask& mask, PhiloxBits philox_bits, int64_t start, int64_t n, uint64_t* out,
                      const Upcoming& upcoming = {}) {
  const int64_t n_words = words_for(n);
  switch (mask.kind) {
    case Mask::Kind::philox: {
      const int shift = int(start % 4);
      philox_bits(mask, uint64_t(start) / 4, n_words + (shift != 0), upcoming, out);
      shift_down(out, n_words, shift);
      break;
    }
    case Mask::Kind::bits: {
      const int64_t byte = start / 8, there = std::min(mask.size - byte, 8 * n_words + 1);
      out[n_words] = 0;
      std::memset(out, 0, size_t(8 * n_words));
      std::memcpy(out, static_cast<const uint8_t*>(mask.data) + byte, size_t(there));
      shift_down(out, n_words, int(start % 8));
      break;
    }
    default: std::fill(out, out + n_words, ~uint64_t(0));
  }
  if (n % word_bits) out[n_words - 1] &= (uint64_t(1) << n % word_bits) - 1;
}

inline int64_t count_bits(const uint64_t* bits, int64_t n_words) {
  int64_t count = 0;
  for (int64_t i = 0; i < n_words; ++i) count += __builtin_popcountll(bits[i]);
  return count;
}

}  // namespace fastedit::cpu
