// y += x * W^T for a few rows of x, W in 4 bits as nf4_decode.cpp has it: a vector of W lives in a register from its codes to its last
// multiplication. Rows of W are whole blocks; of a block's 16 different values each is rounded to x's type, as where W is decoded.
#pragma GCC optimize("fp-contract=fast")  // no bits are promised of sums, but those of W are: values_of_blocks is compiled elsewhere
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

constexpr std::int64_t GROUP = 64;      // columns whose codes are a vector: each lane holds GROUP / LANES, looked up one at a time
constexpr std::int64_t COLUMNS = 512;   // that a thread takes at a time where it comes back to them: those of ROWS rows of x, 16 KiB,
constexpr std::int64_t ROWS_OF_W = 16;  // stay in its nearest cache beside those of so many rows of W, 4 KiB of codes, 8 of values
constexpr int ROWS = 8;                 // of x: their sums stay in registers

struct alignas(64) Line {  // of a cache: no vector lies across two
  float at[CODES];
};

template <int LANES>
struct Vectors {
  typedef float Floats __attribute__((vector_size(4 * LANES)));
  typedef std::int32_t Codes __attribute__((vector_size(4 * LANES)));
  typedef std::uint32_t Bits __attribute__((vector_size(4 * LANES)));
};

// The codes of a group, those of a lane in its lowest bits.
INLINE void load(Vectors<8>::Bits& bits, const std::uint8_t* codes) { std::memcpy(&bits, codes, sizeof(bits)); }
INLINE void load(Vectors<16>::Bits& bits, const std::uint8_t* codes) {
  typedef std::uint16_t Shorts __attribute__((vector_size(GROUP / 2)));
  Shorts shorts;
  std::memcpy(&shorts, codes, sizeof(shorts));
  bits = __builtin_convertvector(shorts, Vectors<16>::Bits);
}

// The values of the codes that begin `shift` bits from the lowest. Eight lanes: by three bits from each half of the table, by the
// fourth one of them.
template <int LANES>
INLINE void look_up(typename Vectors<LANES>::Floats& found, const float* table, const typename Vectors<LANES>::Bits& bits, int shift) {
#ifdef __clang__
  for (int i = 0; i < LANES; ++i) found[i] = table[bits[i] >> shift & 15];
#else
  using Codes = typename Vectors<LANES>::Codes;
  typename Vectors<LANES>::Floats low, high;
  std::memcpy(&low, table, sizeof(low));
  std::memcpy(&high, table + CODES - LANES, sizeof(high));
  const Codes code = reinterpret_cast<Codes>(bits >> shift), fourth = reinterpret_cast<Codes>(bits << (28 - shift));
  if constexpr (LANES == CODES)
    found = __builtin_shuffle(low, code);
  else
    found = fourth < 0 ? __builtin_shuffle(high, code) : __builtin_shuffle(low, code);
#endif
}

// Rows of x are multiplied in blocks of nearly one size. first_row(M, i + 1) - first_row(M, i) <= ROWS is that of block i.
INLINE std::int64_t blocks_of(std::int64_t M) { return (M + ROWS - 1) / ROWS; }
INLINE std::int64_t first_row(std::int64_t M, std::int64_t block) { return block * M / blocks_of(M); }

// Some rows of W in some of its blocks' columns, and x.
struct Part {
  const std::uint8_t* codes;  // of the first row; those of the next are `half` bytes further on
  std::int64_t half;
  const float (*values)[CODES];  // of `blocks` blocks of each row
  std::int64_t blocks, blocksize, rows_of_w;
  const float* x;  // [K / GROUP, count, GROUP] of each block of `count` rows; columns of a group in the order in which they are looked up
  std::int64_t K, M, first_column;
  float* sums;  // [rows_of_w, M, LANES]
};

// sums += x * W of COUNT rows of x.
template <int LANES, int COUNT>
INLINE void multiply(const Part& p, std::int64_t row) {
  typename Vectors<LANES>::Floats sums[COUNT], values, in;
  typename Vectors<LANES>::Bits bits;
  for (std::int64_t n = 0; n < p.rows_of_w; ++n) {
    const std::uint8_t* codes = p.codes + n * p.half;
    const float* x = p.x + row * p.K + p.first_column * COUNT;
    float* out = p.sums + (n * p.M + row) * LANES;
    for (int m = 0; m < COUNT; ++m) std::memcpy(&sums[m], out + m * LANES, sizeof(in));
    for (std::int64_t block = 0; block < p.blocks; ++block) {
      const float* table = p.values[n * p.blocks + block];
      for (std::int64_t k = 0; k < p.blocksize; k += GROUP, codes += GROUP / 2, x += COUNT * GROUP) {
        load(bits, codes);
#pragma GCC unroll 8
        for (int i = 0; i < GROUP / LANES; ++i) {
          look_up<LANES>(values, table, bits, i / 2 * 8 + (i % 2 ? 0 : 4));  // a byte's first code is in its high half
#pragma GCC unroll 8
          for (int m = 0; m < COUNT; ++m) {
            std::memcpy(&in, x + m * GROUP + i * LANES, sizeof(in));
            sums[m] += in * values;
          }
        }
      }
    }
    for (int m = 0; m < COUNT; ++m) std::memcpy(out + m * LANES, &sums[m], sizeof(in));
  }
}

