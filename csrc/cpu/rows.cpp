// A matrix as Python names it, and its tiles.
#include "rows.h"

#include <stdexcept>

namespace lora_kernels::cpu {
namespace {

// p as one row, if its rows follow one another in m and in a tile of rows `step` elements apart.
INLINE Place flat(std::int64_t step, const Rows& m, const Place& p) {
  const bool adjacent = !m.order && m.stride == p.columns && step == p.columns;
  return adjacent ? Place{p.first, 1, p.column, p.rows * p.columns} : p;
}

template <typename T>
INLINE void read(T* tile, std::int64_t step, const Rows& in, const Place& place) {
  const Place p = flat(step, in, place);
  for (std::int64_t i = 0; i < p.rows; ++i) read_row(tile + i * step, in, p.first + i, p.column, p.columns);
}

template <typename T>
INLINE void add_row(const T* in, const Rows& to, std::int64_t row, std::int64_t column, std::int64_t count) {
  at_own_type(to, row, column, [&](auto* out) {
    for (std::int64_t i = 0; i < count; ++i) round_to(out[i], widened<T>(out[i]) + in[i]);
  });
}

template <typename T>
INLINE void write(const T* tile, std::int64_t step, const Rows& out, bool add, const Place& place) {
  const Place p = flat(step, out, place);
  for (std::int64_t i = 0; i < p.rows; ++i)
    if (add)
      add_row(tile + i * step, out, p.first + i, p.column, p.columns);
    else
      write_row(tile + i * step, out, p.first + i, p.column, p.columns);
}

}  // namespace

#define TILES_OF(T)                                                                                        \
  FOR_EACH_CPU void read_tile(T* tile, std::int64_t step, const Rows& in, const Place& p) {                \
    read(tile, step, in, p);                                                                               \
  }                                                                                                        \
  FOR_EACH_CPU void write_tile(const T* tile, std::int64_t step, const Rows& out, bool add, const Place& p) { \
    write(tile, step, out, add, p);                                                                        \
  }
TILES_OF(float)
TILES_OF(double)

Rows::Rows(Address address, std::int64_t stride, const std::string& dtype) : address(address), stride(stride) {
  if (dtype == "float32")
    type = FLOAT;
  else if (dtype == "bfloat16")
    type = BFLOAT16;
  else if (dtype == "float16")
    type = HALF;
  else if (dtype == "float64")
    type = DOUBLE;
  else
    throw std::invalid_argument("Rows: got dtype " + dtype + ", expected float32, bfloat16, float16 or float64");
}

}  // namespace lora_kernels::cpu
