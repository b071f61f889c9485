// keep(seed, row, column) of lora_kernels/mask.py, whose docstring is the specification, for the loops over rows in this folder.
#pragma once
#include <algorithm>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

// The compiler makes a version for each of these, and the one for this CPU is taken when the library is loaded.
#if !defined(__x86_64__) || !defined(__linux__)
#define FOR_EACH_CPU
#elif __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace lora_kernels::cpu {

constexpr std::uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;  // multipliers
constexpr std::uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;  // key increments
constexpr int ROUNDS = 7;
constexpr int WORDS = 4, LANES = 8;   // of a Philox block: 32-bit words, 16-bit lanes
constexpr int WIDE = 64, NARROW = 8;  // blocks that are computed side by side: of a row, and of what is left of it

struct Mask {
  std::uint32_t key[2], offset[2];
  std::int32_t threshold;
};

// The words of TILE neighbouring blocks of a row, block after block.
template <int TILE>
INLINE void philox(std::uint32_t column, std::uint32_t row, const Mask& mask, std::uint32_t (&words)[TILE * WORDS]) {
  std::uint32_t c[WORDS][TILE];
  for (int i = 0; i < TILE; ++i) {
    std::uint32_t c0 = column + i, c1 = row, c2 = mask.offset[0], c3 = mask.offset[1];
    std::uint32_t k0 = mask.key[0], k1 = mask.key[1];
    for (int round = 0; round < ROUNDS; ++round, k0 += W0, k1 += W1) {
      const std::uint64_t p0 = std::uint64_t{c0} * M0, p1 = std::uint64_t{c2} * M1;
      c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<std::uint32_t>(p1);
      c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<std::uint32_t>(p0);
    }
    c[0][i] = c0, c[1][i] = c1, c[2][i] = c2, c[3][i] = c3;
  }
  for (int i = 0; i < TILE; ++i)
    for (int word = 0; word < WORDS; ++word) words[i * WORDS + word] = c[word][i];
}

// kept[i] = `one` where keep(seed, row, column + i), else zero.
template <typename T, int TILE>
INLINE void keep_tile(T (&kept)[TILE * LANES], T one, std::int64_t column, std::uint32_t row, const Mask& mask) {
  std::uint32_t words[TILE * WORDS];
  philox<TILE>(static_cast<std::uint32_t>(column / LANES), row, mask, words);
  for (int i = 0; i < TILE * WORDS; ++i) {
    kept[2 * i] = static_cast<std::int32_t>(words[i] & 0xFFFF) >= mask.threshold ? one : T{0};
    kept[2 * i + 1] = static_cast<std::int32_t>(words[i] >> 16) >= mask.threshold ? one : T{0};
  }
}

// write(k, kept, width) for the tiles of a row: kept[i] = `one` where keep(seed, row, k + i), else zero.
template <typename T, typename Write>
INLINE void for_each_tile(T one, std::int64_t K, std::uint32_t row, const Mask& mask, const Write& write) {
  std::int64_t k = 0;
  for (; k + WIDE * LANES <= K; k += WIDE * LANES) {
    T kept[WIDE * LANES];
    keep_tile<T, WIDE>(kept, one, k, row, mask);
    write(k, kept, WIDE * LANES);
  }
  for (; k < K; k += NARROW * LANES) {
    T kept[NARROW * LANES];
    keep_tile<T, NARROW>(kept, one, k, row, mask);
    write(k, kept, std::min<std::int64_t>(NARROW * LANES, K - k));
  }
}

// out[K] = in[K] * keep(seed, row, column) * scale.
template <typename T>
INLINE void drop_row(T* out, const T* in, T scale, std::int64_t K, std::uint32_t row, const Mask& mask) {
  for_each_tile(scale, K, row, mask, [&](std::int64_t k, const T* factor, std::int64_t width) {
    for (std::int64_t i = 0; i < width; ++i) out[k + i] = in[k + i] * factor[i];
  });
}

inline Mask mask_of(std::int32_t threshold, std::int64_t seed, std::uint64_t offset) {
  const auto low = [](std::uint64_t v) { return static_cast<std::uint32_t>(v); };
  const auto high = [](std::uint64_t v) { return static_cast<std::uint32_t>(v >> 32); };
  return {{low(seed), high(seed)}, {low(offset), high(offset)}, threshold};
}

}  // namespace lora_kernels::cpu
