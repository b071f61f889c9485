// Rows of matrices of any type, widened to the type that is computed in and rounded once to the matrix's own.
#pragma once
#include <type_traits>

#include "cpu.h"
#include "mask.h"
#include "numbers.h"

namespace lora_kernels::cpu {

template <typename T, typename Own>
INLINE T widened(Own value) {
  if constexpr (std::is_same_v<Own, double>)
    return static_cast<T>(value);
  else
    return as_float(value);
}

// run(the address of an element, as a pointer to its own type).
template <typename Run>
INLINE void at_own_type(const Rows& rows, std::int64_t row, std::int64_t column, const Run& run) {
  const Address at = rows.at(row, column);
  switch (rows.type) {
    case Rows::FLOAT: return run(reinterpret_cast<float*>(at));
    case Rows::BFLOAT16: return run(reinterpret_cast<BFloat16*>(at));
    case Rows::HALF: return run(reinterpret_cast<Half*>(at));
    case Rows::DOUBLE: return run(reinterpret_cast<double*>(at));
  }
}

// out[count] = the elements of a row from `column` on.
template <typename T>
INLINE void read_row(T* out, const Rows& from, std::int64_t row, std::int64_t column, std::int64_t count) {
  at_own_type(from, row, column, [&](const auto* in) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = widened<T>(in[i]);
  });
}

template <typename T>
INLINE void write_row(const T* in, const Rows& to, std::int64_t row, std::int64_t column, std::int64_t count) {
  at_own_type(to, row, column, [&](auto* out) {
    for (std::int64_t i = 0; i < count; ++i) round_to(out[i], in[i]);
  });
}

// Rows and columns of a matrix.
struct Place {
  std::int64_t first, rows, column, columns;
};

// A tile, in rows `step` elements apart, from in[p], and to or added to out[p].
void read_tile(float* tile, std::int64_t step, const Rows& in, const Place& p);
void read_tile(double* tile, std::int64_t step, const Rows& in, const Place& p);
void write_tile(const float* tile, std::int64_t step, const Rows& out, bool add, const Place& p);
void write_tile(const double* tile, std::int64_t step, const Rows& out, bool add, const Place& p);

}  // namespace lora_kernels::cpu
