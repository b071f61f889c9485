// Products of thin matrices whose rows' elements are adjacent, in blocks that stay in registers. For low_rank.cpp. The
// compiler's vectors are all that they need of a SIMD library: loads, a product and a sum.
#pragma once
#include <cstdint>
#include <cstring>

#include "mask.h"

namespace lora_kernels::cpu {

constexpr int LEAST = 32;  // bytes of a vector

template <typename T, int BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <typename T, int BYTES>
using Vector = typename VectorOf<T, BYTES>::type;
template <typename T, int BYTES>
constexpr std::int64_t WIDTH = BYTES / sizeof(T);  // elements of a vector

// A matrix to read, whose elements i, j lie at i * row + j * step.
template <typename T>
struct Factor {
  const T* at;
  std::int64_t row, step;
};

// out[ROWS, VECTORS * WIDTH] += f[ROWS, inner] * in[inner, ·]: eight sums hide the latency of a multiplication. They begin at 0 and
// are added to `out` once: each of their roundings is then of their own size, not of out's.
template <int ROWS, int VECTORS, int BYTES, typename T>
INLINE void combine_block(T* out, std::int64_t out_row, Factor<T> f, const T* in, std::int64_t in_row, std::int64_t inner) {
  Vector<T, BYTES> sums[ROWS][VECTORS], values[VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vector<T, BYTES>{};
  for (std::int64_t k = 0; k < inner; ++k) {
    for (int j = 0; j < VECTORS; ++j) std::memcpy(&values[j], in + k * in_row + j * WIDTH<T, BYTES>, BYTES);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += f.at[i * f.row + k * f.step] * values[j];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      std::memcpy(&values[j], out + i * out_row + j * WIDTH<T, BYTES>, BYTES);
      sums[i][j] += values[j];
      std::memcpy(out + i * out_row + j * WIDTH<T, BYTES>, &sums[i][j], BYTES);
    }
}

// The same for any number of rows.
template <int ROWS, int VECTORS, int BYTES, typename T>
INLINE void combine_columns(T* out, std::int64_t out_row, std::int64_t rows, Factor<T> f, const T* in, std::int64_t in_row,
                            std::int64_t inner) {
  std::int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    combine_block<ROWS, VECTORS, BYTES>(out + i * out_row, out_row, {f.at + i * f.row, f.row, f.step}, in, in_row, inner);
  for (; i < rows; ++i)
    combine_block<1, VECTORS, BYTES>(out + i * out_row, out_row, {f.at + i * f.row, f.row, f.step}, in, in_row, inner);
}

// out[rows, columns] += f[rows, inner] * in[inner, columns], in vectors of BYTES.
template <int BYTES, typename T>
INLINE void combine(T* out, std::int64_t out_row, std::int64_t rows, std::int64_t columns, Factor<T> f, const T* in,
                    std::int64_t in_row, std::int64_t inner) {
  std::int64_t j = 0;
  for (; j + 2 * WIDTH<T, BYTES> <= columns; j += 2 * WIDTH<T, BYTES>)
    combine_columns<4, 2, BYTES>(out + j, out_row, rows, f, in + j, in_row, inner);
  for (; j + WIDTH<T, LEAST> <= columns; j += WIDTH<T, LEAST>)
    combine_columns<8, 1, LEAST>(out + j, out_row, rows, f, in + j, in_row, inner);
  for (; j < columns; ++j)
    for (std::int64_t i = 0; i < rows; ++i) {
      T sum{0};
      for (std::int64_t k = 0; k < inner; ++k) sum += f.at[i * f.row + k * f.step] * in[k * in_row + j];
      out[i * out_row + j] += sum;
    }
}

}  // namespace lora_kernels::cpu
