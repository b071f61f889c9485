// Decoding 4-bit weights on the device, exactly as bitsandbytes does: one float32 product, one rounding to the output.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "nf4.h"
#include "ptx.cuh"

namespace lora_kernels {

constexpr int THREADS = 256;

struct Values {
  float of_code[16];
};

// ---- two floats to two 16-bit numbers in one word, the first in the low half ----

template <class T>
__device__ __forceinline__ std::uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float first, float second) {
  __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<std::uint32_t*>(&both);
}
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float first, float second) {
  __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<std::uint32_t*>(&both);
}

template <class T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half round_to<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __forceinline__ float round_to<float>(float value) { return value; }

__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float load(const void* p, Dtype dtype, std::int64_t i) {
  if (dtype == Dtype::bf16) return widen(static_cast<const __nv_bfloat16*>(p)[i]);
  if (dtype == Dtype::fp16) return widen(static_cast<const __half*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// ---- absmax of a block ----

struct Absmax {
  const float* plain;
  const std::uint8_t* quantized;  // with the three below; null: not nested
  const float *nested, *map, *offset;

  explicit Absmax(const Weight& w)
      : plain(reinterpret_cast<const float*>(w.nested_absmax ? 0 : w.absmax)),
        quantized(reinterpret_cast<const std::uint8_t*>(w.nested_absmax ? w.absmax : 0)),
        nested(reinterpret_cast<const float*>(w.nested_absmax)),
        map(reinterpret_cast<const float*>(w.nested_map)),
        offset(reinterpret_cast<const float*>(w.nested_offset)) {}
};

// Two roundings, as bitsandbytes: contracted to one FMA the last bit would differ.
__device__ __forceinline__ float nested_absmax(float entry, float absmax2, float offset) {
  return __fadd_rn(__fmul_rn(entry, absmax2), offset);
}

__device__ __forceinline__ float absmax_of(const Absmax& a, std::int64_t block) {
  if (!a.quantized) return __ldg(a.plain + block);
  return nested_absmax(__ldg(a.map + __ldg(a.quantized + block)), __ldg(a.nested + (block >> 8)), __ldg(a.offset));
}

// The same in two steps, so that a kernel has many loads in flight before it needs the first.
template <bool NESTED>
struct Scale {
  float absmax;  // nested: that of the absmax
  std::uint8_t quantized;

  __device__ __forceinline__ void read(const Absmax& a, std::uint32_t block) {
    if constexpr (NESTED) quantized = __ldg(a.quantized + block);
    absmax = NESTED ? __ldg(a.nested + (block >> 8)) : __ldg(a.plain + block);
  }
  __device__ __forceinline__ float value(const float* map, float offset) const {
    return NESTED ? nested_absmax(map[quantized], absmax, offset) : absmax;
  }
};

// ---- the table of pairs: both values of a byte in one 8-byte load, which 16 copies keep free of bank conflicts ----

constexpr int COPIES = 16;
using PairTable = float2[256 * COPIES];

__device__ __forceinline__ void fill(PairTable& pairs, const Values& values) {
  for (int i = threadIdx.x; i < 256 * COPIES; i += THREADS) {
    int byte = i / COPIES;
    pairs[i] = make_float2(values.of_code[byte >> 4], values.of_code[byte & 15]);
  }
}

// Where this lane's copies start, as a register: as pointer arithmetic it costs an addition more in each look-up.
__device__ __forceinline__ SharedAddress copies_of_lane(const PairTable& pairs) {
  return shared_address(pairs) + threadIdx.x % COPIES * sizeof(float2);
}

// The pair of byte `b` of `word`: PRMT, LEA, LDS.
__device__ __forceinline__ float2 pair_of(SharedAddress copies, std::uint32_t word, int b) {
  return load_shared_pair(copies + __byte_perm(word, 0, 0x4440 | b) * (COPIES * sizeof(float2)));
}

}  // namespace lora_kernels
