// out = values[code] * absmax[block] in one launch, nested absmax included.
#include <limits>

#include "launch.h"
#include "nf4.cuh"

namespace lora_kernels {
namespace {

constexpr int UNROLL = 4;  // words of 8 codes whose loads a thread has in flight
constexpr int BLOCKS_PER_PROCESSOR = 6;

// i / divisor for i < 2^31 by a product (Granlund and Montgomery 1994, round-up method).
struct Divider {
  std::uint32_t divisor, multiplier;
  int shift;

  explicit Divider(std::uint32_t d) : divisor(d), shift(31) {
    while ((std::uint64_t{1} << (shift - 31)) < d) shift++;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
  }
  __device__ __forceinline__ std::uint32_t divide(std::uint32_t i) const {
    return static_cast<std::uint32_t>((static_cast<std::uint64_t>(i) * multiplier) >> shift);
  }
};

template <class T>
__device__ __forceinline__ void store8(T* out, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint4*>(out) =
        make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
  } else {
    reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}

__device__ __forceinline__ void decode8(float (&v)[8], SharedAddress copies, std::uint32_t word, float absmax) {
#pragma unroll
  for (int b = 0; b < 4; b++) {
    const float2 pair = pair_of(copies, word, b);
    v[2 * b] = __fmul_rn(pair.x, absmax);
    v[2 * b + 1] = __fmul_rn(pair.y, absmax);
  }
}

// Word by word: 8 codes in, 16 or 32 aligned bytes out; rows hold whole words. The last `tail` < 8 elements follow `words`.
template <class T, bool NESTED>
__global__ void __launch_bounds__(THREADS)
    dequantize_words_kernel(const std::uint32_t* codes, Absmax absmax, const __grid_constant__ Values values, T* out,
                            std::uint32_t words, int tail, Divider words_per_row, std::int64_t row_stride, int log2_words) {
  __shared__ PairTable pairs;
  __shared__ float map[256];
  fill(pairs, values);
  if constexpr (NESTED) map[threadIdx.x] = absmax.map[threadIdx.x];
  const float offset = NESTED ? *absmax.offset : 0.0f;
  __syncthreads();
  const SharedAddress copies = copies_of_lane(pairs);
  const std::uint32_t step = gridDim.x * (THREADS * UNROLL);
  for (std::uint32_t first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x; first < words; first += step) {
    std::uint32_t word[UNROLL];
    Scale<NESTED> scale[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const std::uint32_t i = min(first + u * THREADS, words - 1);
      word[u] = __ldcs(codes + i);
      scale[u].read(absmax, i >> log2_words);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const std::uint32_t i = first + u * THREADS;
      if (i >= words) break;
      const std::uint32_t row = words_per_row.divide(i), column = i - row * words_per_row.divisor;
      float v[8];
      decode8(v, copies, word[u], scale[u].value(map, offset));
      store8(out + row * row_stride + column * std::int64_t{8}, v);
    }
  }
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < tail) {
    const std::int64_t i = words * std::int64_t{8} + threadIdx.x;
    const std::uint8_t byte = reinterpret_cast<const std::uint8_t*>(codes)[i >> 1];
    const float value = values.of_code[i & 1 ? byte & 15 : byte >> 4];
    out[i] = round_to<T>(__fmul_rn(value, absmax_of(absmax, words >> log2_words)));
  }
}

// Any rows, any alignment: element by element, a division per 8.
template <class T>
__global__ void __launch_bounds__(THREADS)
    dequantize_any_kernel(const std::uint8_t* codes, Absmax absmax, const __grid_constant__ Values values, T* out,
                          std::int64_t elements, std::int64_t columns, std::int64_t row_stride, int log2_blocksize) {
  __shared__ float of_code[16];
  if (threadIdx.x < 16) of_code[threadIdx.x] = values.of_code[threadIdx.x];
  __syncthreads();
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * THREADS * 8;
  for (std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 8; first < elements;
       first += step) {
    const float scale = absmax_of(absmax, first >> log2_blocksize);
    std::int64_t row = first / columns, column = first - row * columns;
    for (std::int64_t i = first; i < first + 8 && i < elements; i++) {
      const std::uint8_t byte = codes[i >> 1];
      out[row * row_stride + column] = round_to<T>(__fmul_rn(of_code[i & 1 ? byte & 15 : byte >> 4], scale));
      if (++column == columns) row++, column = 0;
    }
  }
}

template <class T>
void dequantize(const Weight& w, Address out, std::int64_t row_stride, Address stream) {
  constexpr const char* NAME = "nf4_dequantize";
  const std::int64_t elements = w.rows * w.columns, words = elements / 8;
  const bool flat = row_stride == w.columns || w.rows == 1;
  const bool rows_fit = flat || (w.columns % 8 == 0 && row_stride * sizeof(T) % 16 == 0);
  const std::int64_t most = static_cast<std::int64_t>(processors(NAME)) * BLOCKS_PER_PROCESSOR;
  const Absmax absmax(w);
  Values values;
  for (int i = 0; i < 16; i++) values.of_code[i] = w.values[i];
  if (rows_fit && out % 16 == 0 && w.codes % 4 == 0 && words < (std::int64_t{1} << 31) - most * THREADS * UNROLL) {
    const std::int64_t per_block = THREADS * UNROLL, blocks = (words + per_block - 1) / per_block;
    const Divider per_row(static_cast<std::uint32_t>(flat ? words + 1 : w.columns / 8));
    const auto kernel = w.nested_absmax ? dequantize_words_kernel<T, true> : dequantize_words_kernel<T, false>;
    launch(NAME, kernel, blocks < 1 ? 1 : blocks < most ? blocks : most, THREADS, stream,
           pointer<const std::uint32_t>(w.codes), absmax, values, pointer<T>(out), words, elements % 8, per_row,
           row_stride, log2_of(w.blocksize / 8));
  } else {
    const std::int64_t blocks = (elements + THREADS * 8 - 1) / (THREADS * 8);
    launch(NAME, dequantize_any_kernel<T>, blocks < most ? blocks : most, THREADS, stream,
           pointer<const std::uint8_t>(w.codes), absmax, values, pointer<T>(out), elements, w.columns, row_stride,
           log2_of(w.blocksize));
  }
}

}  // namespace

void Weight::check(const char* function) const {
  require(rows > 0, function, "rows", rows, "at least 1");
  require(columns > 0, function, "columns", columns, "at least 1");
  require(rows <= std::numeric_limits<std::int64_t>::max() / 8 / columns, function, "rows", rows, "fewer than 2^60 elements");
  require(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, function, "blocksize", blocksize,
          "a power of two of at least 32");
  require(codes != 0, function, "codes", "null", "an address");
  require(absmax != 0, function, "absmax", "null", "an address");
  const int given = (nested_absmax != 0) + (nested_map != 0) + (nested_offset != 0);
  require(given == 0 || given == 3, function, "nested_absmax, nested_map, nested_offset", given, "all three, or none");
}

void nf4_dequantize(const Weight& w, Address out, std::int64_t row_stride, Dtype dtype, Address stream) {
  w.check("nf4_dequantize");
  require(out != 0, "nf4_dequantize", "out", "null", "an address");
  require(row_stride >= w.columns, "nf4_dequantize", "row_stride", row_stride, "at least the number of columns");
  if (dtype == Dtype::bf16) return dequantize<__nv_bfloat16>(w, out, row_stride, stream);
  if (dtype == Dtype::fp16) return dequantize<__half>(w, out, row_stride, stream);
  dequantize<float>(w, out, row_stride, stream);
}

}  // namespace lora_kernels
