// What the kernels offer to the bindings: addresses in device memory as integers, no device code, no torch.
//
// Every function only enqueues work on `stream` of the current device. It raises std::invalid_argument for arguments
// that do not fit, before anything is launched, and std::runtime_error with CUDA's own message for what CUDA refuses.
#pragma once
#include <array>
#include <cstdint>

namespace lora_kernels {

using Address = std::uintptr_t;  // in device memory; 0 is none

enum class Dtype { bf16, fp16, fp32 };

// W[rows, columns] in 4 bits, flattened row by row into blocks of `blocksize`: W = values[code] * absmax[block].
// Nested: absmax[block] = nested_map[quantized] * nested_absmax[block / 256] + nested_offset, rounded twice.
struct Weight {
  Address codes;   // uint8, two codes each, the first in the high half
  Address absmax;  // float32 per block; uint8 where nested
  Address nested_absmax, nested_map, nested_offset;  // float32 per 256 blocks, [256], [1]; 0: not nested
  std::int64_t rows, columns;
  int blocksize;  // a power of two from 32 on
  std::array<float, 16> values;

  void check(const char* function) const;  // raises std::invalid_argument
};

// out[rows, columns] = W, its rows `row_stride` elements apart.
void nf4_dequantize(const Weight& w, Address out, std::int64_t row_stride, Dtype dtype, Address stream);

// Why nf4_skinny cannot compute a product with this weight; empty if it can.
const char* nf4_skinny_refuses(std::int64_t M, std::int64_t N, std::int64_t K, int blocksize);

// y[M, N] = x[M, K] * W^T + s * h[M, R] * B[N, R]^T + c[N] for M <= 16, rounded once; bit-identical from run to run.
// x (rows `x_stride` apart), c and y are bf16 or fp16; h and B any type. s = scale, times *scale_address if that is given.
struct Skinny {
  Address x;
  std::int64_t x_stride;
  Address h, B, c, y;  // h and B may be 0 with R = 0, c may be 0
  std::int64_t M, R;
  float scale;
  Address scale_address;
  Dtype dtype, adapter_dtype;
};
void nf4_skinny(const Weight& w, const Skinny& s, Address stream);

// codes and absmax of `elements` values; *first_bad, which must hold the largest int64, becomes the position of the first
// value that is not finite, if there is one.
void nf4_quantize(Address weight, std::int64_t elements, Dtype dtype, int blocksize, const std::array<float, 16>& values,
                  Address codes, Address absmax, Address first_bad, Address stream);

// quantized[blocks] and nested_absmax[ceil(blocks / 256)] of absmax[blocks] - *offset in the 8-bit code `map`[256].
void nf4_quantize_absmax(Address absmax, std::int64_t blocks, Address offset, Address map, Address quantized,
                         Address nested_absmax, Address stream);

}  // namespace lora_kernels
