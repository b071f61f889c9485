// The rows of a dropout mask, bit for bit those of lora_kernels/dropout.py, whose docstring is the specification. PyTorch operations
// need sixty passes over memory for a mask; here a tile of it stays in registers and cache.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu.h"

namespace lora_kernels::cpu {
namespace {

constexpr std::uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;  // multipliers
constexpr std::uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;  // key increments
constexpr int ROUNDS = 7;
constexpr int WORDS = 4, LANES = 8;    // of a Philox block: 32-bit words, 16-bit lanes
constexpr int TILE = 64;               // blocks that are computed side by side
constexpr std::int64_t FEW = 1 << 14;  // elements that one thread computes before others have begun

struct Mask {
  std::uint32_t key[2], offset[2];
  std::int32_t threshold;
};

// The words of TILE neighbouring blocks of a row, block after block.
inline __attribute__((always_inline)) void philox(std::uint32_t column, std::uint32_t row, const Mask& mask,
                                                  std::uint32_t (&words)[TILE * WORDS]) {
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

// out[K] = `one` where keep(seed, row, column), else zero.
template <typename T>
inline __attribute__((always_inline)) void keep_row(T* out, T one, std::int64_t K, std::uint32_t row, const Mask& mask) {
  for (std::int64_t k = 0; k < K; k += TILE * LANES) {
    std::uint32_t words[TILE * WORDS];
    philox(static_cast<std::uint32_t>(k / LANES), row, mask, words);
    T kept[TILE * LANES];
    for (int i = 0; i < TILE * WORDS; ++i) {
      kept[2 * i] = static_cast<std::int32_t>(words[i] & 0xFFFF) >= mask.threshold ? one : T{0};
      kept[2 * i + 1] = static_cast<std::int32_t>(words[i] >> 16) >= mask.threshold ? one : T{0};
    }
    std::memcpy(out + k, kept, sizeof(T) * std::min<std::int64_t>(TILE * LANES, K - k));
  }
}

// The compiler makes a version for each of these, and the one for this CPU is taken when the library is loaded.
#if !defined(__x86_64__) || !defined(__linux__)
#define FOR_EACH_CPU
#elif __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

#define KEEP_ROW(name, T) \
  FOR_EACH_CPU void name(T* out, T one, std::int64_t K, std::uint32_t row, const Mask& mask) { keep_row(out, one, K, row, mask); }
KEEP_ROW(keep_row_bytes, std::uint8_t)
KEEP_ROW(keep_row_halves, std::uint16_t)
KEEP_ROW(keep_row_floats, float)
KEEP_ROW(keep_row_doubles, double)

}  // namespace

void keep_rows(Address out, const std::string& dtype, std::int64_t first, std::int64_t M, std::int64_t K, std::int32_t threshold,
               std::int64_t seed, std::uint64_t offset, int threads) {
  const auto low = [](std::uint64_t v) { return static_cast<std::uint32_t>(v); };
  const auto high = [](std::uint64_t v) { return static_cast<std::uint32_t>(v >> 32); };
  const Mask mask{{low(seed), high(seed)}, {low(offset), high(offset)}, threshold};
  const auto run = [&](auto* keep, auto one) {
    auto* to = reinterpret_cast<decltype(one)*>(out);
#pragma omp parallel for num_threads(threads) if (M * K > FEW)
    for (std::int64_t i = 0; i < M; ++i) keep(to + i * K, one, K, static_cast<std::uint32_t>(first + i), mask);
  };
  if (dtype == "bool") return run(&keep_row_bytes, std::uint8_t{1});
  if (dtype == "bfloat16") return run(&keep_row_halves, std::uint16_t{0x3F80});
  if (dtype == "float16") return run(&keep_row_halves, std::uint16_t{0x3C00});
  if (dtype == "float32") return run(&keep_row_floats, 1.0f);
  if (dtype == "float64") return run(&keep_row_doubles, 1.0);
  throw std::invalid_argument("keep_rows: got dtype " + dtype + ", expected bool, bfloat16, float16, float32 or float64");
}

}  // namespace lora_kernels::cpu
