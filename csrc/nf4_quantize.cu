// Quantising to 4 bits with the bytes of bitsandbytes' CPU result, and absmax to its 8-bit code.
#include <algorithm>
#include <numeric>

#include "launch.h"
#include "nf4.cuh"

namespace lora_kernels {
namespace {

constexpr int WARPS = THREADS / 32;
constexpr int NESTED_BLOCK = 256;
static_assert(NESTED_BLOCK == THREADS, "a thread per value");

// The sorted values' midpoints, and the code of each interval between them: a value takes the code of the number of
// midpoints below it, so that a tie goes to the lower one.
struct Encoder {
  float midpoints[15];
  std::uint8_t code[16];

  explicit Encoder(const std::array<float, 16>& values) {
    std::array<int, 16> order;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] < values[b]; });
    for (int i = 0; i < 16; i++) code[i] = static_cast<std::uint8_t>(order[i]);
    for (int i = 0; i < 15; i++) midpoints[i] = (values[order[i]] + values[order[i + 1]]) / 2.0f;
  }
};

// How many of SIZE - 1 sorted `midpoints` are below `value`; SIZE is a power of two.
template <int SIZE>
__device__ __forceinline__ int count_below(const float* midpoints, float value) {
  int count = 0;
#pragma unroll
  for (int half = SIZE / 2; half > 0; half /= 2)
    if (midpoints[count + half - 1] < value) count += half;
  return count;
}

__device__ __forceinline__ float clip(float value) { return fminf(fmaxf(value, -1.0f), 1.0f); }

__device__ __forceinline__ float maximum_of_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// A warp per block of `blocksize`. A full block multiplies by the reciprocal of its absmax, which is held above 1e-38 for
// that only; the tail block divides by its absmax, which is stored as held.
template <class T>
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(const T* weight, std::int64_t elements, int blocksize, const __grid_constant__ Encoder encoder,
                    std::uint8_t* codes, float* absmax, unsigned long long* first_bad) {
  __shared__ float midpoints[16];
  __shared__ std::uint8_t code[16];
  if (threadIdx.x < 16) {
    midpoints[threadIdx.x] = threadIdx.x < 15 ? encoder.midpoints[threadIdx.x] : 0.0f;
    code[threadIdx.x] = encoder.code[threadIdx.x];
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32, start = block * blocksize;
  if (start >= elements) return;
  const int size = static_cast<int>(min(static_cast<std::int64_t>(blocksize), elements - start));
  const T* values = weight + start;

  float largest = 0.0f;
  for (int i = lane; i < size; i += 32) {
    const float value = fabsf(widen(values[i]));
    if (!(value <= 3.402823466e38f)) atomicMin(first_bad, static_cast<unsigned long long>(start + i));
    largest = fmaxf(largest, value);
  }
  largest = maximum_of_warp(largest);
  const float held = fmaxf(largest, 1e-38f), reciprocal = __fdiv_rn(1.0f, held);
  const bool full = size == blocksize;
  if (lane == 0) absmax[block] = full ? largest : held;

  auto encode = [&](int i) {
    const float value = i < size ? widen(values[i]) : 0.0f;  // an odd count is padded with the code of 0
    return code[count_below<16>(midpoints, clip(full ? __fmul_rn(value, reciprocal) : __fdiv_rn(value, held)))];
  };
  for (int i = 2 * lane; i < size; i += 64)
    codes[(start + i) / 2] = static_cast<std::uint8_t>(encode(i) << 4 | encode(i + 1));
}

// A block of threads per 256 absmax. bitsandbytes' CPU code finds the entry by a table of 65536 bins over [-1, 1], which is
// not always the nearest: a value becomes its bin's, and that is compared with the midpoints of the map.
__global__ void __launch_bounds__(THREADS)
    quantize_absmax_kernel(const float* absmax, std::int64_t blocks, const float* offset, const float* map,
                           std::uint8_t* quantized, float* nested_absmax) {
  __shared__ float midpoints[256], largest_of[WARPS];
  const int i = threadIdx.x;
  midpoints[i] = i < 255 ? __fmul_rn(0.5f, __fadd_rn(map[i], map[i + 1])) : 0.0f;
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * NESTED_BLOCK + i;
  const float value = at < blocks ? __fsub_rn(absmax[at], *offset) : 0.0f;
  const float of_warp = maximum_of_warp(fabsf(value));
  if (i % 32 == 0) largest_of[i / 32] = of_warp;
  __syncthreads();
  float largest = 0.0f;
  for (int warp = 0; warp < WARPS; warp++) largest = fmaxf(largest, largest_of[warp]);
  if (i == 0) nested_absmax[blockIdx.x] = largest;
  if (at >= blocks) return;
  const float scaled = clip(__fmul_rn(value, __fdiv_rn(1.0f, largest)));
  const float unit = __fmul_rn(__fadd_rn(scaled, 1.0f), 0.5f);
  const int bin = min(max(static_cast<int>(__fmaf_rn(unit, 65535.0f, 0.5f)), 0), 65535);
  const float binned = __fadd_rn(-1.0f, __fdiv_rn(__fmul_rn(2.0f, static_cast<float>(bin)), 65535.0f));
  quantized[at] = largest == 0.0f ? 0 : static_cast<std::uint8_t>(count_below<256>(midpoints, binned));
}

template <class T>
void quantize(Address weight, std::int64_t elements, int blocksize, const Encoder& encoder, Address codes, Address absmax,
              Address first_bad, Address stream) {
  const std::int64_t blocks = (elements + blocksize - 1) / blocksize;
  launch("nf4_quantize", quantize_kernel<T>, (blocks + WARPS - 1) / WARPS, THREADS, stream, pointer<const T>(weight),
         elements, blocksize, encoder, pointer<std::uint8_t>(codes), pointer<float>(absmax),
         pointer<unsigned long long>(first_bad));
}

}  // namespace

void nf4_quantize(Address weight, std::int64_t elements, Dtype dtype, int blocksize, const std::array<float, 16>& values,
                  Address codes, Address absmax, Address first_bad, Address stream) {
  constexpr const char* NAME = "nf4_quantize";
  require(elements > 0, NAME, "elements", elements, "at least 1");
  require(blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, NAME, "blocksize", blocksize,
          "a power of two of at least 32");
  require(elements / blocksize < std::int64_t{WARPS} << 31, NAME, "elements", elements, "fewer than 2^34 blocks");
  require(weight && codes && absmax && first_bad, NAME, "weight, codes, absmax or first_bad", "null", "an address");
  const Encoder encoder(values);
  const auto run = dtype == Dtype::bf16 ? quantize<__nv_bfloat16> : dtype == Dtype::fp16 ? quantize<__half> : quantize<float>;
  run(weight, elements, blocksize, encoder, codes, absmax, first_bad, stream);
}

void nf4_quantize_absmax(Address absmax, std::int64_t blocks, Address offset, Address map, Address quantized,
                         Address nested_absmax, Address stream) {
  constexpr const char* NAME = "nf4_quantize_absmax";
  require(blocks > 0, NAME, "blocks", blocks, "at least 1");
  require(blocks / NESTED_BLOCK < std::int64_t{1} << 31, NAME, "blocks", blocks, "fewer than 2^39");
  require(absmax && offset && map && quantized && nested_absmax, NAME, "an array", "null", "an address");
  launch(NAME, quantize_absmax_kernel, (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK, THREADS, stream,
         pointer<const float>(absmax), blocks, pointer<const float>(offset), pointer<const float>(map),
         pointer<std::uint8_t>(quantized), pointer<float>(nested_absmax));
}

}  // namespace lora_kernels
