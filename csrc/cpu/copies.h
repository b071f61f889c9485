// Small matrices as the products of low_rank.cpp read them: copied once, in memory that is not filled with zeros first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "rows.h"

namespace lora_kernels::cpu {

template <typename T>
constexpr Rows::Type OWN = sizeof(T) == 8 ? Rows::DOUBLE : Rows::FLOAT;

// s * m[rows, columns] in rows of `row` elements, whose last ones are zeros.
template <typename T>
std::unique_ptr<T[]> copy_of(const Rows& m, std::int64_t rows, std::int64_t columns, std::int64_t row, T s = 1) {
  std::unique_ptr<T[]> to(new T[rows * row]);
  read_tile(to.get(), row, m, {0, rows, 0, columns});
  for (std::int64_t i = 0; i < rows; ++i) std::fill(to.get() + i * row + columns, to.get() + (i + 1) * row, T{0});
  if (s != 1) std::for_each(to.get(), to.get() + rows * row, [s](T& value) { value *= s; });
  return to;
}

// s * m[rows, columns]^T in rows of `row` elements, whose last ones are zeros. A tile of m at a time, whose columns are written as
// runs: for A[8, 2048] and B[2048, 8] a third of the time of a loop over all of m.
template <typename T>
std::unique_ptr<T[]> transpose_of(const Rows& m, std::int64_t rows, std::int64_t columns, std::int64_t row, T s = 1) {
  constexpr std::int64_t RUN = 8, WIDTH = 64;
  const std::int64_t step = std::min(WIDTH, columns);
  std::unique_ptr<T[]> to(new T[columns * row]);
  T tile[RUN * WIDTH];
  for (std::int64_t i = 0; i < row; i += RUN)
    for (std::int64_t j = 0; j < columns; j += WIDTH) {
      const std::int64_t there = std::clamp<std::int64_t>(rows - i, 0, RUN), width = std::min(WIDTH, columns - j);
      read_tile(tile, step, m, {i, there, j, width});
      std::fill(tile + there * step, tile + RUN * step, T{0});
      for (std::int64_t k = 0; k < width; ++k) {
        T run[RUN];
        for (std::int64_t r = 0; r < RUN; ++r) run[r] = s * tile[r * step + k];
        T* at = to.get() + (j + k) * row + i;
        if (i + RUN <= row)
          std::copy_n(run, RUN, at);
        else
          std::copy_n(run, row - i, at);
      }
    }
  return to;
}

}  // namespace lora_kernels::cpu
