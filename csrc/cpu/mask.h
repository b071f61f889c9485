// keep(seed, row, column) of lora_kernels/mask.py, whose docstring is the specification, for the loops over rows in this folder.
#pragma once
#include <algorithm>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

// The compiler makes a version for each of these, and the one for this CPU is taken when the library is loaded; X86_64_LEVEL, if it
// is defined, asks for one alone: 1 (plain C++), 3 (AVX2) or 4 (AVX-512).
#if defined(FOR_EACH_CPU)
#elif X86_64_LEVEL == 1
#define FOR_EACH_CPU
#elif X86_64_LEVEL == 3
#define FOR_EACH_CPU __attribute__((target("arch=x86-64-v3")))
#elif X86_64_LEVEL == 4
#define FOR_AVX512 __attribute__((target("arch=x86-64-v4")))
#define FOR_EACH_CPU FOR_AVX512
#elif !defined(__x86_64__) || !defined(__linux__)
#define FOR_EACH_CPU
#elif __GNUC__ >= 12
#define FOR_AVX512 __attribute__((target("arch=x86-64-v4")))  // for loops in vectors of 64 bytes
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace lora_kernels::cpu {

constexpr int LANES = 8;              // 16-bit lanes of a Philox block
constexpr int WIDE = 64, NARROW = 8;  // blocks that are computed side by side: of a row, and of what is left of it

struct Mask {
  std::uint32_t key[2], offset[2];
  std::int32_t threshold;
};

// lanes[rows, blocks * LANES] of neighbouring rows and blocks from `row` and `column` on; blocks: a multiple of 4.
void draw_lanes(std::uint16_t* lanes, std::uint32_t row, std::int64_t rows, std::uint32_t column, std::int64_t blocks,
                const Mask& mask);

// kept[i] = `one` where keep(seed, row, column + i), else zero.
template <typename T, int TILE>
INLINE void keep_tile(T (&kept)[TILE * LANES], T one, std::int64_t column, std::uint32_t row, const Mask& mask) {
  std::uint16_t lanes[TILE * LANES];
  draw_lanes(lanes, row, 1, static_cast<std::uint32_t>(column / LANES), TILE, mask);
  for (int i = 0; i < TILE * LANES; ++i) kept[i] = static_cast<std::int32_t>(lanes[i]) >= mask.threshold ? one : T{0};
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
