// y += x * W^T for a few rows of x, W in 4 bits as nf4_decode.cpp has it: a vector of W lives in a register from its codes to its last
// multiplication. Rows of W are whole blocks; of a block's 16 different values each is rounded to x's type, as where W is decoded.
#pragma GCC optimize("fp-contract=fast")  // no bits are promised of sums, but those of W are: absmax_of_blocks is compiled elsewhere
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "mask.h"
#include "nf4.h"
#include "numbers.h"

namespace lora_kernels::cpu {
namespace {

constexpr int WIDE = 8;                 // lanes of a vector of W: each holds 4 bytes, 8 codes, of which one at a time is looked up
constexpr std::int64_t GROUP = 64;      // columns whose codes are such a vector
constexpr std::int64_t ROWS_OF_W = 16;  // that a thread takes at a time
constexpr int MOST_ROWS = 8;            // of x: their sums stay in registers

typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef std::int32_t Codes __attribute__((vector_size(4 * WIDE)));
typedef std::uint32_t Bits __attribute__((vector_size(4 * WIDE)));

// The values of the codes that begin `shift` bits from the lowest: by three bits from each half of the table, by the fourth one of them.
INLINE void look_up(Floats& found, const Floats (&table)[2], const Bits& bits, int shift) {
#ifdef __clang__
  for (int i = 0; i < WIDE; ++i) found[i] = table[bits[i] >> shift >> 3 & 1][bits[i] >> shift & 7];
#else
  const Codes low = reinterpret_cast<Codes>(bits >> shift), sign = reinterpret_cast<Codes>(bits << (28 - shift));
  found = sign < 0 ? __builtin_shuffle(table[1], low) : __builtin_shuffle(table[0], low);
#endif
}

struct Product {
  const Weight& weight;
  std::int64_t N, K;
  const float* x;  // [rows, K], of each group of columns column 8 * i + j at 8 * j + i
  Address y;
  std::int64_t y_stride;
};

// y[ROWS, first : last] += x[ROWS, K] * W[first : last]^T
template <int ROWS, typename T>
INLINE void multiply(const Product& p, std::int64_t row, std::int64_t first, std::int64_t last) {
  const Weight& w = p.weight;
  const std::int64_t half = p.K / 2, blocks = p.K / w.blocksize;
  const float* x = p.x + row * p.K;
  std::vector<float> absmax(static_cast<std::size_t>(blocks));
  for (std::int64_t n = first; n < last; ++n) {
    const std::uint8_t* codes = reinterpret_cast<const std::uint8_t*>(w.codes) + n * half;
    absmax_of_blocks(absmax.data(), w, n * blocks, (n + 1) * blocks);
    Floats sums[ROWS];
    for (int m = 0; m < ROWS; ++m) sums[m] = Floats{};
    for (std::int64_t block = 0; block < blocks; ++block) {
      T value[CODES];
      values_of_block(value, w, absmax[block]);
      float wide[CODES];
      for (int code = 0; code < CODES; ++code) wide[code] = as_float(value[code]);
      Floats table[2];
      std::memcpy(table, wide, sizeof(wide));
      for (std::int64_t k = block * w.blocksize; k < (block + 1) * w.blocksize; k += GROUP) {
        Bits bits;
        std::memcpy(&bits, codes + k / 2, sizeof(bits));
        for (int i = 0; i < 8; ++i) {
          Floats values, in;
          look_up(values, table, bits, i / 2 * 8 + (i % 2 ? 0 : 4));  // a byte's first code is in its high half
          for (int m = 0; m < ROWS; ++m) {
            std::memcpy(&in, x + m * p.K + k + i * WIDE, sizeof(in));
            sums[m] += in * values;
          }
        }
      }
    }
    for (int m = 0; m < ROWS; ++m) {
      float sum = 0.0f;
      for (int i = 0; i < WIDE; ++i) sum += sums[m][i];
      T* out = reinterpret_cast<T*>(p.y) + (row + m) * p.y_stride + n;
      round_to(*out, as_float(*out) + sum);
    }
  }
}

template <typename T>
INLINE void multiply_rows(const Product& p, std::int64_t rows, std::int64_t first, std::int64_t last) {
  std::int64_t row = 0;
  for (; row + MOST_ROWS <= rows; row += MOST_ROWS) multiply<MOST_ROWS, T>(p, row, first, last);
  for (; row + 4 <= rows; row += 4) multiply<4, T>(p, row, first, last);
  for (; row + 2 <= rows; row += 2) multiply<2, T>(p, row, first, last);
  for (; row < rows; ++row) multiply<1, T>(p, row, first, last);
}

#define PRODUCT_OF(T)                                                                                            \
  FOR_EACH_CPU void product_##T(const Product& p, std::int64_t rows, std::int64_t first, std::int64_t last) {    \
    multiply_rows<T>(p, rows, first, last);                                                                      \
  }
PRODUCT_OF(float)
PRODUCT_OF(BFloat16)
PRODUCT_OF(Half)

template <typename T>
void product(const Weight& weight, Address x, std::int64_t x_stride, std::int64_t M, std::int64_t N, std::int64_t K, Address y,
             std::int64_t y_stride, int threads, void (*part)(const Product&, std::int64_t, std::int64_t, std::int64_t)) {
  std::vector<float> wide(static_cast<std::size_t>(M * K));
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t k = 0; k < K; ++k)
      wide[m * K + k / GROUP * GROUP + k % 8 * 8 + k % GROUP / 8] = as_float(reinterpret_cast<const T*>(x)[m * x_stride + k]);
  const Product p{weight, N, K, wide.data(), y, y_stride};
#pragma omp parallel for num_threads(threads) if (N * K > 1 << 14)
  for (std::int64_t n = 0; n < N; n += ROWS_OF_W) part(p, M, n, std::min(N, n + ROWS_OF_W));
}

}  // namespace

void nf4_product(const Weight& weight, Address x, std::int64_t x_stride, std::int64_t M, std::int64_t N, std::int64_t K,
                 const std::string& dtype, Address y, std::int64_t y_stride, int threads) {
  if (weight.blocksize % GROUP || K % weight.blocksize)
    throw std::invalid_argument("nf4_product: rows of W have to be whole blocks of a multiple of 64");
  if (dtype == "float32") return product<float>(weight, x, x_stride, M, N, K, y, y_stride, threads, product_float);
  if (dtype == "bfloat16") return product<BFloat16>(weight, x, x_stride, M, N, K, y, y_stride, threads, product_BFloat16);
  if (dtype == "float16") return product<Half>(weight, x, x_stride, M, N, K, y, y_stride, threads, product_Half);
  throw std::invalid_argument("nf4_product: got dtype " + dtype + ", expected float32, bfloat16 or float16");
}

}  // namespace lora_kernels::cpu