template <int LANES, int COUNT = ROWS>
INLINE void multiply_block(const Part& p, std::int64_t row, std::int64_t count) {
  if constexpr (COUNT > 0) count == COUNT ? multiply<LANES, COUNT>(p, row) : multiply_block<LANES, COUNT - 1>(p, row, count);
}

template <int LANES>
INLINE void multiply_blocks(const Part& p) {
  for (std::int64_t i = 0; i < blocks_of(p.M); ++i) {
    const std::int64_t row = first_row(p.M, i);
    multiply_block<LANES>(p, row, first_row(p.M, i + 1) - row);
  }
}

FOR_EACH_CPU void multiply_by_8(const Part& p) { multiply_blocks<8>(p); }
#ifdef HAVE_AVX512
// Not by vdpbf16ps, counted: one token waits for memory, 32 bytes of codes or 5 cycles at 20 GB/s for 64 weights and some 16
// instructions, which it would make 12; 16 tokens are 64 fused products, 2 a cycle, or 32 of its, 1 a cycle on Intel's CPUs.
__attribute__((target("arch=x86-64-v4"))) void multiply_by_16(const Part& p) { multiply_blocks<16>(p); }
#endif

struct Loop {
  std::int64_t lanes;
  void (*multiply)(const Part&);
};

Loop loop_for_this_cpu() {
#ifdef HAVE_AVX512
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return {16, multiply_by_16};
#endif
  return {8, multiply_by_8};
}

// wide = the block of rows of x, as Part has it: number GROUP / lanes * i + j of a group's columns is at lanes * j + i.
template <typename T>
void spread(float* wide, Rows x, std::int64_t M, std::int64_t K, std::int64_t block, std::int64_t lanes) {
  const std::int64_t first = first_row(M, block), count = first_row(M, block + 1) - first, codes = GROUP / lanes;
  for (std::int64_t row = 0; row < count; ++row)
    for (std::int64_t k = 0; k < K; k += GROUP) {
      const T* in = reinterpret_cast<const T*>(x.at(first + row, k));
      float* out = wide + first * K + k * count + row * GROUP;
      for (std::int64_t i = 0; i < lanes; ++i)
        for (std::int64_t j = 0; j < codes; ++j) out[j * lanes + i] = as_float(in[i * codes + j]);
    }
}

template <typename T>
void add_sums(Rows y, std::int64_t M, std::int64_t first, std::int64_t last, const float* sums, std::int64_t lanes) {
  for (std::int64_t n = first; n < last; ++n)
    for (std::int64_t m = 0; m < M; ++m, sums += lanes) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < lanes; ++i) sum += sums[i];
      T* out = reinterpret_cast<T*>(y.at(m, n));
      round_to(*out, as_float(*out) + sum);
    }
}

// y[:, first : last] += x * W[first : last]^T
template <typename T>
void multiply_rows_of_w(const Loop& loop, const Weight& w, const float* x, std::int64_t M, std::int64_t K, Rows y, std::int64_t first,
                        std::int64_t last) {
  const std::int64_t all = K / w.blocksize, most = M > ROWS ? std::max(COLUMNS / w.blocksize, std::int64_t{1}) : all;
  const std::int64_t sums = (last - first) * M;
  std::vector<Line> room(static_cast<std::size_t>(sums + (last - first) * most));
  float(*values)[CODES] = &room[sums].at;
  for (std::int64_t block = 0; block < all; block += most) {
    const std::int64_t blocks = std::min(most, all - block), k = block * w.blocksize;
    for (std::int64_t n = first; n < last; ++n)
      values_of_blocks(values + (n - first) * blocks, w, n * all + block, n * all + block + blocks, y.type);
    const auto* codes = pointer<std::uint8_t>(w.codes) + (first * K + k) / 2;
    loop.multiply({codes, K / 2, values, blocks, w.blocksize, last - first, x, K, M, k, room[0].at});
  }
  add_sums<T>(y, M, first, last, room[0].at, loop.lanes);
}

template <typename T>
void product(const Weight& w, Rows x, std::int64_t M, std::int64_t N, std::int64_t K, Rows y, int threads) {
  const Loop loop = loop_for_this_cpu();
  std::vector<Line> room(static_cast<std::size_t>(M * K / CODES));
  float* wide = room.data()->at;
#pragma omp parallel for num_threads(threads) if (M * K > 1 << 14)
  for (std::int64_t block = 0; block < blocks_of(M); ++block) spread<T>(wide, x, M, K, block, loop.lanes);
#pragma omp parallel for num_threads(threads) if (N * K > 1 << 14)
  for (std::int64_t n = 0; n < N; n += ROWS_OF_W) multiply_rows_of_w<T>(loop, w, wide, M, K, y, n, std::min(N, n + ROWS_OF_W));
}

}  // namespace

void nf4_product(const Weight& weight, Address x, std::int64_t x_stride, std::int64_t M, std::int64_t N, std::int64_t K,
                 const std::string& dtype, Address y, std::int64_t y_stride, int threads) {
  if (weight.blocksize % GROUP || K % weight.blocksize)
    throw std::invalid_argument("nf4_product: rows of W have to be whole blocks of a multiple of 64");
  const Rows in(x, x_stride, dtype), out(y, y_stride, dtype);
  if (M * K == 0) return;
  if (in.type == Rows::FLOAT) return product<float>(weight, in, M, N, K, out, threads);
  if (in.type == Rows::BFLOAT16) return product<BFloat16>(weight, in, M, N, K, out, threads);
  product<Half>(weight, in, M, N, K, out, threads);
}

}  // namespace lora_kernels::cpu
