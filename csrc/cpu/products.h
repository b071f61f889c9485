// Products of thin matrices whose rows' elements are adjacent, in blocks that stay in registers. For low_rank.cpp.
#pragma once
#include <cstdint>
#include <cstring>

#include "mask.h"

namespace lora_kernels::cpu {

constexpr int VECTOR = 32;  // bytes

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr std::int64_t WIDTH = VECTOR / sizeof(T);  // elements of a vector

// A matrix to read, whose elements i, j lie at i * row + j * step.
template <typename T>
struct Factor {
  const T* at;
  std::int64_t row, step;
};

// out[ROWS, VECTORS * WIDTH] += f[ROWS, inner] * in[inner, ·]: eight sums hide the latency of a multiplication. They begin at 0 and
// are added to `out` once: each of their roundings is then of their own size, not of out's.
template <int ROWS, int VECTORS, typename T>
INLINE void combine_block(T* out, std::int64_t out_row, Factor<T> f, const T* in, std::int64_t in_row, std::int64_t inner) {
  Vector<T> sums[ROWS][VECTORS], values[VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = Vector<T>{};
  for (std::int64_t k = 0; k < inner; ++k) {
    for (int j = 0; j < VECTORS; ++j) std::memcpy(&values[j], in + k * in_row + j * WIDTH<T>, VECTOR);
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < VECTORS; ++j) sums[i][j] += f.at[i * f.row + k * f.step] * values[j];
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) {
      std::memcpy(&values[j], out + i * out_row + j * WIDTH<T>, VECTOR);
      sums[i][j] += values[j];
      std::memcpy(out + i * out_row + j * WIDTH<T>, &sums[i][j], VECTOR);
    }
}

// The same for any number of rows.
template <int ROWS, int VECTORS, typename T>
INLINE void combine_columns(T* out, std::int64_t out_row, std::int64_t rows, Factor<T> f, const T* in, std::int64_t in_row,
                            std::int64_t inner) {
  std::int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS)
    combine_block<ROWS, VECTORS>(out + i * out_row, out_row, {f.at + i * f.row, f.row, f.step}, in, in_row, inner);
  for (; i < rows; ++i)
    combine_block<1, VECTORS>(out + i * out_row, out_row, {f.at + i * f.row, f.row, f.step}, in, in_row, inner);
}

// out[rows, columns] += f[rows, inner] * in[inner, columns]
template <typename T>
INLINE void combine(T* out, std::int64_t out_row, std::int64_t rows, std::int64_t columns, Factor<T> f, const T* in,
                    std::int64_t in_row, std::int64_t inner) {
  std::int64_t j = 0;
  for (; j + 2 * WIDTH<T> <= columns; j += 2 * WIDTH<T>)
    combine_columns<4, 2>(out + j, out_row, rows, f, in + j, in_row, inner);
  for (; j + WIDTH<T> <= columns; j += WIDTH<T>) combine_columns<8, 1>(out + j, out_row, rows, f, in + j, in_row, inner);
  for (; j < columns; ++j)
    for (std::int64_t i = 0; i < rows; ++i) {
      T sum{0};
      for (std::int64_t k = 0; k < inner; ++k) sum += f.at[i * f.row + k * f.step] * in[k * in_row + j];
      out[i * out_row + j] += sum;
    }
}

}  // namespace lora_kernels::cpu
