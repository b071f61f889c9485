// The rows of a dropout mask, bit for bit those of lora_kernels/mask.py, whose docstring is the specification. PyTorch operations
// need sixty passes over memory for a mask; here a tile of it stays in registers and cache.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "mask.h"

namespace lora_kernels::cpu {
namespace {

constexpr std::int64_t FEW = 1 << 14;  // elements that one thread computes before others have begun

// out[K] = `one` where keep(seed, row, column), else zero.
template <typename T>
INLINE void keep_row(T* out, T one, std::int64_t K, std::uint32_t row, const Mask& mask) {
  for_each_tile(one, K, row, mask, [&](std::int64_t k, const T* kept, std::int64_t width) {
    std::memcpy(out + k, kept, sizeof(T) * width);
  });
}

#define KEEP_ROW(name, T) \
  FOR_EACH_CPU void name(T* out, T one, std::int64_t K, std::uint32_t row, const Mask& mask) { keep_row(out, one, K, row, mask); }
KEEP_ROW(keep_row_bytes, std::uint8_t)
KEEP_ROW(keep_row_halves, std::uint16_t)
KEEP_ROW(keep_row_floats, float)
KEEP_ROW(keep_row_doubles, double)

#define DROP_ROW(name, T)                                                                                     \
  FOR_EACH_CPU void name(T* out, const T* in, T scale, std::int64_t K, std::uint32_t row, const Mask& mask) { \
    drop_row(out, in, scale, K, row, mask);                                                                   \
  }
DROP_ROW(drop_row_floats, float)
DROP_ROW(drop_row_doubles, double)

}  // namespace

void keep_rows(Address out, const std::string& dtype, std::int64_t first, std::int64_t M, std::int64_t K, std::int32_t threshold,
               std::int64_t seed, std::uint64_t offset, int threads) {
  const Mask mask = mask_of(threshold, seed, offset);
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

void drop_rows(Address out, Address in, std::int64_t in_stride, int itemsize, std::int64_t M, std::int64_t K,
               std::int32_t threshold, double scale, std::int64_t seed, std::uint64_t offset, int threads) {
  const Mask mask = mask_of(threshold, seed, offset);
  const auto run = [&](auto* drop, auto factor) {
    auto* to = reinterpret_cast<decltype(factor)*>(out);
    const auto* from = reinterpret_cast<const decltype(factor)*>(in);
#pragma omp parallel for num_threads(threads) if (M * K > FEW)
    for (std::int64_t i = 0; i < M; ++i) drop(to + i * K, from + i * in_stride, factor, K, static_cast<std::uint32_t>(i), mask);
  };
  if (itemsize == sizeof(float)) return run(&drop_row_floats, static_cast<float>(scale));
  if (itemsize == sizeof(double)) return run(&drop_row_doubles, scale);
  throw std::invalid_argument("drop_rows: got elements of " + std::to_string(itemsize) + " bytes, expected 4 or 8");
}

}  // namespace lora_kernels::cpu
