// A part of a 4-bit weight, bit for bit that of lora_kernels/nf4/weight.py. A block has 16 different values (nf4.h): only they are
// computed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu.h"
#include "mask.h"
#include "nf4.h"
#include "numbers.h"

namespace lora_kernels::cpu {
namespace {

constexpr std::int64_t SEGMENT = 1 << 14;  // elements of a row that a thread takes at a time

// Looks values up by whole codes of bytes, as long as there are `step` of them; returns how many. None without AVX-512.
template <bool wide, typename T>
INLINE std::int64_t look_up(T* out, const T (&value)[CODES], const std::uint8_t* codes, std::int64_t bytes) {
#ifdef HAVE_AVX512
  if constexpr (wide && sizeof(T) <= 4) {
    using Lane = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
    using Pair = std::conditional_t<sizeof(T) == 2, std::uint32_t, std::uint64_t>;  // the lanes of a byte's two codes
    constexpr int step = 32 / sizeof(T), half = 8 * sizeof(T);
    typedef Lane Lanes __attribute__((vector_size(64)));
    typedef Pair Pairs __attribute__((vector_size(64)));
    typedef std::uint8_t Bytes __attribute__((vector_size(step)));
    Lanes table{};  // of 16 bits twice as many as there are codes
    std::memcpy(&table, value, sizeof(value));
    std::int64_t done = 0;
    for (; done + step <= bytes; done += step) {
      Bytes packed;
      std::memcpy(&packed, codes + done, step);
      const Pairs pairs = __builtin_convertvector(packed, Pairs);
      const Lanes found = __builtin_shuffle(table, reinterpret_cast<Lanes>(pairs >> 4 | (pairs & 15) << half));
      std::memcpy(out + 2 * done, &found, 64);
    }
    return done;
  }
#endif
  return 0;
}

// out[0 : stop - start] = elements start : stop.
template <bool wide, typename T>
INLINE void decode_part(T* out, const Weight& w, std::int64_t start, std::int64_t stop) {
  const auto* codes = pointer<std::uint8_t>(w.codes);
  while (start < stop) {
    const std::int64_t block = start / w.blocksize, end = std::min(stop, (block + 1) * w.blocksize);
    T value[CODES];
    values_of_block(value, w, absmax_of(w, block));
    if (start % 2 == 1) *out++ = value[codes[start++ / 2] & 15];
    const std::int64_t found = 2 * look_up<wide>(out, value, codes + start / 2, (end - start) / 2);
    start += found, out += found;
    for (; start + 1 < end; start += 2, out += 2) {
      const std::uint8_t byte = codes[start / 2];
      out[0] = value[byte >> 4];
      out[1] = value[byte & 15];
    }
    if (start < end) *out++ = value[codes[start++ / 2] >> 4];
  }
}

template <typename T>
void decode(T* out, const Weight& w, std::int64_t start, std::int64_t stop) {
  decode_part<false>(out, w, start, stop);
}

#ifdef HAVE_AVX512
template <typename T>
__attribute__((target("arch=x86-64-v4"))) void decode_avx512(T* out, const Weight& w, std::int64_t start, std::int64_t stop) {
  decode_part<true>(out, w, start, stop);
}
#endif

template <typename T>
auto decode_for_this_cpu() {
#ifdef HAVE_AVX512
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return &decode_avx512<T>;
#endif
  return &decode<T>;
}

template <typename T>
void decode_rows(const Weight& w, Address out, std::int64_t out_stride, std::int64_t rows, std::int64_t columns,
                 std::int64_t start, std::int64_t step, int threads) {
  const auto decode = decode_for_this_cpu<T>();
  const std::int64_t per_row = (columns + SEGMENT - 1) / SEGMENT;
#pragma omp parallel for num_threads(threads) if (rows * columns > SEGMENT)
  for (std::int64_t i = 0; i < rows * per_row; ++i) {
    const std::int64_t row = i / per_row, first = i % per_row * SEGMENT, last = std::min(columns, first + SEGMENT);
    decode(reinterpret_cast<T*>(out) + row * out_stride + first, w, start + row * step + first, start + row * step + last);
  }
}

template <typename T>
INLINE void rounded_values(float (*value)[CODES], const Weight& w, std::int64_t first, std::int64_t last) {
  for (std::int64_t block = first; block < last; ++block) {
    const float absmax = absmax_of(w, block);
#pragma GCC unroll 1  // as values_of_block
    for (int code = 0; code < CODES; ++code) value[block - first][code] = rounded(pointer<float>(w.values)[code] * absmax, T{});
  }
}

}  // namespace

FOR_EACH_CPU void values_of_blocks(float (*value)[CODES], const Weight& w, std::int64_t first, std::int64_t last,
                                   Rows::Type type) {
  if (type == Rows::FLOAT) return rounded_values<float>(value, w, first, last);
  if (type == Rows::BFLOAT16) return rounded_values<BFloat16>(value, w, first, last);
  rounded_values<Half>(value, w, first, last);
}

void nf4_decode(const Weight& weight, Address out, const std::string& dtype, std::int64_t out_stride, std::int64_t rows,
                std::int64_t columns, std::int64_t start, std::int64_t step, int threads) {
  const auto run = [&](auto* decode_to) { decode_to(weight, out, out_stride, rows, columns, start, step, threads); };
  if (dtype == "bfloat16") return run(&decode_rows<BFloat16>);
  if (dtype == "float16") return run(&decode_rows<Half>);
  if (dtype == "float32") return run(&decode_rows<float>);
  if (dtype == "float64") return run(&decode_rows<double>);
  throw std::invalid_argument("nf4_decode: got dtype " + dtype + ", expected bfloat16, float16, float32 or float64");
}

}  // namespace lora_kernels::cpu
