// Philox4x32-7 for neighbouring blocks of a row, four to a vector where the CPU has AVX2.
#include "mask.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && X86_64_LEVEL != 1
#define HAVE_AVX2  // in the compiler; whether the CPU has it is asked when the library is loaded
#include <immintrin.h>
#endif

namespace lora_kernels::cpu {
namespace {

constexpr std::uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;  // multipliers
constexpr std::uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;  // key increments
constexpr int ROUNDS = 7;

void philox(std::uint16_t* lanes, std::uint32_t row, std::int64_t rows, std::uint32_t column, std::int64_t blocks,
            const Mask& mask) {
  for (std::int64_t i = 0; i < rows * blocks; ++i) {
    std::uint32_t c0 = column + static_cast<std::uint32_t>(i % blocks), c1 = row + static_cast<std::uint32_t>(i / blocks);
    std::uint32_t c2 = mask.offset[0], c3 = mask.offset[1];
    std::uint32_t k0 = mask.key[0], k1 = mask.key[1];
    for (int round = 0; round < ROUNDS; ++round, k0 += W0, k1 += W1) {
      const std::uint64_t p0 = std::uint64_t{c0} * M0, p1 = std::uint64_t{c2} * M1;
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(p0);
    }
    const std::uint32_t words[] = {c0, c1, c2, c3};
    for (int word = 0; word < 4; ++word) {
      lanes[i * LANES + 2 * word] = static_cast<std::uint16_t>(words[word]);
      lanes[i * LANES + 2 * word + 1] = static_cast<std::uint16_t>(words[word] >> 16);
    }
  }
}

#ifdef HAVE_AVX2
// A word lies in the low half of 64 bits, of which the multiplication reads no more: the upper half may hold anything. So a round
// is eight instructions for 32 columns; the compiler's own code for the loop above, which packs the words, takes five times as long.
__attribute__((target("avx2"))) void philox_avx2(std::uint16_t* lanes, std::uint32_t row, std::int64_t rows, std::uint32_t column,
                                                 std::int64_t blocks, const Mask& mask) {
  const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1), next = _mm256_setr_epi64x(0, 1, 2, 3);
  const __m256i offset0 = _mm256_set1_epi64x(mask.offset[0]), offset1 = _mm256_set1_epi64x(mask.offset[1]);
  __m256i k0[ROUNDS], k1[ROUNDS];
  for (std::uint32_t round = 0; round < ROUNDS; ++round) {
    k0[round] = _mm256_set1_epi64x(mask.key[0] + round * W0);
    k1[round] = _mm256_set1_epi64x(mask.key[1] + round * W1);
  }
  for (std::int64_t i = 0; i < rows * blocks; i += 4, lanes += 4 * LANES) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(column + static_cast<std::uint32_t>(i % blocks)), next);
    __m256i c1 = _mm256_set1_epi64x(row + static_cast<std::uint32_t>(i / blocks)), c2 = offset0, c3 = offset1;
#pragma GCC unroll 7
    for (int round = 0; round < ROUNDS; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), k0[round]);
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), k1[round]);
      c1 = p1, c3 = p0;
    }
    const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);   // words 0 and 1 of each block
    const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);  // 2 and 3
    const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);  // blocks
    auto* out = reinterpret_cast<__m256i*>(lanes);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#endif

auto philox_for_this_cpu() {
#ifdef HAVE_AVX2
  if (__builtin_cpu_supports("avx2")) return &philox_avx2;
#endif
  return &philox;
}

}  // namespace

void draw_lanes(std::uint16_t* lanes, std::uint32_t row, std::int64_t rows, std::uint32_t column, std::int64_t blocks,
                const Mask& mask) {
  static const auto draw = philox_for_this_cpu();
  draw(lanes, row, rows, column, blocks, mask);
}

}  // namespace lora_kernels::cpu
